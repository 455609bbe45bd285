"""The variational bound: tight where the chain is the reversal of the noising, a distribution over images' levels."""

import math

import pytest
import torch

from steadyflow.denoisers import CountedDenoiser, EpsDenoiser, Gaussian
from steadyflow.grids import Indices, LogSNR
from steadyflow.noise import NoiseSource
from steadyflow.paths import DiscreteVariancePreserving, VariancePreserving
from steadyflow.samplers import DDPM, VariationalBound
from steadyflow.samplers.variational_bound import _decoder

F64 = torch.float64
VP = VariancePreserving(0.1, 40.0)  # alpha(1) = 4e-5


class Unit(Gaussian):
    """Of x_0 ~ N(0, I), for which the variance `large` of a step is the true one, and v of choice."""

    def __init__(self, v):
        super().__init__([0.0, 0.0], 1.0)
        self.v = v

    def with_variance(self, x, alpha, sigma, **condition):
        return self(x, alpha, sigma), torch.full_like(x, self.v)


def test_it_is_the_likelihood_where_the_chain_reverses_the_noising():
    """Then E_q log p(x_0, x_t, ...) / q(x_t, ... | x_0) = log p(x_0), for any number of steps; elsewhere it is less."""
    count, point = 20000, torch.tensor([[0.5, -1.2]], dtype=F64)
    noise = NoiseSource(0, range(count), (2,), dtype=F64)
    exact = float(torch.distributions.Normal(0.0, 1.0).log_prob(point).sum())
    for steps in (3, 8):
        bound = VariationalBound(VP, LogSNR(), steps, variance="learned")  # vectors are not clipped
        tight, loose = (bound(Unit(v), point.expand(count, 2), noise) for v in (1.0, 0.5))
        error = float(tight.std()) / count**0.5
        assert abs(float(tight.mean()) - exact) < 4 * error < 0.1
        assert float(loose.mean()) < exact - 0.1


@pytest.mark.parametrize(("mean", "std"), [(0.1, 0.003), (-0.999, 0.02), (0.4, 1e-4), (3.0, 0.5)])
def test_the_levels_of_an_image_share_a_probability_of_1(mean, std):
    levels = torch.arange(256, dtype=F64).reshape(-1, 1, 1, 1) / 127.5 - 1
    log_p = _decoder(levels, torch.full_like(levels, mean), torch.full_like(levels, math.log(std)))
    assert float(log_p.logsumexp(0)) == pytest.approx(0, abs=1e-9)
    assert log_p.isfinite().all()


def test_learned_variances_lie_between_small_and_large():
    noise = NoiseSource(1, range(4), (2,), dtype=F64)
    made = {v: DDPM(VP, LogSNR(), 5, "learned")(Unit(v), noise) for v in (0.0, 0.5, 1.0)}
    for v, variance in ((0.0, "small"), (1.0, "large")):
        fixed = DDPM(VP, LogSNR(), 5, variance)(Unit(v), noise)
        torch.testing.assert_close(made[v], fixed, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(made[0.5], made[0.0])


def test_a_network_of_twice_the_channels_predicts_its_variance():
    torch.manual_seed(0)
    path, noise = DiscreteVariancePreserving(1e-3, 0.2, 40), NoiseSource(2, range(3), (1, 4, 4), dtype=F64)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 2, 3, padding=1, dtype=F64)

        def forward(self, x, t):
            return torch.cat([x, 0 * x], 1) + 0.1 * self.conv(x) * (t / 40).reshape(-1, 1, 1, 1)

    denoiser = CountedDenoiser(EpsDenoiser(Network().requires_grad_(False), path, (40, -1)))
    x, (alpha, sigma) = noise(0), path(torch.tensor(0.5))
    x0, v = denoiser.with_variance(x, alpha, sigma)
    assert torch.equal(x0, denoiser(x, alpha, sigma))
    assert denoiser.rows == 6
    torch.testing.assert_close(2 * v - 1, denoiser.denoiser.network(x, torch.full((3,), 19.0, dtype=F64))[:, 1:])
    images, fractions = (noise(5).clamp(-1, 1) * 127.5).round() / 127.5, []
    bound = VariationalBound(path, Indices(train_steps=40), 40, "learned")
    found = bound(denoiser, images, noise, progress=fractions.append)
    assert fractions == pytest.approx([(k + 1) / 40 for k in range(40)])
    torch.testing.assert_close(bound(denoiser, images[1:2], NoiseSource(2, [1], (1, 4, 4), dtype=F64)), found[1:2])


def test_mistakes_are_named():
    x = torch.zeros(1, 2, dtype=F64)
    with pytest.raises(ValueError, match="Gaussian predicts no variance; choose variance=small or large"):
        DDPM(VP, LogSNR(), 3, "learned")(Gaussian([0.0, 0.0], 1.0), NoiseSource(0, [0], (2,)), start=x)
    for steps, options, message in (
        (1, {}, "got 1 to 0"),
        (9, {"zero": False}, r"steps down to sigma = 0, got 9 to 0\.01"),
    ):
        with pytest.raises(ValueError, match=message):
            VariationalBound(VP, LogSNR(**options), steps)
    with pytest.raises(ValueError, match="clip must be true or false, got 'maybe'"):
        VariationalBound(VP, LogSNR(), 9, clip="maybe")
