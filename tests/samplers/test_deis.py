"""DEIS: its coefficients against closed forms and oracles, its order on an exact flow, what it reduces to."""

import mpmath
import numpy as np
import pytest
import torch

from steadyflow.denoisers import CountedDenoiser, GaussianMixture
from steadyflow.grids import Karras, LogSNR, Quadratic, Uniform
from steadyflow.noise import NoiseSource
from steadyflow.paths import (
    EDM,
    ConditionalOT,
    Cosine,
    DiscreteVariancePreserving,
    VarianceExploding,
    VariancePreserving,
)
from steadyflow.samplers import DDIM, DEIS, IPNDM
from steadyflow.samplers.deis import METHODS, VARIABLES, AdamsBashforth, RungeKutta

F64 = torch.float64
PATHS = [
    VariancePreserving(),
    DiscreteVariancePreserving(),
    Cosine(),
    VarianceExploding(0.002, 80.0),
    EDM(),
    ConditionalOT(),
]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
VP, OT, VE = VariancePreserving(), ConditionalOT(), VarianceExploding(0.1, 10.0)
LAST = {VP: [1.0, 0.9, 0.8, 0.7], OT: [0.9, 0.8, 0.7, 0.6], VE: [0.9, 0.8, 0.7, 0.6]}
ORACLES = [  # C_0, C_1, C_2 of eps, in double precision, of the last step of these grids
    (VP, "tab", [-1.60076950559, 0.479236648978]),
    (VP, "tab", [-1.98786822567, 1.25343408915, -0.387098720084]),
    (VP, "rhoab", [-1.3426509621, 0.221118105491]),
    (VP, "rhoab", [-1.4167568798, 0.321994608985, -0.0267705857928]),
    (OT, "tab", [-0.48406162314, 0.150728289807]),
    (OT, "tab", [-0.607240898623, 0.397086840772, -0.123179275482]),
    (OT, "rhoab", [-0.416666666667, 0.0833333333333]),
    (OT, "rhoab", [-0.444444444444, 0.12037037037, -0.00925925925926]),
    (VE, "tab", [-1.35504028899, 0.428047049941]),
    (VE, "tab", [-1.70610957665, 1.13018562526, -0.351069287661]),
]


def coefficients(sampler):
    """C_0, C_1, ... of eps in the last step, x' = (alpha' / alpha) x + sum_j C_j eps_j, from the table's form."""
    alpha, sigma = sampler.path(sampler.times)
    keep, _, *past, _ = sampler.table[-1]
    first = (keep - alpha[-1] / alpha[-2]) * sigma[-2]
    return [float(first), *(float(c * sigma[-3 - j]) for j, c in enumerate(past))]


@pytest.mark.parametrize(("path", "variant", "expected"), ORACLES)
def test_coefficients_are_the_oracles(path, variant, expected):
    sampler = AdamsBashforth(path, LAST[path], variant=variant, order=len(expected) - 1)
    np.testing.assert_allclose(coefficients(sampler), expected, rtol=2e-11)


@every_path
@pytest.mark.parametrize("order", [1, 2])
def test_rhoab_has_its_closed_form(path, order):
    """With delta, a, b the distances in rho of the next and of the two previous nodes."""
    sampler = AdamsBashforth(path, [0.9, 0.6, 0.45, 0.2], variant="rhoab", order=order)
    rho, alpha = path.ratio(sampler.times), path(sampler.times)[0][-1]
    d, a, b = rho[3] - rho[2], rho[2] - rho[1], rho[2] - rho[0]
    if order == 1:
        expected = [d * (1 + d / (2 * a)), -(d**2) / (2 * a)]
    else:
        expected = [
            d + d**2 / 2 * (1 / a + 1 / b) + d**3 / (3 * a * b),
            -(d**3 / 3 + b * d**2 / 2) / (a * (b - a)),
            (d**3 / 3 + a * d**2 / 2) / (b * (b - a)),
        ]
    np.testing.assert_allclose(coefficients(sampler), [float(alpha * c) for c in expected], rtol=1e-11)


@pytest.mark.parametrize("variant", ["tab", "log_rhoab"])
@pytest.mark.parametrize("times", [[1.0, 0.6, 0.3, 0.1], [0.5, 0.05, 0.02, 0.001], [0.7, 0.3, 0.2, 0.0]])
def test_quadrature_equals_24_digits(variant, times):
    """The VP integrals of degree 2 by mpmath, down to t = 0 for tAB."""
    if variant == "log_rhoab" and times[-1] == 0:
        times = [*times[:-1], 1e-4]
    sampler = AdamsBashforth(VP, times, variant=variant, order=2)
    with mpmath.workdps(24):
        low, slope = mpmath.mpf("0.1"), mpmath.mpf("19.9")

        def rho(t):
            return mpmath.sqrt(mpmath.expm1(low * t + slope * t * t / 2))

        def variable(r):
            b = mpmath.log1p(r * r)
            return 2 * b / (low + mpmath.sqrt(low**2 + 2 * slope * b)) if variant == "tab" else mpmath.log(r)

        t = [mpmath.mpf(v) for v in times]
        nodes = [variable(rho(v)) for v in reversed(t[:-1])]
        alpha = mpmath.exp(-(low * t[-1] + slope * t[-1] ** 2 / 2) / 2)

        def basis(j, v):
            return mpmath.fprod((v - nodes[k]) / (nodes[j] - nodes[k]) for k in range(3) if k != j)

        exact = [
            float(
                alpha
                * mpmath.quad(lambda r, j=j: basis(j, variable(r)), [rho(t[2]), (rho(t[2]) + rho(t[3])) / 2, rho(t[3])])
            )
            for j in range(3)
        ]
    np.testing.assert_allclose(coefficients(sampler), exact, rtol=1e-11, atol=1e-13)
    assert sampler.quadrature_error < 1e-13


@every_path
@pytest.mark.parametrize("variant", VARIABLES)
def test_the_error_estimate_is_below_1e_12_and_true(path, variant, monkeypatch):
    """On grids that begin at alpha = 0 and end at sigma = 0 too; the discrete path is integrated from knot to knot."""
    for grid, steps in [(Quadratic(), 5), (Uniform(), 50), (LogSNR(), 8), (Karras(), 20), ([1.0, 0.0013, 0.0], None)]:
        sampler = AdamsBashforth(path, grid, steps, variant, 3)
        assert sampler.quadrature_error < 1e-12
        with monkeypatch.context() as patch:
            patch.setattr("steadyflow.samplers.adams.NODES", (150, 200))
            finer = AdamsBashforth(path, grid, steps, variant, 3)
        torch.testing.assert_close(sampler.table, finer.table, rtol=1e-11, atol=1e-12)


def test_knots_are_where_the_discrete_path_has_them():
    """Without them the quadrature of a path with kinks is good to 1e-7 only: the estimate sees it."""
    path = DiscreteVariancePreserving()
    assert len(path.knots) == 999
    smooth = type("Smooth", (DiscreteVariancePreserving,), {"knots": VP.knots})()
    times = [0.9004, 0.5007, 0.1001, 0.0203]
    with_knots, without = (AdamsBashforth(p, times, variant="tab", order=3) for p in (path, smooth))
    assert with_knots.quadrature_error < 1e-13
    assert without.quadrature_error > 1e-9
    torch.testing.assert_close(with_knots.table, without.table, rtol=1e-5, atol=1e-5)


@every_path
@pytest.mark.parametrize("variant", [*VARIABLES, "ipndm"])
def test_order_0_is_ddim(path, variant):
    for grid in (Quadratic(), Karras(), Uniform(end=0.0, zero=False)):
        if isinstance(path, VarianceExploding) and grid.zero:
            continue
        sampler = IPNDM(path, grid, 7, 0) if variant == "ipndm" else AdamsBashforth(path, grid, 7, variant, 0)
        _, _, keep, pull, _ = DDIM(path, grid, 7).coefficients(sampler.times[:-1], sampler.times[1:])
        assert sampler.table.shape == (7, 3)
        torch.testing.assert_close(sampler.table[:, 0], keep, rtol=4e-16, atol=0)
        torch.testing.assert_close(sampler.table[:, 1], pull, rtol=4e-16, atol=1e-16)


@every_path
@pytest.mark.parametrize(
    ("variant", "order"), [*((v, q) for v in VARIABLES for q in (1, 3)), *(("rho_rk", q) for q in METHODS)]
)
def test_a_point_is_recovered_in_one_step_and_in_any(path, variant, order):
    """eps is constant along the flow of one data point."""
    point = torch.tensor([[0.7, -1.4, 2.0]], dtype=F64)
    dirac, noise = GaussianMixture(point, [0.0]), NoiseSource(0, range(5), (3,), dtype=F64)
    for times in ([1.0, 0.0], [1.0, 0.3], [0.9, 0.5, 0.2, 0.1, 0.03, 0.0]):
        (a, s), (a_end, s_end) = path(times[0]), path(times[-1])
        start = a * point + s * noise(0)
        out = DEIS(path, times, variant=variant, order=order)(dirac, noise, start=start)
        torch.testing.assert_close(out, a_end * point + s_end * noise(0), rtol=1e-6, atol=1e-6)


CONVERGENCE = [  # variant, degree, order
    ("tab", 0, 1), ("tab", 1, 2), ("tab", 2, 3), ("tab", 3, 4), ("rhoab", 3, 4), ("log_rhoab", 3, 4), ("ipndm", 3, 2),
    ("heun2", 0, 2), ("kutta3", 0, 3), ("rk4", 0, 4), ("dpm2", 0, 2), ("dpm3", 0, 3),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "degree", "order"), CONVERGENCE)
def test_order_of_convergence(variant, degree, order, convergence):
    """The warm-up as shipped is printed beside the exact start (pytest -s)."""

    def build(path, grid, steps):
        if variant == "ipndm":
            return IPNDM(path, grid, steps, degree)
        if variant in METHODS:
            return RungeKutta(path, grid, steps, variant)
        return AdamsBashforth(path, grid, steps, variant, degree)

    slope, error, warm = convergence(build, VP)
    print(f"\n{variant} {degree}: order {slope:.2f}, errors {error}; with the warm-up as shipped {warm}")
    assert order - 0.15 <= slope <= order + 0.3, (slope, error)
    assert error[-1] < {1: 2e-3, 2: 2e-5, 3: 1e-6, 4: 1e-8}[order]
    assert warm[-1] < 8 * error[-1]  # the low-order first steps cost little on this path and grid, at 1280 steps


def test_on_equal_steps_in_rho_ipndm_is_rhoab():
    path = EDM()
    for order in range(4):
        one, other = IPNDM(path, Uniform(), 9, order), AdamsBashforth(path, Uniform(end=1 / 9), 9, "rhoab", order)
        grid = torch.linspace(1, 0, 10, dtype=F64)
        one, other = IPNDM(path, grid, order=order), AdamsBashforth(path, grid, variant="rhoab", order=order)
        torch.testing.assert_close(one.table, other.table, rtol=1e-11, atol=1e-12)


def test_tab_is_log_rhoab_where_time_is_log_rho(ring):
    """On the geometric VE path; and rhoab where it is rho, on EDM's."""
    for path, variant in ((VarianceExploding(0.01, 50.0), "log_rhoab"), (EDM(), "rhoab")):
        grid = Uniform(end=0.05, zero=False)
        one, other = (AdamsBashforth(path, grid, 9, v, 3).table for v in ("tab", variant))
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("variant", "order"), [("rhoab", 3), ("log_rhoab", 2), ("rho_rk", "rk4"), ("rho_rk", "heun2")])
def test_on_the_same_ratios_every_path_gives_the_same_samples(variant, order, ring):
    noise, results = NoiseSource(0, range(8), (2,), dtype=F64), []
    for path in (VariancePreserving(), DiscreteVariancePreserving(), Cosine(), EDM(), ConditionalOT()):
        sampler = DEIS(path, Karras(0.01, 40.0), 12, variant, order)
        results.append(sampler(ring, noise, start=path(sampler.times[0])[0] * 40 * noise(0)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("grid", [Quadratic(), Quadratic(zero=False), LogSNR(), Uniform()])
@pytest.mark.parametrize("path", [VP, OT], ids=lambda path: type(path).__name__)
def test_a_budget_of_calls_is_reached_by_the_fewest_steps(grid, path, ring):
    for variant, order in (("tab", 2), ("rho_rk", "heun2"), ("rho_rk", "kutta3"), ("rho_rk", "rk4")):
        for nfe in (1, 5, 10, 15, 20, 50):
            if nfe == 1 and grid.zero:
                continue  # one step from t = 1 to 0 has no grid of its own kind
            sampler, counted = DEIS(path, grid, None, variant, order, nfe), CountedDenoiser(ring)
            sampler(counted, NoiseSource(0, range(2), (2,)))
            assert counted.rows / 2 == sampler.nfe >= nfe
            if sampler.steps > 1 + grid.zero:
                assert DEIS(path, grid, sampler.steps - 1, variant, order).nfe < nfe
    published = {"heun2": [6, 10, 16, 20, 50], "kutta3": [6, 12, 15, 21, 51], "rk4": [8, 12, 16, 20, 52]}
    for order, calls in published.items():  # Zhang 2023, Table 6.2
        found = [DEIS(path, LogSNR(zero=False), None, "rho_rk", order, n).nfe for n in (5, 10, 15, 20, 50)]
        assert found == calls


def test_options_out_of_range_are_refused():
    for kwargs, message in (
        ({"variant": "rab"}, "variant must be tab, rhoab, log_rhoab or rho_rk, got rab"),
        ({"order": 4}, "the order of tab must be 0, 1, 2 or 3, got 4"),
        ({"variant": "rho_rk", "order": 3}, "must be heun2, kutta3, rk4, dpm2, dpm3, got 3"),
        ({"variant": "tab", "order": "heun2"}, "must be 0, 1, 2 or 3, got heun2"),
        ({"nfe": 0}, "nfe must be a positive number of calls"),
    ):
        with pytest.raises(ValueError, match=message):
            DEIS(VP, Uniform(), 5, **kwargs)
    with pytest.raises(ValueError, match="a grid that is a rule"):
        DEIS(VP, [1.0, 0.0], nfe=5)
    with pytest.raises(ValueError, match="order must be 0, 1, 2 or 3"):
        IPNDM(VP, Uniform(), 5, 4)
