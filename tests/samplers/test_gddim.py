"""gDDIM: exact on one point, of its order on a mixture, DDIM and DEIS on VP, its covariance against its equation."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from steadyflow.denoisers import MixtureNoise
from steadyflow.diffusions import BDM, CLD, Isotropic
from steadyflow.diffusions.linear import inverse
from steadyflow.grids import Quadratic
from steadyflow.noise import NoiseSource
from steadyflow.paths import Cosine, DiscreteVariancePreserving, VariancePreserving
from steadyflow.samplers import DDIM, DEIS, GDDIM, EulerMaruyama, LinearRK45

F64 = torch.float64
VP = VariancePreserving()
DIFFUSIONS = {"vp": Isotropic(VP), "bdm": BDM(VP, size=4), "cld": CLD()}
every = pytest.mark.parametrize("diffusion", DIFFUSIONS.values(), ids=DIFFUSIONS.keys())
RING = 2 * torch.tensor([[np.cos(a), np.sin(a)] for a in 2 * np.pi / 3 * np.arange(3)], dtype=F64)


def image_noise(count: int = 3) -> NoiseSource:
    return NoiseSource(0, range(count), (1, 4, 4), dtype=F64)


def points_noise(count: int = 12) -> NoiseSource:
    return NoiseSource(0, range(count), (2,), dtype=F64)


POINT = torch.linspace(-1, 1, 16, dtype=F64).reshape(1, 1, 4, 4)


@every
@pytest.mark.parametrize("options", [{}, {"lambda_": 0.5}, {"lambda_": 1.0}], ids=str)
def test_one_point_is_recovered_in_one_step(diffusion, options):
    """Prop. 4, 5, 7: with R_t, from any noise, to 1e-6; on CLD the point has its Gaussian velocity."""
    model = MixtureNoise(diffusion, POINT, [0.0])
    for grid in ([1.0, 0.0], [1.0, 0.4, 0.0]):
        x = GDDIM(diffusion, grid, **options)(model, image_noise())
        torch.testing.assert_close(x, POINT.expand_as(x), rtol=0, atol=1e-6)


@every
def test_the_whole_state_of_one_point_is_exact_in_one_step(diffusion):
    """u_s = Psi(s, 0) lift(x_0) + R_s eps with the eps of the start, at any s."""
    model, g = MixtureNoise(diffusion, POINT, [0.0]), torch.Generator().manual_seed(0)
    eps = torch.randn(3, diffusion.variables, 4, 4, dtype=F64, generator=g)

    def state(t: float) -> torch.Tensor:
        mean = diffusion.apply(diffusion(t)[0], diffusion.to_basis(diffusion.lift(POINT)))
        return diffusion.from_basis(mean + diffusion.apply(diffusion.root(t), diffusion.to_basis(eps)))

    for s in (0.5, 0.02):
        u = GDDIM(diffusion, [1.0, s]).solve(model, image_noise(), start=state(1.0))
        torch.testing.assert_close(u, state(s), rtol=0, atol=1e-6)
        u = GDDIM(diffusion, [1.0, 0.6, s], order=2).solve(model, image_noise(), start=state(1.0))
        torch.testing.assert_close(u, state(s), rtol=0, atol=1e-6)


def test_one_point_is_missed_with_the_cholesky_factor():
    """The difference that K_t makes, and that it is a difference of CLD alone."""
    for diffusion in DIFFUSIONS.values():
        model = MixtureNoise(diffusion, POINT, [0.0])
        error = (GDDIM(diffusion, [1.0, 0.0], k="L")(model, image_noise()) - POINT).abs().max()
        assert error > 1e3 if diffusion is DIFFUSIONS["cld"] else error < 1e-6
    grid, model = Quadratic(end=0.1, zero=False), MixtureNoise(CLD(), POINT, [0.0])
    exact = GDDIM(CLD(), grid, 1).solve(model, image_noise())
    error = [(GDDIM(CLD(), grid, n, k="L").solve(model, image_noise()) - exact).abs().max() for n in (10, 20, 40)]
    assert error[0] > error[1] > error[2] > 1e-2, error  # it converges, by steps alone


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    """The probability flow of the ring on CLD from t = 1 to 0.1, its right side written out, by DOP853."""
    model = MixtureNoise(CLD(), RING, [0.09] * 3)
    start = CLD().apply(CLD().root(1.0), torch.cat([points_noise()(0), points_noise()(1)], 1))
    drift, half = CLD().drift(0.5), 0.5 * CLD().noise(0.5) @ CLD().noise(0.5).mT

    def rate(t: float, u: np.ndarray) -> np.ndarray:
        state, time = torch.from_numpy(u).reshape(-1, 4), torch.tensor(t, dtype=F64)
        score = -CLD_.apply(inverse(CLD_.root(time)).mT, model(state, time))
        return (CLD_.apply(drift, state) - CLD_.apply(half, score)).flatten().numpy()

    CLD_ = CLD()
    solution = solve_ivp(rate, (1.0, 0.1), start.flatten().numpy(), method="DOP853", rtol=1e-9, atol=1e-10)
    return torch.from_numpy(solution.y[:, -1]).reshape(-1, 4)


@pytest.mark.parametrize(
    ("order", "corrector", "k"),
    [(1, False, "R"), (2, False, "R"), (3, False, "R"), (1, True, "R")]
    + [(2, True, "R"), (1, False, "L"), (2, False, "L")],
)
def test_order_of_convergence_on_cld(order, corrector, k, reference):
    """A predictor of q nodes is of order q, with a corrector q + 1, for the 2-D ring with its exact noise."""
    model, steps, errors = MixtureNoise(CLD(), RING, [0.09] * 3), [40, 80], []
    for n in steps:
        sampler = GDDIM(CLD(), Quadratic(end=0.1, zero=False), n, order=order, corrector=corrector, k=k)
        errors.append(float((sampler.solve(model, points_noise()) - reference).square().mean().sqrt()))
    slope = np.log2(errors[0] / errors[1])
    assert order + corrector - 0.3 <= slope <= order + corrector + 0.5, (slope, errors)


def test_flow_by_runge_kutta_and_by_euler(reference):
    model, noise = MixtureNoise(CLD(), RING, [0.09] * 3), points_noise()
    euler = [
        float(
            (EulerMaruyama(CLD(), Quadratic(end=0.1, zero=False), n, lambda_=0.0).solve(model, noise) - reference)
            .square()
            .mean()
            .sqrt()
        )
        for n in (60, 120)
    ]
    assert 0.8 <= np.log2(euler[0] / euler[1]) <= 1.4, euler
    fine = GDDIM(CLD(), [0.1, 0.0]).solve(model, noise, start=reference)[:, :2]
    x = LinearRK45(CLD(), end=0.1, rtol=1e-5, atol=1e-5)(model, noise)
    torch.testing.assert_close(x, fine, rtol=0, atol=1e-3)


@every
def test_the_adaptive_method_steps_each_sample_as_alone(diffusion):
    model, sampler = MixtureNoise(diffusion, torch.cat([POINT, -POINT]), [0.01, 0.3]), LinearRK45(diffusion, end=0.05)
    whole = sampler(model, image_noise(4))
    singles = [sampler(model, NoiseSource(0, [i], (1, 4, 4), dtype=F64)) for i in range(4)]
    torch.testing.assert_close(whole, torch.cat(singles), rtol=1e-9, atol=1e-9)


def test_on_a_gaussian_path_it_is_ddim_and_deis(ring):
    noise = NoiseSource(3, range(5), (2,), dtype=F64)
    x = GDDIM(VP, Quadratic(), 10)(ring, noise)
    torch.testing.assert_close(x, DDIM(VP, Quadratic(), 10)(ring, noise), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        GDDIM(VP, Quadratic(), 10, order=3, k="L")(ring, noise),
        DEIS(VP, Quadratic(), 10, order=2)(ring, noise),
        rtol=0,
        atol=1e-9,
    )


@pytest.mark.parametrize("lambda_", [0.3, 1.0])
def test_on_a_gaussian_path_it_is_stochastic_ddim(ring, lambda_):
    """Eq. 7.14 written out with DDIM's own step (Eq. 7.9)."""
    noise = NoiseSource(3, range(5), (2,), dtype=F64)
    sampler = GDDIM(VP, Quadratic(), 6, lambda_=lambda_)
    x = VP(1.0)[1] * noise(0)
    for n in range(6):
        (a_t, s_t), (a_s, s_s) = VP(sampler.times[n]), VP(sampler.times[n + 1])
        eps = (x - a_t * ring(x, a_t, s_t)) / s_t
        variance = s_s**2 * (1 - ((s_s / a_s) * (a_t / s_t)) ** (2 * lambda_**2))
        z = noise(n + 1)
        x = a_s / a_t * x + (torch.sqrt(s_s**2 - variance) - a_s / a_t * s_t) * eps + torch.sqrt(variance) * z
    torch.testing.assert_close(sampler(ring, noise), x, rtol=1e-10, atol=1e-10)
    if lambda_ == 1.0:
        torch.testing.assert_close(DDIM(VP, Quadratic(), 6, eta=1.0)(ring, noise), x, rtol=1e-10, atol=1e-10)


def test_a_path_with_knots_is_integrated_between_them(ring):
    path, noise = DiscreteVariancePreserving(), NoiseSource(3, range(5), (2,), dtype=F64)
    x = GDDIM(path, Quadratic(), 6, order=2)(ring, noise)
    torch.testing.assert_close(x, DEIS(path, Quadratic(), 6, order=1)(ring, noise), rtol=0, atol=1e-9)


@every
def test_coefficients_of_a_polynomial_noise(diffusion):
    """sum_j C_j p(t_j) = int Psi B p for any polynomial of degree q - 1; for p = 1 in closed form."""
    sampler = GDDIM(diffusion, [0.9, 0.7, 0.4, 0.2], order=3)
    keep, pulls = sampler.rows[2][:2]
    t, s = sampler.times[2], sampler.times[3]
    closed = diffusion.root(s) - keep @ diffusion.root(t)
    torch.testing.assert_close(sum(pulls), closed, rtol=1e-9, atol=1e-9)
    v, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(60))
    tau = t + (s - t) * (v + 1) / 2
    kernel = diffusion.transition(s, tau) @ diffusion.rate(tau)
    nodes = [0.4, 0.7, 0.9]
    for power in (1, 2):
        exact = torch.tensordot((s - t) / 2 * w * tau**power, kernel, 1)
        found = sum(c * node**power for c, node in zip(pulls, nodes, strict=True))
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9 * float(closed.abs().max()))


@every
@pytest.mark.parametrize("lambda_", [0.3, 1.0])
def test_stochastic_covariance_solves_its_equation(diffusion, lambda_):
    """dP/dtau = F^ P + P F^T - lambda^2 G G^T backwards from P = 0; without the transpose it is not even symmetric."""
    s, t = 0.15, 0.8
    std = GDDIM(diffusion, [t, s], lambda_=lambda_).rows[0].std
    shape = std.shape

    def solved(transpose: bool) -> torch.Tensor:
        def rate(tau: float, p: np.ndarray) -> np.ndarray:
            p = torch.from_numpy(p).reshape(shape)
            gg = diffusion.noise(tau) @ diffusion.noise(tau).mT
            f = diffusion.drift(tau) + 0.5 * (1 + lambda_**2) * gg @ inverse(diffusion.covariance(tau))
            return (f @ p + p @ (f.mT if transpose else f) - lambda_**2 * gg).flatten().numpy()

        p = solve_ivp(rate, (t, s), np.zeros(std.numel()), method="DOP853", rtol=1e-10, atol=1e-12).y[:, -1]
        return torch.from_numpy(p).reshape(shape)

    torch.testing.assert_close(std @ std.mT, solved(True), rtol=1e-8, atol=1e-9)
    if diffusion.variables == 2:
        assert (std @ std.mT - solved(False)).norm() > 0.3 * solved(True).norm()


@every
def test_lambda_one_is_ancestral_sampling(diffusion):
    """The step is the mean and covariance of q(u_s | u_t, u_0), written out by conditioning."""
    s, t = 0.3, 0.6
    row = GDDIM(diffusion, [t, s], lambda_=1.0).rows[0]
    psi, (_, sigma_s), (_, sigma_t) = diffusion.transition(t, s), diffusion(s), diffusion(t)
    gain = sigma_s @ psi.mT @ inverse(sigma_t)
    torch.testing.assert_close(row.std @ row.std.mT, sigma_s - gain @ psi @ sigma_s, rtol=1e-9, atol=1e-11)
    # u_t = Psi(t, 0) u_0 + R_t eps: the mean is Psi(s, 0) u_0 + gain (u_t - Psi(t, 0) u_0)
    keep = diffusion.transition(s, t)
    torch.testing.assert_close(row.keep, keep, rtol=0, atol=0)
    torch.testing.assert_close(row.pulls[0], (gain - keep) @ diffusion.root(t), rtol=1e-9, atol=1e-9)


class OneGenerator:
    """Noise of many one-dimensional samples at once, faster than keyed by sample."""

    def __init__(self, count: int):
        self.count, self.dtype = count, F64

    def __call__(self, step: int) -> torch.Tensor:
        return torch.randn(self.count, 1, dtype=F64, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize(
    "build",
    [
        lambda: GDDIM(CLD(), Quadratic(end=0.05, zero=False), 60, lambda_=0.5),
        lambda: EulerMaruyama(CLD(), Quadratic(end=0.05, zero=False), 250),
    ],
)
def test_moments_of_stochastic_samplers(build):
    """Mean and variances of (x, v) on CLD for a one-dimensional mixture: within four standard errors and the bias."""
    count, t = 4000, 0.05
    model = MixtureNoise(CLD(), [[-1.0], [1.2]], [0.05, 0.1], [0.3, 0.7])
    u = build().solve(model, OneGenerator(count))
    psi, sigma = CLD()(t)
    mean = 0.3 * -1.0 + 0.7 * 1.2
    variance = 0.3 * (1 + 0.05) + 0.7 * (1.44 + 0.1) - mean**2
    exact = variance * psi[:, :1] @ psi[:, :1].mT + sigma
    error = 4 * exact.diagonal().sqrt() / count**0.5
    assert ((u.mean(0) - psi[:, 0] * mean).abs() < error + 0.02 * exact.diagonal().sqrt()).all()
    scale = exact.diagonal().sqrt()
    assert ((torch.cov(u.T) - exact).abs() / (scale[:, None] * scale)).max() < 4 * (2 / count) ** 0.5 + 0.03


@pytest.mark.parametrize(
    "options", [{"order": 3}, {"lambda_": 0.7}, {"order": 2, "corrector": True, "k": "L"}], ids=str
)
@every
def test_a_batch_is_its_singles(diffusion, options):
    means = torch.stack([POINT[0], -POINT[0]])
    model, sampler = MixtureNoise(diffusion, means, [0.01, 0.1]), GDDIM(diffusion, Quadratic(), 4, **options)
    noise = NoiseSource(5, [7, 2], (1, 4, 4), dtype=F64)
    singles = [sampler(model, NoiseSource(5, [i], (1, 4, 4), dtype=F64)) for i in (7, 2)]
    torch.testing.assert_close(sampler(model, noise), torch.cat(singles), rtol=1e-10, atol=1e-10)


def test_float32_noise_gives_float32_samples_of_the_same_quality():
    model = MixtureNoise(CLD(), POINT, [0.0])
    x = GDDIM(CLD(), [1.0, 0.5, 0.0])(model, NoiseSource(0, range(3), (1, 4, 4)))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, POINT.float().expand_as(x), rtol=0, atol=0.05)  # eps is rounded, times 300


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GDDIM(CLD(), [1.0, 0.0], order=0), "order 1..6"),
        (lambda: GDDIM(CLD(), [1.0, 0.0], k="l"), "k R or L"),
        (lambda: GDDIM(CLD(), [1.0, 0.0], lambda_=0.5, order=2), "order=1"),
        (lambda: DDIM(CLD(), [1.0, 0.0]), "sampler=gddim"),
        (lambda: EulerMaruyama(CLD(), [1.0, 0.0], lambda_=-1.0), "lambda_ >= 0"),
        (lambda: LinearRK45(CLD(), end=0.0), "end > 0"),
        (lambda: LinearRK45(Cosine()), "no signal at t = 1"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_state_that_is_not_finite_is_named():
    with pytest.raises(FloatingPointError, match="after step 1 of 2"):
        GDDIM(CLD(), [1.0, 0.5, 0.0])(lambda u, t: u * float("nan"), image_noise())
