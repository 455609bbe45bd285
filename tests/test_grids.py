"""Time grids: each rule against its formula, and what every rule promises on every path."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from steadyflow.grids import Indices, Karras, LogSNR, Power, Quadratic, Uniform, Variances
from steadyflow.paths import (
    EDM,
    ConditionalOT,
    Cosine,
    DiscreteVariancePreserving,
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
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)


@every_path
@pytest.mark.parametrize("grid", [Uniform, Power, Quadratic, LogSNR, Karras, Indices, Variances])
def test_every_grid_falls_from_its_start_to_zero_on_every_path(grid, path):
    for steps in (2, 3, 18, 200):
        times = grid()(path, steps)
        assert times.dtype == torch.float64
        assert len(times) == steps + 1
        assert (times.diff() < 0).all()
        assert times[0] <= 1
        assert times[-1] == 0


@every_path
@pytest.mark.parametrize("grid", [Uniform, Power, Quadratic, LogSNR])
def test_interval_grids_end_where_they_are_told(grid, path):
    times = grid(start=0.9, end=0.02, zero=False)(path, 10)
    assert times[[0, -1]].tolist() == pytest.approx([0.9, 0.02], rel=1e-9)
    closed = grid(start=0.9, end=0.02)(path, 11)
    torch.testing.assert_close(closed[:-1], times, rtol=1e-12, atol=0)  # the same nodes, then t = 0
    assert grid(start=0.9, end=0.02)(path, 1).tolist() == pytest.approx([0.9, 0.0], rel=1e-9)


def test_uniform_and_power_formulas():
    path = VariancePreserving()
    np.testing.assert_allclose(Uniform(0.8, 0.2, zero=False)(path, 3), [0.8, 0.6, 0.4, 0.2], rtol=1e-14)
    np.testing.assert_allclose(Quadratic(1.0, 0.01, zero=False)(path, 3), np.array([1, 0.7, 0.4, 0.1]) ** 2, rtol=1e-13)
    np.testing.assert_allclose(
        Power(3.0, 1.0, 1e-3, zero=False)(path, 3), np.array([1, 0.7, 0.4, 0.1]) ** 3, rtol=1e-13
    )
    torch.testing.assert_close(Power(2.0)(path, 20), Quadratic()(path, 20), rtol=1e-13, atol=0)
    torch.testing.assert_close(Power(1.0)(path, 20), Uniform()(path, 20), rtol=1e-13, atol=0)


@every_path
def test_log_snr_steps_by_a_constant_factor(path):
    ratio = path.ratio(LogSNR(start=0.9, end=0.02, zero=False)(path, 20))
    factors = ratio[1:] / ratio[:-1]
    torch.testing.assert_close(factors, factors[:1].expand(20), rtol=1e-9, atol=0)


def test_log_snr_starts_at_max_ratio_where_the_ratio_is_infinite():
    for path in (ConditionalOT(), Cosine()):
        times = LogSNR(max_ratio=160.0)(path, 10)
        assert float(path.ratio(times[0])) == pytest.approx(160, rel=1e-9)
    assert LogSNR()(VariancePreserving(), 10)[0] == pytest.approx(1.0, abs=1e-14)  # 152 is not cut


def test_karras_is_edms_formula():
    i, n = np.arange(18), 18
    sigma = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(80 * Karras()(EDM(80.0), 18).numpy(), np.append(sigma, 0), rtol=1e-12)


@every_path
def test_karras_nodes_have_the_same_noise_to_signal_ratio_on_every_path(path):
    low, high = path.ratio(1e-6), path.ratio(1.0)
    grid = Karras(sigma_min=0.01, sigma_max=40.0, rho=5.0, zero=False)
    assert low < 0.01
    assert high > 40
    expected = 80 * grid(EDM(80.0), 12)
    torch.testing.assert_close(path.ratio(grid(path, 12)), expected, rtol=1e-9, atol=0)


def test_karras_stays_within_what_the_path_reaches():
    path = VarianceExploding(0.01, 50.0)
    times = Karras(0.002, 80.0, zero=False)(path, 5)
    assert times[[0, -1]].tolist() == pytest.approx([1, 0], abs=1e-12)
    assert torch.equal(Karras(0.002, 80.0)(path, 5), times)  # at t = 0 already: no step is left for a zero
    with pytest.raises(ValueError, match="lies outside"):
        Karras(60.0, 80.0)(path, 5)


def test_linear_indices_are_those_of_the_ddim_code():
    for steps in (10, 20, 50, 100, 1000):  # divisors of T, where its skip T // N is exact
        expected = (np.arange(0, 1000, 1000 // steps)[::-1] + 1) / 1000
        np.testing.assert_allclose(Indices()(DiscreteVariancePreserving(), steps)[:-1], expected, rtol=1e-15)
    assert len(Indices()(DiscreteVariancePreserving(), 30)) == 31  # where T // N would give 34


def test_quadratic_indices_are_those_of_the_ddim_code_where_it_repeats_none():
    for steps in (5, 10, 20):
        expected = (np.linspace(0, np.sqrt(800), steps) ** 2).astype(int)
        assert len(set(expected)) == steps
        times = Indices("quadratic")(DiscreteVariancePreserving(), steps)
        np.testing.assert_allclose(times[:-1], (expected[::-1] + 1) / 1000, rtol=1e-15)


def test_repeated_quadratic_indices_move_to_the_next_free_one():
    steps = 100
    repeated = (np.linspace(0, np.sqrt(800), steps) ** 2).astype(int)
    indices = (1000 * Indices("quadratic")(DiscreteVariancePreserving(), steps)[:-1]).round().int().numpy()[::-1] - 1
    assert len(set(repeated)) < steps == len(set(indices))
    assert (indices >= repeated).all()
    assert (indices[40:] == repeated[40:]).all()  # only the dense end moves


def test_as_many_linear_variances_as_a_schedule_has_are_that_schedule():
    times = Variances("linear", first=2e-4)(DiscreteVariancePreserving(2e-4, 0.03, 300), 300)
    np.testing.assert_allclose(times, np.arange(300, -1, -1) / 300, atol=1e-13)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("spacing", ["linear", "quadratic"])
def test_variances_are_those_of_fast_dpms_code(spacing, steps):
    """It varies the last beta, or the factor x of (1 + i x)^2 below 0.95 / (N sqrt(beta_0)), until the ends agree."""
    path, i = DiscreteVariancePreserving(), np.arange(steps)
    low, high, betas = 1e-4, 0.99, lambda last: np.linspace(1e-4, last, steps)
    if spacing == "quadratic":
        low, high, betas = 0.0, 95 / steps, lambda x: 1e-4 * (1 + i * x) ** 2
    end = np.prod(1 - np.linspace(1e-4, 0.02, 1000))

    def excess(x):
        return np.log(np.prod(1 - betas(x)) / end)

    x = high if excess(high) > 0 else brentq(excess, low, high, xtol=1e-14)
    alpha, _ = path(Variances(spacing, most=0.95 if spacing == "quadratic" else None)(path, steps)[:-1])
    np.testing.assert_allclose(alpha**2, np.cumprod(1 - betas(x))[::-1], rtol=1e-10)
    assert (x == high) == (spacing == "quadratic" and steps == 10)


@pytest.mark.parametrize("options", [{"start": 0.1, "end": 0.2}, {"start": 1.1}, {"end": -0.1}, {"end": 0.0}])
def test_ends_out_of_order_are_refused(options):
    with pytest.raises(ValueError, match="need"):
        Uniform(**options)


def test_refusals_say_what_to_do():
    with pytest.raises(ValueError, match=r"sigma = 0 at t = 0\.0; set end"):
        LogSNR(end=0.0, zero=False)(VariancePreserving(), 10)
    with pytest.raises(ValueError, match="set train_steps=100"):
        Indices()(DiscreteVariancePreserving(steps=100), 10)
    for steps in (1, 1001):
        with pytest.raises(ValueError, match=r"must lie in 2\.\.1000"):
            Indices()(DiscreteVariancePreserving(), steps)
    with pytest.raises(ValueError, match="linear or quadratic"):
        Indices("cubic")
    with pytest.raises(ValueError, match="linear or quadratic"):
        Variances("cubic")
    for steps in (1, 200_000):
        with pytest.raises(ValueError, match=rf"need 2\.\.101172 steps on this path, got {steps}"):
            Variances()(DiscreteVariancePreserving(), steps)
    with pytest.raises(ValueError, match="most > 0"):
        Variances(most=0.0)
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        Karras(1.0, 0.5)
    with pytest.raises(ValueError, match="power > 0"):
        Power(0.0)
    with pytest.raises(ValueError, match="max_ratio > 0"):
        LogSNR(max_ratio=0.0)


def test_grids_of_one_step_are_the_start_and_zero():
    assert Karras()(EDM(80.0), 1).tolist() == [1.0, 0.0]
    assert math.isclose(float(LogSNR()(EDM(80.0), 1)[0]), 1.0)
