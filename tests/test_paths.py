"""Gaussian paths: derivatives, inverses, limits and known values, in float64."""

import math

import numpy as np
import pytest
import torch

from steadyflow.paths import (
    EDM,
    ConditionalOT,
    Cosine,
    DiscreteVariancePreserving,
    SubVariancePreserving,
    VarianceExploding,
    VariancePreserving,
    combine,
)

PATHS = {
    "vp": VariancePreserving(),
    "subvp": SubVariancePreserving(),
    "vp_discrete": DiscreteVariancePreserving(),
    "cosine": Cosine(),
    "cosine_s0": Cosine(s=0.0),
    "ve": VarianceExploding(),
    "edm": EDM(),
    "ot": ConditionalOT(),
    "ot_scaled": ConditionalOT(scale=2.0),
}
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
INF = torch.tensor(math.inf, dtype=torch.float64)


@every_path
def test_derivative_is_autograds(path):
    t = torch.linspace(0.00123, 0.99877, 200, dtype=torch.float64, requires_grad=True)
    for k, derivative in enumerate(path.derivative(t)):
        (expected,) = torch.autograd.grad((path(t)[k] + 0 * t).sum(), t)
        torch.testing.assert_close(derivative, expected, rtol=1e-10, atol=1e-10)


@every_path
def test_velocity_moves_alpha_x0_plus_sigma_eps(path):
    t = torch.linspace(0.01, 1.0, 50, dtype=torch.float64)
    x0, eps = 0.7, -1.3
    (alpha, sigma), (dalpha, dsigma), (p, q) = path(t), path.derivative(t), path.velocity(t)
    x = alpha * x0 + sigma * eps
    torch.testing.assert_close(p * x + q * x0, dalpha * x0 + dsigma * eps, rtol=1e-10, atol=1e-10)


@every_path
def test_time_at_inverts_the_ratio(path):
    t = torch.cat([torch.logspace(-4, -2, 20), torch.linspace(0.01, 0.999, 180)]).double()
    torch.testing.assert_close(path.time_at(path.ratio(t)), t, rtol=1e-9, atol=0)
    low, high = path.ratio(torch.tensor([1e-4, 0.999]).double()).log()
    ratio = torch.linspace(float(low), float(high), 300, dtype=torch.float64).exp()
    torch.testing.assert_close(path.ratio(path.time_at(ratio)), ratio, rtol=1e-9, atol=0)


@every_path
def test_ends(path):
    assert [float(path.time_at(0.0)), float(path.time_at(INF))] == pytest.approx([0, 1], abs=1e-15)
    assert path.time_at(torch.tensor(math.nan)).isnan()
    alpha, sigma = path(0.0)
    assert alpha == pytest.approx(1, abs=1e-15)
    assert sigma == (0.01 if isinstance(path, VarianceExploding) else 0)
    assert path.ratio(0.999) < path.ratio(1.0)
    dalpha, dsigma = path.derivative(0.0)
    assert not dalpha.isnan()
    assert dsigma > 0  # infinite where sigma starts as a square root


@every_path
def test_scalars_and_tensors_of_any_shape_agree(path):
    t = torch.tensor([[0.1, 0.5, 0.9], [1.0, 0.02, 0.3]], dtype=torch.float32)
    for method in (path, path.derivative, path.velocity):
        for k, many in enumerate(method(t)):
            assert many.dtype == torch.float64
            assert torch.equal(many, torch.stack([method(v)[k] for v in t.flatten()]).reshape(t.shape))
    ratio = path.ratio(t)
    assert torch.equal(path.time_at(ratio), torch.stack([path.time_at(r) for r in ratio.flatten()]).reshape(t.shape))


@pytest.mark.parametrize("path", [PATHS["vp"], PATHS["vp_discrete"], PATHS["cosine"], PATHS["cosine_s0"]])
def test_variance_preserving_paths_preserve_it(path):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    alpha, sigma = path(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("t", "alpha", "sigma", "ratio"),  # computed independently in double precision
    [
        (0.001, 0.999945026511, 0.0104854163351, 0.0104859927867),
        (0.1, 0.946721798821, 0.322052535525, 0.340176529077),
        (0.3, 0.629550000336, 0.776959971348, 1.2341513318),
        (0.6, 0.161863806169, 0.986813107053, 6.09656433029),
        (1.0, 0.00657158649493, 0.999978406892, 152.166970284),
    ],
)
def test_known_values_of_vp(t, alpha, sigma, ratio):
    path = VariancePreserving(0.1, 20.0)
    assert [float(v) for v in path(t)] == pytest.approx([alpha, sigma], rel=1e-11)
    assert float(path.ratio(t)) == pytest.approx(ratio, rel=1e-11)


@pytest.mark.parametrize(
    ("ot", "vp"),  # times of equal ratio, flow time turned round
    [
        (0.95, 0.764487901099),
        (0.8, 0.528613620708),
        (0.5, 0.258960262433),
        (0.2, 0.0731936617781),
        (0.05, 0.0123894462586),
        (1 - 0.989622822225, 0.001),
        (1 - 0.0065288227491, 1.0),
    ],
)
def test_known_time_map_between_ot_and_vp(ot, vp):
    a, b = ConditionalOT(), VariancePreserving()
    assert float(b.time_at(a.ratio(ot))) == pytest.approx(vp, rel=1e-9)
    assert float(a.time_at(b.ratio(vp))) == pytest.approx(ot, rel=1e-9)


def test_discrete_path_is_the_ddpm_chain_at_its_indices():
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - betas)
    alpha, sigma = DiscreteVariancePreserving()((torch.arange(1000, dtype=torch.float64) + 1) / 1000)
    np.testing.assert_allclose(alpha.numpy(), np.sqrt(alpha_bar), rtol=1e-12)
    np.testing.assert_allclose(sigma.numpy(), np.sqrt(1 - alpha_bar), rtol=1e-11)


def test_discrete_path_is_close_to_its_continuous_limit():
    """beta_i = beta(t_i) / T: the chain tends to the diffusion as 1 / T."""
    t = torch.linspace(0.1, 1, 10, dtype=torch.float64)
    limit = VariancePreserving()(t)[0].log()
    error = []
    for steps in (1000, 4000):
        chain = DiscreteVariancePreserving(0.1 / steps, 20 / steps, steps)(t)[0].log()
        error.append(float((chain / limit - 1).abs().max()))
    assert error[1] == pytest.approx(error[0] / 4, rel=0.1)
    assert error[1] < 0.005


def test_discrete_derivative_is_that_of_the_interval():
    path = DiscreteVariancePreserving(steps=10, beta_start=0.01, beta_end=0.3)
    log = 2 * path(torch.linspace(0, 1, 11, dtype=torch.float64))[0].log()
    t = torch.tensor([0.03, 0.55, 0.97], dtype=torch.float64)
    alpha, (dalpha, _) = path(t)[0], path.derivative(t)
    torch.testing.assert_close(2 * dalpha / alpha, (log.diff() * 10)[[0, 5, 9]], rtol=1e-11, atol=0)


def test_cosine_is_nichol_and_dhariwals():
    def f(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    t = torch.tensor([0.001, 0.1, 0.5, 0.9, 0.999], dtype=torch.float64)
    expected = [f(u) / f(0) for u in t.tolist()]
    assert (Cosine()(t)[0] ** 2).tolist() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("s", [0.0, 0.001, 0.005, 0.008])
def test_cosine_ends_without_signal(s):
    """cos(pi / 2) of a rounded pi is not 0, and for some s below it."""
    assert Cosine(s)(1.0)[0] == 0
    assert Cosine(s).ratio(1.0) == math.inf


def test_straight_paths():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(torch.stack(ConditionalOT()(t)), torch.stack([1 - t, t]))
    assert torch.equal(torch.stack(EDM(80.0)(t)), torch.stack([torch.ones_like(t), 80 * t]))
    assert float(VarianceExploding(0.01, 50.0)(0.5)[1]) == pytest.approx(math.sqrt(0.01 * 50), rel=1e-12)
    assert ConditionalOT().ratio(1.0) == math.inf


@pytest.mark.parametrize(
    "build",
    [
        lambda: VariancePreserving(0.0, 20.0),
        lambda: VariancePreserving(3.0, 2.0),
        lambda: DiscreteVariancePreserving(0.02, 1e-4),
        lambda: DiscreteVariancePreserving(1e-4, 1.0),
        lambda: DiscreteVariancePreserving(steps=0),
        lambda: Cosine(-0.1),
        lambda: VarianceExploding(1.0, 1.0),
        lambda: VarianceExploding(0.0, 1.0),
        lambda: EDM(0.0),
    ],
)
def test_impossible_paths_are_refused(build):
    with pytest.raises(ValueError, match="need"):
        build()


def test_combine_is_a_x_plus_b_y_row_by_row():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 3, 4, generator=generator)
    row = torch.rand(5, generator=generator, dtype=torch.float64)
    one = torch.tensor(0.3, dtype=torch.float64)
    for a in (one, row):
        for b in (one, -row):
            expected = a.expand(5)[:, None, None] * x.double() + b.expand(5)[:, None, None] * y.double()
            out = combine(a, x, b, y)
            assert out.dtype == x.dtype
            torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
