"""DDIM: exact on one data point, the same on every path, and the published update on DDPM indices."""

import numpy as np
import pytest
import torch

from steadyflow.denoisers import Denoiser, GaussianMixture
from steadyflow.grids import Indices, Karras
from steadyflow.noise import NoiseSource
from steadyflow.paths import (
    EDM,
    ConditionalOT,
    Cosine,
    DiscreteVariancePreserving,
    VarianceExploding,
    VariancePreserving,
)
from steadyflow.samplers import DDIM, DDPM

F64 = torch.float64
PATHS = [VariancePreserving(), DiscreteVariancePreserving(), Cosine(), VarianceExploding(0.002, 80.0), EDM()]


@pytest.mark.parametrize("path", [*PATHS, ConditionalOT()], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_one_step_is_exact_on_a_dirac_distribution(path, eta):
    """eps is constant along the flow; with eta > 0 the noise is right as well, so only its law is compared."""
    point = torch.tensor([[0.7, -1.4, 2.0]], dtype=F64)
    dirac = GaussianMixture(point, [0.0])
    z, fresh = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    for s in (0.3, 0.01, 0.0):
        t, s = torch.tensor([1.0, s], dtype=F64)
        (a_t, s_t), (a_s, s_s) = path(t), path(s)
        x = DDIM(path, [1.0, 0.0], eta=eta).step(dirac, a_t * point + s_t * z, t, s, fresh if eta else None)
        rho = s_s / a_s * a_t / s_t
        std = eta * torch.sqrt(1 - rho**2)
        eps = torch.sqrt(1 - std**2) * z + std * fresh
        torch.testing.assert_close(x, a_s * point + s_s * eps, rtol=1e-12, atol=1e-12)


def test_on_the_same_ratios_every_path_gives_the_same_samples(ring):
    noise = NoiseSource(0, range(8), (2,), dtype=F64)
    results = []
    for path in [VariancePreserving(), DiscreteVariancePreserving(), Cosine(), EDM(), ConditionalOT()]:
        sampler = DDIM(path, Karras(0.01, 40.0), steps=12)
        a, _ = path(sampler.times[0])
        results.append(sampler(ring, noise, start=a * 40 * noise(0)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-7, atol=1e-7)


class LinearEps(Denoiser):
    """x_0 = (x - sigma eps) / alpha of some made-up noise prediction, as a DDPM checkpoint gives it."""

    def eps(self, x, alpha):
        return torch.tanh(x) + 0.1 * alpha * x.flip(1)

    def forward(self, x, alpha, sigma):
        return (x - sigma * self.eps(x, alpha)) / alpha


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_published_update_on_ddpm_indices(eta):
    """Song et al. 2021, Eq. 12 and 16, in their notation (alpha is alpha_bar), over the indices of their code."""
    alphas = np.append(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), 1.0)  # the last entry serves index -1
    denoiser = LinearEps()
    noise = NoiseSource(0, range(3), (4,), dtype=F64)
    sampler = DDIM(DiscreteVariancePreserving(), Indices(), steps=10, eta=eta)
    x = start = noise(0)
    indices = list(range(900, -1, -100))
    for k, (i, j) in enumerate(zip(indices, [*indices[1:], -1], strict=True)):
        a, b = alphas[i], alphas[j]
        sigma = eta * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)
        eps = denoiser.eps(x, np.sqrt(a))
        x0 = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
        x = np.sqrt(b) * x0 + np.sqrt(1 - b - sigma**2) * eps + sigma * noise(k + 1)
    torch.testing.assert_close(sampler(denoiser, noise, start=start), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", [VariancePreserving(), ConditionalOT()], ids=lambda path: type(path).__name__)
def test_eta_one_is_ddpm(path, ring):
    noise = NoiseSource(0, range(8), (2,), dtype=F64)
    times = torch.linspace(1.0, 0.0, 9, dtype=F64)
    torch.testing.assert_close(
        DDIM(path, times, eta=1.0)(ring, noise), DDPM(path, times)(ring, noise), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_is_the_published_chain(variance):
    """Ho et al. 2020, Eq. 11 with sigma^2 = beta_tilde or beta, no noise in the last step."""
    betas = np.linspace(1e-3, 0.2, 20)
    bars = np.cumprod(1 - betas)
    denoiser, noise = LinearEps(), NoiseSource(0, range(3), (4,), dtype=F64)
    path = DiscreteVariancePreserving(1e-3, 0.2, steps=20)
    x = start = noise(0)
    for k, i in enumerate(range(19, -1, -1)):
        before = bars[i - 1] if i else 1.0
        eps = denoiser.eps(x, np.sqrt(bars[i]))
        mean = (x - betas[i] / np.sqrt(1 - bars[i]) * eps) / np.sqrt(1 - betas[i])
        std = np.sqrt(betas[i] * ((1 - before) / (1 - bars[i]) if variance == "small" else 1.0))
        x = mean + (std * noise(k + 1) if i else 0)
    sampler = DDPM(path, Indices(train_steps=20), steps=20, variance=variance)
    torch.testing.assert_close(sampler(denoiser, noise, start=start), x, rtol=1e-9, atol=1e-9)


def test_a_step_is_differentiable(ring):
    """Inversion and distillation differentiate through it."""
    sampler = DDIM(VariancePreserving(), [0.8, 0.5])
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sampler.step(ring, x, *sampler.times), x)


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="need 0 <= eta <= 1"):
        DDIM(EDM(), [1.0, 0.0], eta=1.5)
    with pytest.raises(ValueError, match="variance must be small, large or learned"):
        DDPM(EDM(), [1.0, 0.0], variance="big")
