"""EDICT: reversible whatever the denoiser is; its samples are near DDIM's."""

import pytest
import torch

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Uniform
from steadyflow.inversion import EDICT, DDIMInversion
from steadyflow.paths import ConditionalOT, VariancePreserving
from steadyflow.samplers import DDIM


class Rough(Denoiser):
    """Nobody's denoiser: not the gradient of anything."""

    def forward(self, x, alpha, sigma):
        return 0.5 * torch.sin(2 * x.flip(1)) * torch.tensor([1.0, -0.5], dtype=x.dtype)


def found(method, denoiser, sampler, target, noise):
    """The latent, and how far from the image it is brought back."""
    latent = method(denoiser, sampler, target, noise).latent
    return latent, float((method.image(denoiser, sampler, latent, noise) - target).abs().max())


@pytest.mark.parametrize("p", [0.93, 1.0, 0.8])
def test_the_image_comes_back_to_rounding(p, mixture, target, noise, ddim):
    sampler = ddim(20)
    for denoiser, bound in ((mixture, 1e-10), (Rough(), 1e-7)):  # what rounding grows to is the denoiser's
        latent, error = found(EDICT(p), denoiser, sampler, target, noise)
        assert error < bound
    assert found(DDIMInversion(), Rough(), sampler, target, noise)[1] > 0.05  # of which nothing else is true
    assert latent.shape == (4, 2, 2)


def test_float32_images_come_back_too(mixture, target, noise, ddim):
    latent, error = found(EDICT(), mixture, ddim(20), target.float(), noise)
    assert latent.dtype == torch.float64
    assert error < 1e-10


def test_with_equal_states_and_one_step_it_is_ddim_with_its_own_mixture(mixture, noise, target):
    """One step from x = y: x' is DDIM's, y' takes eps at x'. Written out with the published coefficients."""
    path = VariancePreserving()
    sampler = DDIM(path, [0.6, 0.5])
    (a_t, s_t), (a_s, s_s) = path(0.6), path(0.5)
    x = target

    def eps(v):
        return (v - a_t * mixture(v, a_t, s_t)) / s_t

    a, b = a_s / a_t, s_s - s_t * a_s / a_t
    inner = sampler(mixture, noise, start=x)
    other = a * x + b * eps(inner)
    expected = 0.93 * inner + 0.07 * other
    torch.testing.assert_close(
        EDICT().image(mixture, sampler, torch.stack([x, x], 1), noise), expected, rtol=1e-11, atol=1e-11
    )


def test_with_more_steps_it_tends_to_ddim(mixture, noise):
    gaps = []
    for steps in (50, 100, 200):
        sampler = DDIM(VariancePreserving(), Uniform(end=0.01, zero=False), steps)
        x = noise(0)
        pair = torch.stack([x, x], 1)
        gaps.append(
            float((EDICT().image(mixture, sampler, pair, noise) - sampler(mixture, noise, start=x)).abs().max())
        )
    assert gaps[2] < 0.6 * gaps[1] < 0.6 * 0.7 * gaps[0]


def test_mistakes(mixture, target, noise, ddim):
    with pytest.raises(ValueError, match="need 0 < p <= 1, got 0"):
        EDICT(0)
    with pytest.raises(ValueError, match="edict inverts deterministic DDIM, got eta=1"):
        EDICT()(mixture, ddim(5, 1.0), target, noise)
    with pytest.raises(ValueError, match="edict divides by alpha, which is 0 where this grid starts"):
        EDICT()(mixture, DDIM(ConditionalOT(), Uniform(), 5), target, noise)
    with pytest.raises(FloatingPointError, match="the pair found is not finite"):
        EDICT()(mixture, ddim(5), target * torch.nan, noise)
