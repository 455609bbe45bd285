"""The likelihood of data under a model: the change of density along its probability flow."""

import math

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from steadyflow.diffusions import Isotropic, LinearDiffusion
from steadyflow.diffusions.linear import inverse
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath
from steadyflow.samplers.linear import noise_model


class Likelihood:
    """log p(u_e) = log N(u_1; 0, Sigma_1) + int_e^1 div f(u_t, t) dt,  du/dt = f = F u + B eps(u, t),  u_e = u

    along the probability flow from t = e to 1 (e = `end`, whose noise is read as none), integrated in sqrt(t) by
    Dormand-Prince. div f = tr F + tr B (d eps / du), the trace exact, one backward pass an entry of the state, or by
    `probes` random signs z (Hutchinson): E z^T B (d eps / du) z, unbiased in log p for one fixed z along the flow.

    A diffusion with further variables, as CLD's velocity v_0 ~ N(0, C), gives a bound: with v_0 drawn,
    log p(x) >= E [log p(x, v_0) - log N(v_0; 0, C)].

    Source: Chen et al. 2018 (neural ODEs), Theorem 1; Song et al. 2021 (score SDE), Eq. 39-40; Dockhorn et al. 2022,
    App. B.4 (the bound).

    Args:
        path: the linear diffusion or Gaussian path, of alpha > 0 up to t = 1.
        probes: of Hutchinson's estimator, or None for the exact trace.
        end: e. rtol, atol: the tolerances; over the whole batch, so a sample's value depends on it to them.

    Raises:
        ValueError: end outside (0, 1), tolerances or probes not positive.
    """

    def __init__(
        self,
        path: GaussianPath | LinearDiffusion,
        probes: int | None = 1,
        end: float = 1e-5,
        rtol: float = 1e-5,
        atol: float = 1e-5,
    ):
        if not (0 < end < 1 and rtol > 0 and atol > 0 and (probes is None or probes >= 1)):
            raise ValueError(f"need 0 < end < 1, rtol, atol > 0 and probes >= 1, got {end}, {rtol}, {atol}, {probes}")
        self.path, self.probes, self.end = path, probes, float(end)
        self.rtol, self.atol = float(rtol), float(atol)
        self.diffusion = Isotropic(path) if isinstance(path, GaussianPath) else path

    def __call__(self, denoiser: nn.Module, x: Tensor, noise: NoiseSource, **condition: Tensor) -> Tensor:
        """log p(x) in nats, (B,) float64, for data x (B, *S).

        `denoiser` is a NoiseModel, or on a Gaussian path a Denoiser; noise: of the further variables (step 0) and of
        the probes (steps after), of shape S.
        """
        d, model, k = self.diffusion, noise_model(denoiser, self.path), self.diffusion.variables
        u, given = d.lift(x.double()), torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if k > 1:
            covariance = d.covariance(0.0)[1:, 1:]
            std = covariance.diagonal().sqrt().repeat_interleave(x.shape[1]).reshape(-1, *[1] * (x.ndim - 2))
            z = torch.cat([noise(j) for j in range(k - 1)], 1).double()
            u = torch.cat([u[:, : x.shape[1]], std.to(u.device) * z], 1)
            entries = z[0].numel() / (k - 1)
            given = _normal(z) - 0.5 * entries * covariance.diagonal().log().sum()
        signs = [
            torch.cat([noise(k * (p + 1) + j) for j in range(k)], 1).double().sign() for p in range(self.probes or 0)
        ]

        def rate(v: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            t, y = (v * v).cpu(), state[0]
            drift, pull = d.drift(t), d.rate(t)
            with torch.enable_grad():
                y = y.detach().requires_grad_()
                noise_part = d.apply(pull, d.to_basis(model(d.from_basis(y).to(x.dtype), t, **condition).double()))
                trace = _trace(noise_part, y, signs)
            trace = trace + drift.diagonal(dim1=-2, dim2=-1).mean() * y[0].numel()
            return 2 * v * (d.apply(drift, y) + noise_part).detach(), 2 * v * trace.detach()

        times = torch.tensor([self.end**0.5, 1.0], dtype=torch.float64, device=x.device)
        start = (d.to_basis(u), torch.zeros(len(x), dtype=torch.float64, device=x.device))
        y, gained = odeint(
            rate, start, times, rtol=self.rtol, atol=self.atol, method="dopri5", options={"step_t": times[1:]}
        )
        last = d.root(1.0)
        volume = torch.linalg.det(last).log().mean() / k * y[-1][0].numel()
        return _normal(d.apply(inverse(last), y[-1])) - volume + gained[-1] - given


def dequantised(images: Tensor, uniform: Tensor) -> Tensor:
    """8-bit images as the centre of their level and half a level to each side: x = (k + u - 1/2) / 127.5 - 1.

    Args:
        images: (B, C, H, W) uint8. uniform: u of that shape on [0, 1).
    """
    return (images.double() + uniform.double() - 0.5) / 127.5 - 1


def bits_per_dimension(log_prob: Tensor, dimensions: int) -> Tensor:
    """-log2 P(k) / D of 8-bit images from log p of the dequantised: log P(k) >= E_u log p(x) - D log 127.5."""
    return (math.log(127.5) - log_prob / dimensions) / math.log(2)


def _normal(z: Tensor) -> Tensor:
    """log N(z; 0, I) of each item (B,)."""
    return -0.5 * (z.flatten(1).square().sum(1) + z[0].numel() * math.log(2 * math.pi))


def _trace(f: Tensor, y: Tensor, signs: list[Tensor]) -> Tensor:
    """tr (df / dy) of each item (B,): by the probes, or exactly where there are none."""
    if signs:
        products = [(torch.autograd.grad(f, y, z, retain_graph=True)[0] * z).flatten(1).sum(1) for z in signs]
        return torch.stack(products).mean(0)
    flat = f.flatten(1)
    rows = [torch.autograd.grad(flat[:, i].sum(), y, retain_graph=True)[0].flatten(1) for i in range(flat.shape[1])]
    return torch.stack([row[:, i] for i, row in enumerate(rows)]).sum(0)
