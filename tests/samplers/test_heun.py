"""Heun against EDM's Algorithm 2 written out, and Euler against DDIM."""

import math
from itertools import pairwise

import pytest
import torch

from steadyflow.denoisers import CountedDenoiser, GaussianMixture
from steadyflow.grids import Karras, LogSNR, Uniform
from steadyflow.noise import NoiseSource
from steadyflow.paths import EDM, ConditionalOT, VariancePreserving
from steadyflow.samplers import DDIM, Euler, Heun

F64 = torch.float64


def edm_algorithm_2(denoise, x, sigmas, noise, churn, low, high, s_noise):
    """Karras et al. 2022, Algorithm 2, line by line. denoise(x, sigma)."""
    n = len(sigmas) - 1
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        gamma = min(churn / n, math.sqrt(2) - 1) if low <= sigma <= high else 0.0
        hat = sigma + gamma * sigma
        x_hat = x + math.sqrt(hat**2 - sigma**2) * s_noise * noise(i + 1)
        d = (x_hat - denoise(x_hat, hat)) / hat
        x = x_hat + (following - hat) * d
        if following != 0:
            x = x_hat + (following - hat) * (0.5 * d + 0.5 * (x - denoise(x, following)) / following)
    return x


@pytest.mark.parametrize(
    "churn", [(0, 0, math.inf, 1), (30, 0.05, 50, 1.003), (4, 0, 9, 1)]
)  # S_churn, tmin, tmax, noise
def test_on_the_edm_path_it_is_edms_algorithm(churn, ring):
    noise = NoiseSource(0, range(6), (2,), dtype=F64)
    n = 18
    sigmas = [(80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)] + [0.0]
    one = torch.tensor(1.0, dtype=F64)
    counted = CountedDenoiser(ring)
    sampler = Heun(EDM(80.0), Karras(), n, *churn)
    expected = edm_algorithm_2(
        lambda x, sigma: ring(x, one, torch.tensor(sigma, dtype=F64)), 80 * noise(0), sigmas, noise, *churn
    )
    torch.testing.assert_close(sampler(counted, noise), expected, rtol=1e-9, atol=1e-9)
    assert counted.rows == 6 * (2 * n - 1)


def test_on_straight_paths_it_is_exact_on_a_dirac_distribution():
    point = torch.tensor([[0.7, -1.4]], dtype=F64)
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    for path in (EDM(), ConditionalOT()):
        for s in (0.2, 0.0):
            t, s = torch.tensor([1.0, s], dtype=F64)
            (a_t, s_t), (a_s, s_s) = path(t), path(s)
            out = Heun(path, [1.0, 0.0]).step(GaussianMixture(point, [0.0]), a_t * point + s_t * z, t, s)
            torch.testing.assert_close(out, a_s * point + s_s * z, rtol=1e-12, atol=1e-12)


def test_a_batch_of_mixed_last_steps_counts_what_it_needs(ring):
    sampler = Heun(VariancePreserving(), [1.0, 0.0])
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    t, s = torch.tensor([[0.5, 0.1, 0.9, 0.2], [0.3, 0.0, 0.5, 0.0]], dtype=F64)
    counted = CountedDenoiser(ring)
    out = sampler.step(counted, x, t, s)
    assert counted.rows == 2 * 2 + 2 * 1
    for i in range(4):
        torch.testing.assert_close(out[i : i + 1], sampler.step(ring, x[i : i + 1], t[i], s[i]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", [VariancePreserving(), ConditionalOT()], ids=lambda path: type(path).__name__)
def test_churn_keeps_the_marginal_law(path):
    """One churned step on N(0, 1) data, where the flow is linear: the variance at s, up to the step's own error."""
    data = GaussianMixture([[0.0]], [1.0])
    t, s = torch.tensor([0.6, 0.58], dtype=F64)
    variance = {}
    for churn in (0.0, 0.3):
        sampler = Heun(path, [1.0, 0.0], churn=churn)
        one, zero = torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)
        from_x = sampler.step(data, one, t, s, zero if churn else None)
        from_z = sampler.step(data, zero, t, s, one) if churn else zero
        (a_t, s_t), (a_s, s_s) = path(t), path(s)
        variance[churn] = float(from_x**2 * (a_t**2 + s_t**2) + from_z**2)
        assert variance[churn] == pytest.approx(float(a_s**2 + s_s**2), rel=2e-3)
        assert (float(from_z) > 0.1) == (churn > 0)


def test_churn_stops_at_the_end_of_the_path(ring):
    """No time beyond t = 1: a churned first step is the plain one, finite where the ratio is infinite."""
    noise = torch.ones(3, 2, dtype=F64)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    t, s = torch.tensor([1.0, 0.7], dtype=F64)
    for path in (ConditionalOT(), EDM(), VariancePreserving()):
        churned = Heun(path, [1.0, 0.0], churn=10.0).step(ring, x, t, s, noise)
        torch.testing.assert_close(churned, Heun(path, [1.0, 0.0]).step(ring, x, t, s), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("path", [EDM(), ConditionalOT()], ids=lambda path: type(path).__name__)
def test_euler_is_ddim_on_straight_paths(path, ring):
    noise = NoiseSource(0, range(6), (2,), dtype=F64)
    torch.testing.assert_close(
        Euler(path, Uniform(), 10)(ring, noise), DDIM(path, Uniform(), 10)(ring, noise), rtol=1e-9, atol=1e-9
    )


def test_eulers_last_step_is_the_denoiser(ring):
    path = VariancePreserving()
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    t, s = torch.tensor([0.01, 0.0], dtype=F64)
    torch.testing.assert_close(Euler(path, LogSNR(), 5).step(ring, x, t, s), ring(x, *path(t)), rtol=1e-12, atol=0)


def test_options_out_of_range_are_refused():
    for options in ({"churn": -1.0}, {"churn_noise": 0.0}, {"churn_min": 2.0, "churn_max": 1.0}):
        with pytest.raises(ValueError, match="need churn"):
            Heun(EDM(), Karras(), 5, **options)
