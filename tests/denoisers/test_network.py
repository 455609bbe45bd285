"""Wrapped networks: whatever an exact network predicts, on whatever path, the wrapper gives the same denoiser."""

import math

import pytest
import torch
from torch import nn

from steadyflow.denoisers import (
    CountedDenoiser,
    Denoiser,
    EDMDenoiser,
    EpsDenoiser,
    GaussianMixture,
    NetworkDenoiser,
    ScoreDenoiser,
    VDenoiser,
    VelocityDenoiser,
    X0Denoiser,
    denoise_and_pull,
)
from steadyflow.paths import (
    EDM,
    ConditionalOT,
    Cosine,
    DiscreteVariancePreserving,
    GaussianPath,
    VarianceExploding,
    VariancePreserving,
)

PATHS = [
    VariancePreserving(),
    DiscreteVariancePreserving(),
    Cosine(),
    VarianceExploding(0.002, 80.0),
    EDM(),
    ConditionalOT(),
]
WRAPPERS = [EpsDenoiser, X0Denoiser, VDenoiser, ScoreDenoiser, VelocityDenoiser, EDMDenoiser]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
every_wrapper = pytest.mark.parametrize("wrapper", WRAPPERS)
S = 0.5  # EDM's sigma_data


class ExactNetwork(nn.Module):
    """What a perfectly trained network of each kind returns, from the definitions of the predictions."""

    def __init__(self, kind: type[NetworkDenoiser], exact: Denoiser, path: GaussianPath):
        super().__init__()
        self.kind, self.exact, self.path = kind, exact, path
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))  # a float64 network

    def forward(self, x, t, label=None):
        condition = {} if label is None else {"label": label}
        if self.kind is EDMDenoiser:
            rho = torch.exp(4 * t)[:, None]
            norm = torch.sqrt(rho**2 + S**2)
            y = x * norm
            x0 = self.exact(y, torch.ones_like(t), rho[:, 0], **condition)
            return (x0 - S**2 / norm**2 * y) / (rho * S / norm)
        (alpha, sigma), (dalpha, dsigma) = self.path(t), self.path.derivative(t)
        x0 = self.exact(x, alpha, sigma, **condition)
        alpha, sigma, dalpha, dsigma = (v[:, None] for v in (alpha, sigma, dalpha, dsigma))
        if self.kind is X0Denoiser:
            return x0
        if self.kind is VelocityDenoiser and (sigma > 0).all():
            return dalpha * x0 + dsigma * (x - alpha * x0) / sigma
        eps = (x - alpha * x0) / sigma
        return {EpsDenoiser: eps, VDenoiser: alpha * eps - sigma * x0, ScoreDenoiser: -eps / sigma}[self.kind]


@pytest.fixture(scope="module")
def exact():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    factor = 0.3 * torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)
    return GaussianMixture(means, factor @ factor.mT + 0.01 * torch.eye(3), [0.1, 0.2, 0.3, 0.4], labels=[0, 0, 1, 1])


def points(ratio, count=6):
    """x, alpha, sigma of noised points, off every path: alpha^2 + sigma^2 = 9."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    ratio = torch.as_tensor(ratio, dtype=torch.float64)
    alpha = 3 / torch.hypot(ratio, torch.ones_like(ratio))
    return 3 * x, alpha, ratio * alpha


@every_wrapper
@every_path
def test_every_exact_network_is_the_same_denoiser(wrapper, path, exact):
    denoiser = wrapper(ExactNetwork(wrapper, exact, path), path)
    for ratio in (0.02, 0.3, 1.0, 4.0, 45.0):
        x, alpha, sigma = points(ratio)
        torch.testing.assert_close(denoiser(x, alpha, sigma), exact(x, alpha, sigma), rtol=1e-10, atol=1e-10)
    x, alpha, sigma = points([0.02, 0.1, 0.7, 3.0, 20.0, 45.0])  # a batch of mixed times
    torch.testing.assert_close(denoiser(x, alpha, sigma), exact(x, alpha, sigma), rtol=1e-10, atol=1e-10)


@every_wrapper
@every_path
def test_only_the_pair_up_to_scale_matters(wrapper, path, exact):
    denoiser = wrapper(ExactNetwork(wrapper, exact, path), path)
    x, alpha, sigma = points([0.02, 0.1, 0.7, 3.0, 20.0, 45.0])
    expected = denoiser(x, alpha, sigma)
    for c in (1e-3, 7.0):
        torch.testing.assert_close(denoiser(c * x, c * alpha, c * sigma), expected, rtol=1e-10, atol=1e-10)


@every_wrapper
@every_path
def test_target_and_to_x0_are_inverse(wrapper, path):
    denoiser = wrapper(nn.Identity(), path)
    generator = torch.Generator().manual_seed(2)
    x0, eps = torch.randn(2, 50, 3, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.02, 0.98, 50, dtype=torch.float64)
    alpha, sigma = (v[:, None] for v in path(t))
    back = denoiser.to_x0(denoiser.target(x0, eps, t), alpha * x0 + sigma * eps, t)
    torch.testing.assert_close(back, x0, rtol=1e-9, atol=1e-10 * float((sigma / alpha).max()))


class Fixed(nn.Module):
    """A network that returns given numbers and keeps what it was given."""

    def __init__(self, output):
        super().__init__()
        self.answer = output

    def forward(self, x, t, **condition):
        self.given = (x, t, condition)
        return self.answer.to(x)


@pytest.mark.parametrize("wrapper", [EpsDenoiser, VDenoiser, ScoreDenoiser, VelocityDenoiser, EDMDenoiser])
@pytest.mark.parametrize("path", [p for p in PATHS if p(0.0)[1] == 0], ids=lambda path: type(path).__name__)
def test_without_noise_the_state_is_the_sample_whatever_the_network_says(wrapper, path):
    x = torch.tensor([[0.3, -2.0, 1.0]], dtype=torch.float64)
    denoiser = wrapper(Fixed(torch.full((1, 3), 5.0)), path)
    alpha, sigma = torch.tensor([2.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(denoiser(x, alpha, sigma), x / 2, rtol=1e-13, atol=0)


@pytest.mark.parametrize("wrapper", [X0Denoiser, VDenoiser, VelocityDenoiser])
def test_without_signal_the_denoiser_is_the_mean(wrapper, exact):
    path = ConditionalOT()
    denoiser = wrapper(ExactNetwork(wrapper, exact, path), path)
    mean = (exact.log_weights.exp()[:, None] * _means(exact)).sum(0)
    zero, one = torch.tensor([0.0, 1.0], dtype=torch.float64)
    x = points(1.0)[0]
    torch.testing.assert_close(denoiser(x, zero, one), mean.expand(6, 3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrapper", [EpsDenoiser, ScoreDenoiser])
@pytest.mark.parametrize("path", [ConditionalOT(), Cosine()])
def test_noise_predictions_stop_at_their_largest_ratio(wrapper, path, exact):
    """There x_0 = (x - sigma eps) / alpha would divide by zero."""
    denoiser = wrapper(ExactNetwork(wrapper, exact, path), path)
    x = points(1.0)[0]
    expected = exact(x * (1 + 1e-3), *torch.tensor([1e-3, 1.0], dtype=torch.float64))
    zero, one = torch.tensor([0.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(denoiser(x, zero, one), expected, rtol=1e-9, atol=1e-9)


def test_a_ratio_beyond_the_path_is_evaluated_at_its_end(exact):
    path = VarianceExploding(0.1, 50.0)
    denoiser = EpsDenoiser(ExactNetwork(EpsDenoiser, exact, path), path)
    for ratio, end in ((200.0, 50.0), (0.01, 0.1)):
        x, alpha, sigma = points(ratio)
        scale = (1 + end) / (alpha + sigma)
        expected = exact(x * scale, *torch.tensor([1.0, end], dtype=torch.float64))
        torch.testing.assert_close(denoiser(x, alpha, sigma), expected, rtol=1e-10, atol=1e-10)


def test_label_reaches_the_network(exact):
    path = VariancePreserving()
    denoiser = EpsDenoiser(ExactNetwork(EpsDenoiser, exact, path), path)
    x, alpha, sigma = points([0.3] * 6)
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    torch.testing.assert_close(
        denoiser(x, alpha, sigma, label=label), exact(x, alpha, sigma, label=label), rtol=1e-10, atol=1e-10
    )
    assert (denoiser(x, alpha, sigma, label=label) - denoiser(x, alpha, sigma)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("own", "time"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_a_network_runs_in_its_own_precision_under_a_float64_state(own, time):
    network = Fixed(torch.tensor([[0.1, 0.2, 0.3]]))
    network.weight = nn.Parameter(torch.zeros(1, dtype=own))
    path = VariancePreserving()
    x, alpha, sigma = points(2.0, 1)
    out = X0Denoiser(network, path)(x, alpha, sigma)
    given, t, _ = network.given
    assert (given.dtype, t.dtype, out.dtype) == (own, time, torch.float64)
    assert float(t[0]) == pytest.approx(float(path.time_at(2.0)), rel=1e-6)
    assert out[0].tolist() == torch.tensor([0.1, 0.2, 0.3]).to(own).tolist()


def test_a_predicted_variance_is_left_out():
    output = torch.arange(2 * 6 * 2 * 2, dtype=torch.float32).reshape(2, 6, 2, 2)
    denoiser = X0Denoiser(Fixed(output), VariancePreserving())
    x = torch.zeros(2, 3, 2, 2)
    one = torch.tensor(1.0, dtype=torch.float64)
    assert torch.equal(denoiser(x, one, one), output[:, :3])


def test_edm_network_sees_unit_variance_inputs_and_log_noise():
    network, path = Fixed(torch.zeros(1, 3)), EDM()
    x, alpha, sigma = points(3.0, 1)
    EDMDenoiser(network, path, sigma_data=0.5)(x, alpha, sigma)
    given, t, _ = network.given
    torch.testing.assert_close(given, x / alpha / math.hypot(3.0, 0.5), rtol=1e-12, atol=0)
    assert float(t[0]) == pytest.approx(math.log(3.0) / 4, rel=1e-6)
    with pytest.raises(ValueError, match="sigma_data > 0"):
        EDMDenoiser(network, path, sigma_data=0.0)


@pytest.mark.parametrize("size", [1e-8, 1e6])
def test_a_pullback_through_float16_neither_overflows_nor_vanishes(size):
    """(v - sigma W^T v) / alpha is J^T v of x_0 = (x - sigma W x) / alpha, with v beyond float16 or far below."""
    torch.manual_seed(0)
    path, t = VariancePreserving(), torch.tensor(0.9, dtype=torch.float64)
    network = nn.Sequential(nn.Linear(4, 4, bias=False)).half()
    network.forward = lambda x, t: network[0](x)
    v = size * torch.randn(3, 4) * torch.tensor([[1.0], [1e3], [0.0]])
    _, pull = denoise_and_pull(EpsDenoiser(network, path), torch.randn(3, 4), *path(t))
    alpha, sigma = (float(c) for c in path(t))
    expected = (v - sigma * v @ network[0].weight.detach().float()) / alpha
    for found, want in zip(pull(v), expected, strict=True):
        assert (found - want).norm() <= 2e-3 * want.norm()


def test_counted_denoiser_counts_rows(exact):
    counted = CountedDenoiser(exact)
    x, alpha, sigma = points(1.0)
    assert torch.equal(counted(x, alpha, sigma), exact(x, alpha, sigma))
    counted(x[:2], alpha, sigma)
    assert counted.rows == 8


def _means(mixture):
    return (mixture.basis @ mixture.means.unsqueeze(2)).squeeze(2)
