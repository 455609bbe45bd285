"""DDIM run backwards: of first order, exact in its limit."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from steadyflow.denoisers import Gaussian
from steadyflow.grids import LogSNR, Uniform
from steadyflow.inversion import DDIMInversion
from steadyflow.paths import ConditionalOT, Cosine, VariancePreserving
from steadyflow.samplers import DDIM, Heun

PATHS = [VariancePreserving(), Cosine(), ConditionalOT()]


def errors(path, corrections: int, denoiser, target: Tensor, noise, counts=(20, 40, 80, 160)) -> list[float]:
    """How far from the image its inversion is brought back, for each number of steps."""
    out = []
    for steps in counts:
        sampler = DDIM(path, LogSNR(end=0.01, zero=False), steps)
        method = DDIMInversion(corrections)
        latent = method(denoiser, sampler, target, noise).latent
        out.append(float((method.image(denoiser, sampler, latent, noise) - target).norm(dim=1).max()))
    return out


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_the_error_halves_with_twice_the_steps(path, mixture, target, noise):
    found = errors(path, 0, mixture, target, noise)
    ratios = [a / b for a, b in pairwise(found)]
    assert all(1.7 < ratio < 2.4 for ratio in ratios[1:]), (found, ratios)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_corrected_to_the_limit_it_inverts_exactly(path, mixture, target, noise):
    assert max(errors(path, 40, mixture, target, noise, (20, 40))) < 1e-9
    (first,), (once,) = (errors(path, n, mixture, target, noise, (20,)) for n in (0, 1))
    assert once < first / 3


def test_of_one_gaussian_it_is_the_inverse_of_a_product(noise):
    """DDIM multiplies (x - alpha m) by a known number at each step, so the exact x_T is known too."""
    variance, mean = 0.3, torch.tensor([0.4, -0.2], dtype=torch.float64)
    path = VariancePreserving()
    sampler = DDIM(path, Uniform(), 12)
    factor = torch.tensor(1.0, dtype=torch.float64)
    for t, s in pairwise(sampler.times):
        (a, b), (c, d) = path(t), path(s)
        total = a * a * variance + b * b
        factor = factor * (c * a * variance + d * b) / total  # alpha_s a C + sigma_s b: D and eps are linear in x
    target = torch.tensor([[0.9, -0.3]], dtype=torch.float64)
    exact = (target - mean) / factor + path(sampler.times[0])[0] * mean
    found = DDIMInversion(200)(Gaussian(mean, variance), sampler, target, noise).latent
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


def test_the_last_step_to_no_noise(mixture, target, noise, ddim):
    """On a grid that ends at t = 0 the first reversed step starts where eps cannot be read off."""
    method, sampler = DDIMInversion(80), ddim(15)
    assert sampler.times[-1] == 0
    latent = method(mixture, sampler, target, noise).latent
    torch.testing.assert_close(method.image(mixture, sampler, latent, noise), target, rtol=1e-8, atol=1e-8)


def test_mistakes(mixture, target, noise, ddim):
    with pytest.raises(ValueError, match=r"ddim_inversion inverts deterministic DDIM, got eta=0\.5; set sampler=ddim"):
        DDIMInversion()(mixture, ddim(5, 0.5), target, noise)
    with pytest.raises(ValueError, match="got Heun"):
        DDIMInversion()(mixture, Heun(VariancePreserving(), LogSNR(), 5), target, noise)
    with pytest.raises(ValueError, match="corrections must be a whole number"):
        DDIMInversion(-1)
    with pytest.raises(FloatingPointError, match="the noise found is not finite"):
        DDIMInversion()(mixture, ddim(5), target * torch.nan, noise)
