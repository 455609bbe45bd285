"""C-PiGDM and C-PiGFM: coefficients and runs against the note's 24-digit values, the projected ODE, and the flow.

The note's problem: d = 4, A the means of two pairs, x_0 ~ N(0, C) with C_ij = 0.9^|i - j|, y = (0.3, -0.7), z given.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp
from torch import Tensor

from steadyflow.denoisers import CountedDenoiser, Gaussian
from steadyflow.grids import Uniform
from steadyflow.guidance import PiGDM
from steadyflow.linear import Blur, Clip
from steadyflow.noise import NoiseSource
from steadyflow.paths import ConditionalOT, VariancePreserving
from steadyflow.restorers import CPiGDM, CPiGFM, GuidedSampler, Measurement
from steadyflow.samplers import DDIM, Heun

VP, OT = VariancePreserving(), ConditionalOT()
SHAPE = (1, 1, 4)
POOL = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], dtype=torch.float64)
PRIOR = Gaussian(torch.zeros(SHAPE), 0.9 ** (torch.arange(4.0)[:, None] - torch.arange(4.0)).abs().double())
Y = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
Z = torch.tensor([1, -0.5, 0.25, 2], dtype=torch.float64).reshape(1, *SHAPE)


def fixed(z: Tensor) -> NoiseSource:
    return lambda step: z  # type: ignore[return-value]


@pytest.fixture
def pool(dense: type) -> Callable[..., Measurement]:
    return lambda sigma_y=0.0: Measurement(Y, dense(POOL, SHAPE), sigma_y)


# (w, lambda, t, t'): (1 + lambda h) a for null space and range, c_y, c_s or c_b and c_j for null space and range, from
# the note's tables 6.3 (C-PiGDM) and 6.4 (C-PiGFM, whose time is 1 - t and whose velocity has the other sign)
DIFFUSION = """
4 0 0.6 0.4802 1.91514741925 0.142361767459 0.28694983312 -0.939153752786 0.810254364396 -0.783717032464 -0.277036255383
4 0 1 0.8 6.05570013771 0.00450305150409 0.0397659650499 -5.05636153327 0.994704888786 -0.286625876819 -0.0397449513398
4 0.5 0.6 0.4802 1.91157130114 0.142095938056 0.292561600058 -0.971853791707 0.828491382797 -0.80869645221 -0.2824974031
10 0 1 0.8 6.05570013771 9.13105046095e-8 0.0397955566423 -5.05636153327 0.999207751747 -0.716564692048 -0.0397692878571
10 -0.3 0.4802 0.3604 1.65924226303 0.010424911507 0.50762529149 -0.7068593189 0.8403964593 -2.3363330026 -0.4476691634
10 -0.3 0.1208 0.001 1.0810714537 0.492686872447 0.532713229726 -0.3950308353 -0.1760684592 -0.197805963 -0.1266363639
"""
FLOW = """
5 0 0.2 0.36 1 0.852507447891 0.147492552109 0.16 0.042005958313 0.114141866667 0.105190460522
5 0 0.84 1 1 0.944430353917 0.0555696460831 0.16 0.151108856627 0.00600746666667 0.00580455801305
20 -0.3 0.2 0.36 0.998810463869 0.527564800027 0.481424251149 0.163902184415 -0.222010450885 0.4674521788 0.34064030775
20 -0.3 0.84 1 0.998810463869 0.794626109457 0.210831100435 0.163902184415 0.130018513473 0.02490365472 0.021722792801
"""


def _rows(table: str) -> list[list[float]]:
    return [[float(v) for v in line.split()] for line in table.strip().splitlines()]


@pytest.mark.parametrize("row", _rows(DIFFUSION))
def test_the_coefficients_of_a_diffusion_step_are_the_note_s(row: list[float]) -> None:
    w, lam, t, s, *expected = row
    (d, u, f, zeta), (alpha, sigma) = CPiGDM(VP, [t, s], weight=w, lam=lam).table[0], VP(t)
    a = (d - u) / alpha
    found = torch.stack([*a, u[1], *(f - a * sigma), *zeta])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("row", _rows(FLOW))
def test_the_coefficients_of_a_flow_step_are_the_note_s(row: list[float]) -> None:
    w, lam, t, s, *expected = row
    d, u, f, zeta = CPiGFM(OT, [1 - t, 1 - s], weight=w, lam=lam).table[0]
    found = torch.stack([*(d - u), u[1], *((d - u) * (1 - t) - f), *-zeta])
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-10)


def test_noise_enters_the_exponents_as_the_note_s_table_says() -> None:
    """Table 6.5: kappa_2 at t = 0.1, 0.6, 1 for w = 4, of directions with sigma_y^2 / s_i^2 = nu."""
    snr = 1 / torch.tensor([0.0025, 0.01, 0.04], dtype=torch.float64)
    c = CPiGDM(VP, [1, 0.6, 0.1, 0], weight=4.0)
    exponent = [torch.log1p(-c.coefficients(k, snr)[1] / VP(c.times[k + 1])[0]) for k in (2, 1, 0)]
    kappa = torch.stack(exponent).cumsum(0)
    expected = [
        [-0.199754606949, -0.168690392847, -0.112194427043],
        [-7.23607242247, -7.12101311601, -6.75518603241],
        [-20.0199804571, -19.8096024206, -19.0763034606],
    ]
    torch.testing.assert_close(kappa, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


DOWN, TO_DATA = Uniform(start=0.6), Uniform(start=0.8, end=0, zero=False)
RUNS = [
    (partial(CPiGDM, VP, DOWN, 6, 4.0, 0.0), [0.323827315724, -0.0122864525613, -0.172481849339, 0.117611028213]),
    (partial(CPiGDM, VP, DOWN, 6, 4.0, 0.5), [0.307067763979, 0.0226585833462, -0.13694069131, 0.0972707893193]),
    (partial(CPiGFM, OT, TO_DATA, 5, 20.0, 0.0), [0.40883472994, -0.172457770886, -0.639114470631, -0.413020718955]),
    (partial(CPiGFM, OT, TO_DATA, 5, 20.0, -0.3), [0.408255148155, -0.162784429749, -0.640975542856, -0.436235046182]),
]


@pytest.mark.parametrize(("make", "expected"), RUNS)
def test_a_run_gives_the_note_s_numbers(
    pool: Callable[..., Measurement], make: Callable[[], CPiGDM], expected: list[float]
) -> None:
    counted = CountedDenoiser(PRIOR)
    restore = make()
    found = restore(counted, pool(), fixed(Z))
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
    assert counted.rows == len(restore.times) - 1


def test_the_projected_ode_is_the_guided_one(pool: Callable[..., Measurement]) -> None:
    """d(A x) of the note's (2.10), lambda = 0.5, written out and solved to 1e-10, against the guided flow itself."""
    w, lam, p = 4.0, 0.5, POOL.mT @ torch.linalg.inv(POOL @ POOL.mT) @ POOL
    p, back = p.numpy(), pool().operator.pinv(Y).numpy().ravel()
    null, covariance = np.eye(4) - p, np.asarray(0.9 ** np.abs(np.subtract.outer(range(4), range(4))))

    def level(t: float) -> tuple[float, float, float]:
        alpha, sigma = (float(v) for v in VP(t))
        return alpha, sigma, 0.1 + 19.9 * t

    def transform(t: float, sign: float) -> np.ndarray:
        alpha = level(t)[0]
        return np.exp(sign * (lam * t - np.log(alpha))) * (null + alpha ** (sign * w) * p)

    def slope(v: float, bar: np.ndarray) -> np.ndarray:  # t = v^2
        t = v * v
        (alpha, sigma, beta), a = level(t), transform(t, 1)
        inverse = np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(4))
        x = transform(t, -1) @ bar
        eps = sigma * inverse @ x
        u = back - p @ (x - sigma * eps) / alpha
        pushed = (np.eye(4) - w * sigma**2 * p) @ eps
        jacobian = sigma * inverse @ u
        rate = a @ (pushed / (2 * sigma) - w * alpha * back / 2 + w * alpha * sigma * jacobian / 2)
        return 2 * v * (lam * bar + beta * rate)

    start = pool().operator.pinv(VP(0.6)[0] * Y).numpy().ravel() + float(VP(0.6)[1]) * Z.numpy().ravel()
    solution = solve_ivp(
        slope, (0.6**0.5, 1e-3**0.5), transform(0.6, 1) @ start, method="DOP853", rtol=1e-11, atol=1e-13
    )
    found = transform(1e-3, -1) @ solution.y[:, -1]
    expected = [0.3284889118, -0.2491635626, -0.3886136722, 0.09265362786]  # the unprojected flow, from the note
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (partial(CPiGDM, VP, weight=4.0), [0.3281873806, -0.2489478084, -0.3883098271, 0.09240299753]),
        (partial(CPiGDM, VP, weight=4.0, lam=0.5), [0.3281873806, -0.2489478084, -0.3883098271, 0.09240299753]),
        (partial(CPiGFM, OT, weight=20.0), [0.5692332434, -0.1944247732, -0.7441085863, -0.4328115071]),
        (partial(CPiGFM, OT, weight=20.0, frozen="noise"), [0.5692332434, -0.1944247732, -0.7441085863, -0.4328115071]),
    ],
)
def test_steps_converge_at_first_order_to_the_guided_flow(
    pool: Callable[..., Measurement], make: Callable[..., CPiGDM], expected: list[float]
) -> None:
    vp = isinstance(make(grid=[0.5, 0.4]), CPiGDM)
    ends = []
    for n in (64, 128, 256):
        u = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        times = (0.6**0.5 + u * (1e-3**0.5 - 0.6**0.5)) ** 2 if vp else 0.8 * (1 - u)
        ends.append(make(grid=torch.cat([times, times.new_zeros(1)]) if vp else times)(PRIOR, pool(), fixed(Z)))
    goal = torch.tensor(expected, dtype=torch.float64).reshape(1, *SHAPE)
    errors = [(end - goal).norm().item() for end in ends]
    assert 1.85 < errors[0] / errors[1] < 2.15
    assert 1.9 < errors[1] / errors[2] < 2.1
    limit = ends[2] / 3 * 8 - 2 * ends[1] + ends[0] / 3  # h and h^2 removed
    torch.testing.assert_close(limit, goal, rtol=0, atol=1e-5)


@pytest.mark.parametrize("heun", [False, True])
@pytest.mark.parametrize(("sigma_y", "power"), [(0.0, 2.0), (0.2, 1.0)])
@pytest.mark.parametrize("make", [partial(CPiGDM, VP, weight=4.0), partial(CPiGFM, OT, weight=20.0)])
def test_of_order_two_steps_converge_at_second_order_on_any_grid(
    dense: type, make: Callable[..., CPiGDM], sigma_y: float, power: float, heun: bool
) -> None:
    matrix = torch.tensor([[1.0, 0.3, 0, 0.2], [0, 0.4, -0.2, 0.1]], dtype=torch.float64)  # two singular values
    given = Measurement(Y, dense(matrix, SHAPE), sigma_y)
    n = 32 if heun else 16
    times = [0.1 + 0.5 * torch.linspace(1, 0, k + 1, dtype=torch.float64) ** power for k in (n, 2 * n, 8 * n)]
    frozen = make(grid=times[0])
    guide = partial(PiGDM, weight=frozen.weight, gamma="conjugate")
    goal = GuidedSampler(Heun(frozen.path, times[2]), guide)(PRIOR, given, fixed(Z))
    counted = CountedDenoiser(PRIOR)
    errors = [(make(grid=grid, order=2, heun=heun)(counted, given, fixed(Z)) - goal).norm() for grid in times[:2]]
    assert counted.rows == 3 * n * (1 + heun)  # else as many as of order 1
    assert 3.4 < errors[0] / errors[1] < 4.7
    assert errors[0] < 0.4 * (frozen(PRIOR, given, fixed(Z)) - goal).norm()


@pytest.mark.parametrize("make", [partial(CPiGDM, VP, weight=4.0), partial(CPiGFM, OT, weight=20.0)])
@pytest.mark.parametrize("lam", [0.0, 0.4])
def test_with_noise_the_limit_is_the_noisy_guided_flow(dense: type, make: Callable[..., CPiGDM], lam: float) -> None:
    matrix = torch.tensor([[1.0, 0.3, 0, 0.2], [0, 0.4, -0.2, 0.1]], dtype=torch.float64)  # two singular values
    given = Measurement(Y, dense(matrix, SHAPE), 0.2)
    path = make(grid=[0.5, 0.4]).path
    times = [torch.linspace(0.6, 0.05, n + 1, dtype=torch.float64) for n in (16, 32, 64)]
    ends = [make(grid=grid, lam=lam)(PRIOR, given, fixed(Z)) for grid in times]
    guide = partial(PiGDM, weight=make(grid=[0.5, 0.4]).weight, gamma="conjugate")
    goal = GuidedSampler(Heun(path, times[2]), guide)(PRIOR, given, fixed(Z))
    errors = [(end - goal).norm().item() for end in ends]
    assert errors[0] > 1.7 * errors[1] > 2.8 * errors[2]
    torch.testing.assert_close(ends[2] / 3 * 8 - 2 * ends[1] + ends[0] / 3, goal, rtol=0, atol=3e-4)


def test_an_operator_s_own_spectrum_gives_what_its_matrix_gives(dense: type) -> None:
    shape, y = (1, 6, 6), torch.randn(2, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blur = Blur(shape, std=1.0, size=5, cutoff=0.0)
    matrix = blur(torch.eye(36, dtype=torch.float64).reshape(36, *shape)).flatten(1).mT
    written_out = dense(matrix, shape)
    prior = Gaussian(torch.zeros(shape), 0.5)
    noise = NoiseSource(0, [0, 1], shape, dtype=torch.float64)
    for restore in (CPiGDM(VP, Uniform(start=0.6), 3), CPiGFM(OT, Uniform(start=0.8), 3, lam=0.2)):
        found = restore(prior, Measurement(y, blur, 0.1), noise)
        expected = restore(prior, Measurement(y.flatten(1), written_out, 0.1), noise)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        alone = restore(prior, Measurement(y[1:], blur, 0.1), NoiseSource(0, [1], shape, dtype=torch.float64))
        torch.testing.assert_close(alone, found[1:])


@pytest.mark.parametrize(("c", "w", "low", "high"), [(10.0, 30.0, 1e-6, 1e-4), (1.0, 1.0, 0.7, 1.0)])
def test_it_wins_by_orders_where_the_guidance_is_stiff_and_little_where_it_is_not(
    dense: type, c: float, w: float, low: float, high: float
) -> None:
    """The note's Table 5.4 at 5 steps, one measured direction of variance c: error over guided DDIM's, 1.6e-5, 0.85."""
    shape, prior = (1, 1, 1), Gaussian(torch.zeros(1, 1, 1), c)
    y, z = c**0.5 * torch.linspace(-2, 2, 16, dtype=torch.float64), _normal(16)
    given = Measurement(y.reshape(16, 1), dense(torch.eye(1, dtype=torch.float64), shape))
    grid, guide = Uniform(start=0.6, end=1e-3, zero=False), partial(PiGDM, weight=w, gamma="conjugate")
    fine = torch.linspace(0.6**0.5, 1e-3**0.5, 401, dtype=torch.float64) ** 2
    goal = GuidedSampler(Heun(VP, fine), guide)(prior, given, fixed(z))
    ours = (CPiGDM(VP, grid, 5, weight=w)(prior, given, fixed(z)) - goal).norm()
    plain = (GuidedSampler(DDIM(VP, grid, 5), guide)(prior, given, fixed(z)) - goal).norm()
    assert low < float(ours / plain) < high


def _normal(count: int) -> Tensor:
    return torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_without_weight_it_is_ddim(pool: Callable[..., Measurement]) -> None:
    found = CPiGDM(VP, Uniform(start=0.6), 6, weight=1e-9)(PRIOR, pool(), fixed(Z))
    plain = GuidedSampler(DDIM(VP, Uniform(start=0.6), 6), lambda denoiser, given: _Ignore(denoiser))
    torch.testing.assert_close(found, plain(PRIOR, pool(), fixed(Z)), rtol=0, atol=1e-7)


class _Ignore(CountedDenoiser):
    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        return self.denoiser(x, alpha, sigma)


def test_an_operator_that_is_not_linear_needs_h_and_its_inverse_alone() -> None:
    """One step of the note's (2.40), with the integral of Z by another quadrature."""
    clip, prior = Clip((1, 2, 2), gain=2.0), Gaussian(torch.zeros(1, 2, 2), 0.3)
    x0 = torch.tensor([0.9, -0.1, 0.3, -0.8], dtype=torch.float64).reshape(1, 1, 2, 2)
    z = torch.tensor([1, -0.5, 0.25, 2], dtype=torch.float64).reshape(1, 1, 2, 2)
    given, w, (t, s) = Measurement(clip(x0), clip), 3.0, (0.5, 0.3)
    found = CPiGDM(VP, [t, s], weight=w)(prior, given, fixed(z))
    (alpha, sigma), (alpha_s, sigma_s) = ((float(v) for v in VP(u)) for u in (t, s))
    x = alpha * clip.pinv(given.y) + sigma * z
    slope = 0.3 * alpha / (0.3 * alpha**2 + sigma**2)  # of D; of eps below
    d, eps, eps_slope = slope * x, (1 - alpha * slope) / sigma * x, (1 - alpha * slope) / sigma
    u = clip.pinv(given.y) - clip.pinv(clip(d))

    def rate(tau: float) -> float:
        return w / 2 * (0.1 + 19.9 * tau) * float(VP(tau)[1]) * (float(VP(tau)[0]) / alpha_s) ** w

    leak = -quad(rate, s, t)[0]
    expected = alpha_s * (d + (1 - (alpha / alpha_s) ** w) * u) + sigma_s * eps + alpha_s * leak * eps_slope * u
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="Clip is not linear; lambda must be 0"):
        CPiGDM(VP, [t, s], weight=w, lam=0.5)(prior, given, fixed(z))
    with pytest.raises(ValueError, match="Clip is not linear, and this method knows it without noise alone"):
        CPiGDM(VP, [t, s], weight=w)(prior, Measurement(given.y, clip, 0.1), fixed(z))


def test_bad_input_is_said_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"w = 1e\+06 damps the residual by .* overflow; use w < "):
        CPiGDM(VP, Uniform(start=0.6), 6, weight=1e6)
    with pytest.raises(ValueError, match="positive, got 0"):
        CPiGDM(VP, Uniform(start=0.6), 6, weight=0.0)
    with pytest.raises(ValueError, match=r"CPiGDM needs a path with .* = 1, not ConditionalOT"):
        CPiGDM(OT, Uniform(start=0.6), 6)
    with pytest.raises(ValueError, match=r"CPiGFM needs a path with .* = 1, not VariancePreserving"):
        CPiGFM(VP, Uniform(start=0.6), 6)
    with pytest.raises(ValueError, match="CPiGFM starts where there is signal, not at t = 1"):
        CPiGFM(OT, Uniform(start=1.0), 6)
    with pytest.raises(ValueError, match=r"the order is 1, or 2 with lambda = 0; got 2 with lambda = 0\.5"):
        CPiGDM(VP, Uniform(start=0.6), 6, lam=0.5, order=2)
    with pytest.raises(ValueError, match="Heun's step is of order 2, got heun=true with order=1"):
        CPiGDM(VP, Uniform(start=0.6), 6, heun=True)
    with pytest.raises(ValueError, match="frozen is velocity or noise, got 'x'"):
        CPiGFM(OT, Uniform(start=0.8), 6, frozen="x")
