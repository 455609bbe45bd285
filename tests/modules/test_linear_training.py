"""Training on a linear diffusion: the loss against its minimum, and a checkpoint from the loss to samples."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from steadyflow import checkpoints
from steadyflow.data.batches import HeldOutBatches, TrainingBatches
from steadyflow.denoisers import EpsDenoiser, MixtureNoise, NetworkNoise
from steadyflow.diffusions import BDM, CLD, Isotropic, LinearDiffusion
from steadyflow.diffusions.linear import inverse
from steadyflow.modules.losses import SNR, Constant, denoising_loss
from steadyflow.networks import MLP, UNet
from steadyflow.noise import NoiseSource
from steadyflow.paths import VariancePreserving
from steadyflow.samplers import GDDIM

F64 = torch.float64
VP = VariancePreserving()
DIFFUSIONS = {"vp": Isotropic(VP), "bdm": BDM(VP, size=4), "cld": CLD()}
every = pytest.mark.parametrize("path", DIFFUSIONS.values(), ids=DIFFUSIONS.keys())
VARIANCE = 0.3


class Exact(nn.Module):
    """The exact noise of N(0, VARIANCE) data, of R_t or L_t, standing for a trained network."""

    def __init__(self, path: LinearDiffusion, factor: str, data_std: float | None):
        super().__init__()
        self.path, self.factor, self.data_std = path, factor, data_std
        self.model = MixtureNoise(path, torch.zeros(1, 1, 4, 4), [VARIANCE])

    def forward(self, u: Tensor, t: Tensor) -> Tensor:
        path, t = self.path, t.double()
        root = path.root(t) if self.factor == "R" else path.cholesky(t)
        psi, sigma = path(t)
        gain = root.mT @ inverse(VARIANCE * psi[..., :1] @ psi[..., :1].mT + sigma)
        if self.data_std is not None:
            gain = gain - root.mT @ inverse(self.data_std**2 * psi[..., :1] @ psi[..., :1].mT + sigma)
        return path.from_basis(path.apply(gain, path.to_basis(u.double())))


@every
@pytest.mark.parametrize(("factor", "data_std"), [("R", None), ("L", None), ("L", 0.9)])
def test_the_loss_of_the_exact_noise_is_its_closed_minimum(path, factor, data_std):
    """E |eps - E[eps | u]|^2 = tr(I - K^T C^-1 K) an entry, for Gaussian data; and no other gain does better."""
    denoiser, g = NetworkNoise(Exact(path, factor, data_std), path, factor, data_std), torch.Generator().manual_seed(0)
    count, t = 4000, 0.35
    x0 = VARIANCE**0.5 * torch.randn(count, 1, 4, 4, generator=g, dtype=F64)
    eps = torch.randn(count, path.variables, 4, 4, generator=g, dtype=F64)
    times = torch.full((count,), t, dtype=F64)
    loss = denoising_loss(denoiser, x0, eps, times, Constant())
    psi, sigma = path(t)
    root = path.root(t)
    gain = root.mT @ inverse(VARIANCE * psi[..., :1] @ psi[..., :1].mT + sigma) @ root
    minimum = 1 - gain.diagonal(dim1=-2, dim2=-1).mean()  # over frequencies and variables
    assert abs(float(loss.mean() - minimum)) < 4 * float(loss.std()) / count**0.5
    u = denoiser.noised(x0, eps, times)
    worse = (denoiser.output(u, times) * 1.2 - eps).square().flatten(1).mean(1)
    assert worse.mean() > loss.mean()


@every
@pytest.mark.parametrize("factor", ["R", "L"])
def test_a_network_of_either_factor_is_the_same_noise_model(path, factor):
    model = NetworkNoise(Exact(path, factor, None), path, factor)
    u = torch.randn(3, path.variables, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    for t in (torch.tensor(0.2, dtype=F64), torch.tensor([0.1, 0.5, 0.9], dtype=F64)):
        exact = MixtureNoise(path, torch.zeros(1, 1, 4, 4), [VARIANCE])(u, t)
        torch.testing.assert_close(model(u, t), exact, rtol=1e-9, atol=1e-9)


@every
@pytest.mark.parametrize("factor", ["R", "L"])
def test_v_has_unit_variance_and_bounded_errors_at_every_time(path, factor):
    """For data N(0, s^2 I) E v^2 = 1, and with the true v the noise is the one drawn; an error of v is at most as large
    in eps and s times that in x_0, even where alpha is 1e-6."""
    s, n, k = 0.7, 5000, path.variables
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(n, c, 4, 4, generator=g, dtype=F64) for c in (1, k))
    off = torch.nn.functional.normalize(torch.randn(n, 16, generator=g, dtype=F64)).view_as(x0)
    for time in (1e-3, 0.2, 1.0):
        t = torch.full((n,), time, dtype=F64)
        network = Says()
        model = NetworkNoise(network, path, factor, s, "v")
        u, (psi, _) = model.noised(s * x0, eps, t), path(t)
        root = path.root(t) if factor == "R" else path.cholesky(t)
        q = s * inverse(root) @ psi[..., :1]
        pull = path.apply(torch.nn.functional.pad(q.mT, (0, 0, 0, k - 1)), path.to_basis(eps))
        r = (1 + q.mT @ q).sqrt()[:, None, ..., 0, 0]
        v = (path.data(pull) - path.to_basis(x0)) / (r if path.frequencies else r.reshape(n, 1, 1, 1))
        assert (v.square().mean((0, 1)) - 1).abs().max() < 0.1
        found = []
        for network.out in (path.from_basis(v), path.from_basis(v) + off):
            found.append(model.output(u, t))
        torch.testing.assert_close(found[0], eps, rtol=0, atol=1e-7)
        error = path.to_basis(found[1] - found[0])
        assert error.flatten(1).norm(dim=1).max() <= 1 + 1e-9
        of_x0 = path.data(path.apply(root, error)) / psi[:, None, ..., 0, 0].reshape(
            n, 1, *(path.frequencies or (1, 1))
        )
        assert of_x0.flatten(1).norm(dim=1).max() <= s + 1e-7


class Says(nn.Module):
    """A network whose first channel is what it is told."""

    out: Tensor

    def forward(self, u: Tensor, t: Tensor) -> Tensor:
        return torch.cat([self.out, 1e3 * torch.ones_like(u[:, 1:])], 1)


def test_noise_of_training_batches_has_the_states_shape():
    data = [(torch.zeros(2, 4, 4), 0)] * 5
    batch = TrainingBatches(data, 4, 3, 0, variables=2).batch(0)
    assert batch.eps.shape == (4, 4, 4, 4)
    assert not torch.equal(batch.eps[:, :2], batch.eps[:, 2:])
    assert next(iter(HeldOutBatches(data, 5, 0, variables=2))).eps.shape == (5, 4, 4, 4)


@pytest.mark.parametrize("factor", ["R", "L"])
def test_a_checkpoint_is_saved_loaded_and_sampled(tmp_path: Path, factor):
    network = {"_target_": "steadyflow.networks.UNet", "in_channels": 2, "model_channels": 8, "channel_mult": [1]}
    network |= {"num_res_blocks": 1, "attention_resolutions": [], "image_size": 8}
    nodes = {
        "network": network,
        "path": {"_target_": "steadyflow.diffusions.CLD", "beta": 3.0},
        "denoiser": {"_target_": "steadyflow.denoisers.NetworkNoise", "factor": factor, "data_std": 0.7},
    }
    torch.manual_seed(0)
    unet = UNet(**{key: value for key, value in network.items() if key != "_target_"})
    for p in unet.parameters():
        nn.init.normal_(p, std=0.02)
    model = NetworkNoise(unet, CLD(beta=3.0), factor, 0.7).eval()
    checkpoints.save(tmp_path, model, nodes, (1, 8, 8), 0, {"made": "by a test"})
    loaded = checkpoints.load(tmp_path)
    assert isinstance(loaded.path, CLD)
    noise = NoiseSource(0, range(2), loaded.shape)
    x = GDDIM(loaded.path, [1.0, 0.5, 0.1, 0.0], order=2)(loaded.model, noise)
    assert x.shape == (2, 1, 8, 8)
    torch.testing.assert_close(x, GDDIM(CLD(beta=3.0), [1.0, 0.5, 0.1, 0.0], order=2)(model, noise), rtol=0, atol=0)
    with pytest.raises(ValueError, match="has no denoiser"):
        _ = loaded.denoiser


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: NetworkNoise(MLP(2), VP), "prediction=eps"),
        (lambda: EpsDenoiser(MLP(2), CLD()), "prediction=noise"),
        (lambda: NetworkNoise(MLP(2), CLD(), "K"), "R or L"),
        (lambda: NetworkNoise(MLP(2), CLD(), data_std=0.0), "data_std > 0"),
        (lambda: NetworkNoise(MLP(2), CLD(), predicts="v"), "v with a data_std"),
        (lambda: SNR()(NetworkNoise(MLP(2), CLD()), torch.tensor([0.5])), "weight=constant"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
