"""The denoising loss against closed forms: weights, conversions between predictions, minima, mutual information."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from steadyflow import paths
from steadyflow.denoisers import (
    EDMDenoiser,
    EpsDenoiser,
    GaussianMixture,
    ScoreDenoiser,
    VDenoiser,
    VelocityDenoiser,
    X0Denoiser,
)
from steadyflow.modules import losses
from steadyflow.modules.losses import denoising_loss

PREDICTIONS = [EpsDenoiser, X0Denoiser, VDenoiser, ScoreDenoiser, VelocityDenoiser, EDMDenoiser]
PATHS = [
    paths.VariancePreserving(),
    paths.DiscreteVariancePreserving(),
    paths.Cosine(),
    paths.VarianceExploding(),
    paths.EDM(),
    paths.ConditionalOT(),
]
WEIGHTS = [losses.SNR(), losses.MinSNR(5.0), losses.EDMWeight(0.5), losses.Likelihood()]
T = torch.linspace(0.013, 0.987, 41, dtype=torch.float64)


def name(value):
    return type(value).__name__ if not isinstance(value, type) else value.__name__


class Implied(nn.Module):
    """A network of any prediction whose implied denoiser is a given function x0(x, alpha, sigma)."""

    def __init__(self, x0):
        super().__init__()
        self.x0 = x0
        self.wrapper = []  # in a list: the wrapper holds this module, which must not hold the wrapper

    def forward(self, x, t):
        denoiser = self.wrapper[0]
        path = denoiser.path
        if isinstance(denoiser, EDMDenoiser):  # gets c_in x / alpha and log(rho) / 4
            t = path.time_at(torch.exp(4 * t))
        alpha, sigma = (v.unsqueeze(1) for v in path(t))
        if isinstance(denoiser, EDMDenoiser):
            x = x * alpha * torch.sqrt((sigma / alpha) ** 2 + denoiser.sigma_data**2)
        x0 = self.x0(x, alpha, sigma)
        return denoiser.target(x0, (x - alpha * x0) / sigma, t)


def implied(prediction, path, x0):
    network = Implied(x0)
    denoiser = prediction(network, path)
    network.wrapper.append(denoiser)
    return denoiser


def scale(prediction, path, t):
    """d x_0 / d output of each prediction, written out."""
    (a, s), (da, ds) = path(t), path.derivative(t)
    rho = s / a
    return {
        EpsDenoiser: -s / a,
        X0Denoiser: torch.ones_like(t),
        VDenoiser: -s / (a**2 + s**2),
        ScoreDenoiser: s**2 / a,
        VelocityDenoiser: -s / (ds * a - s * da),
        EDMDenoiser: rho * 0.5 / torch.sqrt(rho**2 + 0.25),
    }[prediction]


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=name)
def test_at_the_exact_denoiser_of_a_gaussian_the_loss_is_its_known_minimum(prediction, path):
    """x_0 ~ N(0, c): min E|x_0 - D|^2 = c sigma^2 / (alpha^2 c + sigma^2) in each entry, in x_0 space."""
    c = 0.7
    denoiser = implied(prediction, path, lambda x, a, s: a * c / (a**2 * c + s**2) * x)
    one, zero = torch.ones(len(T), 3, dtype=torch.float64), torch.zeros(len(T), 3, dtype=torch.float64)
    alpha, sigma = path(T)
    minimum = c * sigma**2 / (alpha**2 * c + sigma**2)

    def expected(weight):  # the error is linear in (x_0, eps), so its mean square is the sum over unit directions
        return denoising_loss(denoiser, math.sqrt(c) * one, zero, T, weight) + denoising_loss(
            denoiser, zero, one, T, weight
        )

    for weight in WEIGHTS:
        torch.testing.assert_close(expected(weight), weight.on_x0(path, T) * minimum, rtol=1e-8, atol=0)
    k = scale(prediction, path, T)
    torch.testing.assert_close(expected(losses.Constant()), minimum / k**2, rtol=1e-8, atol=0)


@pytest.mark.parametrize("path", PATHS, ids=name)
@pytest.mark.parametrize("prediction", PREDICTIONS, ids=name)
def test_a_weight_gives_the_same_loss_and_gradient_whatever_is_predicted(prediction, path):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x0, eps = torch.randn(2, len(T), 3, dtype=torch.float64)
    for weight in WEIGHTS:
        found = []
        for kind in (X0Denoiser, prediction):
            denoiser = implied(kind, path, lambda x, a, s: body(x / (a + s)))
            loss = denoising_loss(denoiser, x0, eps, T, weight)
            found.append((loss.detach(), *torch.autograd.grad(loss.sum(), list(body.parameters()))))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * float(a.abs().max()))


def test_eps_loss_is_x0_loss_times_snr():
    """w |eps - eps_hat|^2 = w alpha^2 / sigma^2 |x_0 - D|^2, here with the factor put in by hand."""
    torch.manual_seed(0)
    path, body = paths.VariancePreserving(), nn.Linear(3, 3).double()
    x0, eps = torch.randn(2, len(T), 3, dtype=torch.float64)
    alpha, sigma = path(T)
    by_eps, by_x0 = (
        denoising_loss(implied(kind, path, lambda x, a, s: body(x)), x0, eps, T, losses.Constant())
        for kind in (EpsDenoiser, X0Denoiser)
    )
    torch.testing.assert_close(by_eps, by_x0 * (alpha / sigma) ** 2, rtol=1e-9, atol=0)


def test_weights_that_are_the_constant_one_in_disguise():
    for path in PATHS:
        one = torch.ones_like(T)
        torch.testing.assert_close(losses.SNR()(EpsDenoiser(nn.Identity(), path), T), one)
        torch.testing.assert_close(losses.MinSNR(math.inf)(EpsDenoiser(nn.Identity(), path), T), one)
        torch.testing.assert_close(losses.EDMWeight(0.5)(EDMDenoiser(nn.Identity(), path, 0.5), T), one)


@pytest.mark.parametrize("path", PATHS, ids=name)
def test_likelihood_weight_integrates_to_the_mutual_information(path):
    """I-MMSE: 1/2 int mmse dSNR = I(x_0; x_t) between the ends, 1/2 log(1 + c SNR) for a Gaussian (Guo et al. 2005)."""
    c = 0.7
    denoiser = implied(EpsDenoiser, path, lambda x, a, s: a * c / (a**2 * c + s**2) * x)
    knots = torch.arange(0.1, 0.9001, 1e-3, dtype=torch.float64)  # with the discrete path's own knots
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(4))
    t = (knots[:-1, None] + (nodes + 1) * 5e-4).flatten()
    one, zero = torch.ones(len(t), 1, dtype=torch.float64), torch.zeros(len(t), 1, dtype=torch.float64)
    rate = denoising_loss(denoiser, math.sqrt(c) * one, zero, t, losses.Likelihood()) + denoising_loss(
        denoiser, zero, one, t, losses.Likelihood()
    )
    integral = (rate.reshape(-1, 4) * weights * 5e-4).sum()
    (a0, s0), (a1, s1) = path(knots[0]), path(knots[-1])
    expected = 0.5 * torch.log((1 + c * (a0 / s0) ** 2) / (1 + c * (a1 / s1) ** 2))
    torch.testing.assert_close(integral, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("prediction", [EpsDenoiser, VelocityDenoiser, EDMDenoiser], ids=name)
def test_what_a_loss_exceeds_its_minimum_by_is_the_distance_from_the_exact_denoiser(prediction):
    """Pythagoras: E w |f - x_0|^2 - E w |D - x_0|^2 = E w |f - D|^2, D the posterior mean; on a Gaussian mixture."""
    torch.manual_seed(0)
    path, weight, n = paths.Cosine(), losses.MinSNR(5.0), 40_000
    means = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]], dtype=torch.float64)
    exact = GaussianMixture(means, torch.tensor([0.1, 0.2, 0.05]), torch.tensor([0.5, 0.3, 0.2]))
    modes = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), n, replacement=True)
    std = torch.tensor([0.1, 0.2, 0.05], dtype=torch.float64)[modes].sqrt().unsqueeze(1)
    x0 = means[modes] + std * torch.randn(n, 2, dtype=torch.float64)
    eps, t = torch.randn(n, 2, dtype=torch.float64), 0.02 + 0.96 * torch.rand(n, dtype=torch.float64)

    def other(x, a, s):
        return 0.8 * torch.tanh(x / (a + s))

    def ideal(x, a, s):
        return exact(x, a.squeeze(1), s.squeeze(1))

    gap = denoising_loss(implied(prediction, path, other), x0, eps, t, weight) - denoising_loss(
        implied(prediction, path, ideal), x0, eps, t, weight
    )
    alpha, sigma = path(t)
    x = alpha.unsqueeze(1) * x0 + sigma.unsqueeze(1) * eps
    distance = other(x, alpha[:, None], sigma[:, None]) - exact(x, alpha, sigma)
    distance = weight.on_x0(path, t) * distance.square().mean(1)
    difference = gap - distance
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(n)
    assert distance.mean() > 20 * difference.std() / math.sqrt(n)  # so the line above compares something


def test_times_have_the_distributions_they_say():
    u = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vp = paths.VariancePreserving()
    t = losses.UniformTimes(0.2, 0.9)(vp, u).numpy()
    assert stats.kstest(t, stats.uniform(0.2, 0.7).cdf).pvalue > 1e-3
    t = losses.LogitNormalTimes(-0.5, 0.8)(vp, u).numpy()
    assert stats.kstest(np.log(t / (1 - t)), stats.norm(-0.5, 0.8).cdf).pvalue > 1e-3
    alpha, sigma = vp(losses.LogNormalRatioTimes(-1.2, 1.2)(vp, u))
    assert stats.kstest(torch.log(sigma / alpha).numpy(), stats.norm(-1.2, 1.2).cdf).pvalue > 1e-3


def test_times_stay_on_the_path_at_the_extremes():
    u = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for times in (losses.UniformTimes(), losses.LogitNormalTimes(), losses.LogNormalRatioTimes(2.0, 3.0)):
        for path in PATHS:
            t = times(path, u)
            assert ((t >= 0) & (t <= 1)).all()
            assert t[0] < t[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: losses.UniformTimes(0.5, 0.5), "0 <= start < end <= 1"),
        (lambda: losses.LogitNormalTimes(std=0), "std > 0"),
        (lambda: losses.LogNormalRatioTimes(std=-1), "std > 0"),
        (lambda: losses.MinSNR(0), "gamma > 0"),
        (lambda: losses.EDMWeight(-0.5), "sigma_data > 0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
