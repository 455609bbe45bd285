"""Stochastic samplers reach the exact marginal law, tested without and with random numbers."""

import math

import numpy as np
import pytest
import torch

from steadyflow.denoisers import Gaussian, GaussianMixture
from steadyflow.grids import LogSNR
from steadyflow.paths import ConditionalOT, VariancePreserving
from steadyflow.samplers import DDIM, DDPM

F64 = torch.float64
BUILDS = {
    "ddpm small": lambda path, times: DDPM(path, times),
    "ddpm large": lambda path, times: DDPM(path, times, variance="large"),
    "ddim eta 1": lambda path, times: DDIM(path, times, eta=1.0),
    "ddim eta 0.5": lambda path, times: DDIM(path, times, eta=0.5),
}
every_build = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())


def transported(sampler, denoiser, x, p):
    """The density of the sampler's output on the nodes x (M,), from the density p of its start.

    One step is a Gaussian transition kernel N(mean(x), std^2), read off the step with z = 0 and z = 1; the
    Chapman-Kolmogorov integral is the trapezoidal rule, which converges faster than any power for these integrands.
    """
    h = x[1] - x[0]
    zero = torch.zeros_like(x[:, None])
    for t, s in zip(sampler.times[:-1], sampler.times[1:], strict=True):
        mean = sampler.step(denoiser, x[:, None], t, s, zero)[:, 0]
        std = (sampler.step(denoiser, x[:1, None], t, s, zero[:1] + 1)[:, 0] - mean[:1]).item()
        kernel = torch.exp(-((x[:, None] - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi))
        p = h * kernel @ p
    return p


@every_build
@pytest.mark.parametrize("path", [VariancePreserving(), ConditionalOT()], ids=lambda path: type(path).__name__)
def test_density_of_a_mixture_converges_weakly_with_order_one(build, path):
    """No random numbers: total variation between the exact output law and the marginal, in one dimension."""
    mixture = GaussianMixture([[-1.0], [1.2]], [0.05, 0.1], [0.3, 0.7])
    x = torch.linspace(-6, 6, 601, dtype=F64)
    grid = LogSNR(start=0.98, end=float(path.time_at(0.25)), zero=False)
    steps, errors = [20, 40, 80], []
    for n in steps:
        sampler = build(path, grid(path, n))
        start, end = (mixture.log_prob(x[:, None], *path(t)).exp() for t in (sampler.times[0], sampler.times[-1]))
        difference = (transported(sampler, mixture, x, start) - end) * (x[1] - x[0])
        assert difference.sum().abs() < 1e-6  # mass is kept, so the quadrature is fine enough
        errors.append(0.5 * float(difference.abs().sum()))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 0.85 <= slope <= 1.3, (slope, errors)
    assert errors[-1] < 0.03, errors


@pytest.mark.parametrize(("variance", "data"), [("small", 0.0), ("large", 1.0)])
def test_ddpm_variance_is_exact_for_the_law_it_is_made_for(variance, data):
    """small: one data point; large: N(0, 1) data on VP. There the reverse kernel is Gaussian with that variance."""
    path = VariancePreserving()
    sampler = DDPM(path, [1.0, 0.6, 0.4, 0.1], variance=variance)
    denoiser = Gaussian([0.3 * (1 - data)], data)
    t, s = sampler.times[1:3]
    (a_t, s_t), (a_s, s_s) = path(t), path(s)
    x = torch.tensor([[-1.0], [2.0]], dtype=F64)
    mean = sampler.step(denoiser, x, t, s, torch.zeros_like(x))
    std = sampler.step(denoiser, x, t, s, torch.ones_like(x)) - mean
    # joint law of (x_s, x_t): variances a^2 data + sigma^2, covariance a_t / a_s Var(x_s)
    v_t, v_s = a_t**2 * data + s_t**2, a_s**2 * data + s_s**2
    gain = a_t / a_s * v_s / v_t
    m = 0.3 * (1 - data)
    torch.testing.assert_close(mean, a_s * m + gain * (x - a_t * m), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(std, torch.full_like(x, math.sqrt(v_s - gain**2 * v_t)), rtol=1e-12, atol=0)


@every_build
def test_moments_on_the_ring(build, ring):
    """200 steps, 4000 samples: mean, covariance and modes' weights within four standard errors and the order-1 bias."""
    path = VariancePreserving()
    sampler = build(path, LogSNR(end=1e-2, zero=False)(path, 200))
    g = torch.Generator().manual_seed(0)
    count = 4000
    x = sampler.path(sampler.times[0])[1] * torch.randn(count, 2, generator=g, dtype=F64)
    for t, s in zip(sampler.times[:-1], sampler.times[1:], strict=True):
        x = sampler.step(ring, x, t, s, torch.randn(count, 2, generator=g, dtype=F64))
    alpha, sigma = (float(v) for v in path(1e-2))
    variance = alpha**2 * (2.0**2 / 2 + 0.3**2) + sigma**2  # of each coordinate
    bias = 0.01 * variance
    assert x.mean(0).abs().max() < 4 * math.sqrt(variance / count) + bias
    fourth = float(x.pow(4).mean())
    error = 4 * math.sqrt((fourth - variance**2) / count) + bias
    assert (torch.cov(x.T) - variance * torch.eye(2, dtype=F64)).abs().max() < error
    mode = torch.round(torch.atan2(x[:, 1], x[:, 0]) / (2 * math.pi / 8)).long() % 8
    share = torch.bincount(mode, minlength=8) / count
    assert (share - 1 / 8).abs().max() < 4 * math.sqrt(7 / 64 / count) + 0.01
