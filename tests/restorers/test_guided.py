"""A sampler under guidance: OT-ODE, guided DDIM and fine guided flows against the note's values and exact posteriors.

The oracle problem: d = 4, A the means of two pairs, x_0 ~ N(0, C) with C_ij = 0.9^|i - j|, y = (0.3, -0.7), z given.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser, Gaussian
from steadyflow.grids import Grid, Uniform
from steadyflow.guidance import DDNM, DPS, NRSD, PiGDM
from steadyflow.noise import NoiseSource
from steadyflow.paths import EDM, ConditionalOT, GaussianPath, VariancePreserving
from steadyflow.restorers import GuidedSampler, Measurement
from steadyflow.samplers import DDIM, RK45, Euler, Heun

SHAPE = (1, 1, 4)
POOL = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], dtype=torch.float64)
COVARIANCE = 0.9 ** (torch.arange(4.0)[:, None] - torch.arange(4.0)).abs().double()
Y = torch.tensor([[0.3, -0.7]], dtype=torch.float64)
Z = torch.tensor([1, -0.5, 0.25, 2], dtype=torch.float64).reshape(1, *SHAPE)


def fixed(z: Tensor) -> NoiseSource:
    return lambda step: z  # type: ignore[return-value]


@pytest.fixture
def prior() -> Gaussian:
    return Gaussian(torch.zeros(SHAPE), COVARIANCE)


@pytest.fixture
def pool(dense: type) -> Callable[..., Measurement]:
    return lambda sigma_y=0.0: Measurement(Y, dense(POOL, SHAPE), sigma_y)


def test_ot_ode_gives_the_published_algorithm_s_numbers(prior: Gaussian, pool: Callable[..., Measurement]) -> None:
    sampler = Euler(ConditionalOT(), Uniform(start=0.8, end=0, zero=False), steps=10)
    found = GuidedSampler(sampler, PiGDM)(prior, pool(0.05), fixed(Z))
    expected = torch.tensor([0.542911464455, -0.0757945021076, -0.777885375458, -0.470136172918], dtype=torch.float64)
    torch.testing.assert_close(found.flatten(), expected, rtol=0, atol=1e-11)


def test_guided_ddim_gives_the_note_s_numbers(prior: Gaussian, pool: Callable[..., Measurement]) -> None:
    path = VariancePreserving()
    sampler = DDIM(path, Uniform(start=0.6, end=1e-3, zero=False), steps=5)
    x = GuidedSampler(sampler, partial(PiGDM, weight=4.0, gamma="conjugate"))(prior, pool(), fixed(Z))
    expected = torch.tensor([0.204138191045, -0.190718865662, -0.432677326807, -0.18617410333], dtype=torch.float64)
    torch.testing.assert_close(prior(x, *path(1e-3)).flatten(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("path", "start", "end", "weight", "expected"),
    [
        (VariancePreserving(), 0.6, 1e-3, 4.0, [0.3284889118, -0.2491635626, -0.3886136722, 0.09265362786]),
        (ConditionalOT(), 0.8, 0.0, 20.0, [0.5692332434, -0.1944247732, -0.7441085863, -0.4328115071]),
    ],
)
def test_a_fine_grid_reaches_the_continuous_guided_flow(
    prior: Gaussian,
    pool: Callable[..., Measurement],
    path: GaussianPath,
    start: float,
    end: float,
    weight: float,
    expected: list[float],
) -> None:
    u = torch.linspace(1, 0, 401, dtype=torch.float64)
    times = (end**0.5 + u * (start**0.5 - end**0.5)) ** 2  # uniform in sqrt(t), where VP is smooth
    sampler = Heun(path, times)
    found = GuidedSampler(sampler, partial(PiGDM, weight=weight, gamma="conjugate"))(prior, pool(), fixed(Z))
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-5)


@pytest.mark.parametrize("sigma_y", [0.0, 0.5])
@pytest.mark.parametrize("path", [ConditionalOT(), VariancePreserving()])
def test_the_law_of_a_fine_guided_flow_is_the_posterior_where_the_prior_is_white(
    pool: Callable[..., Measurement], path: GaussianPath, sigma_y: float
) -> None:
    """Proposition 1.1: x_{t_0} ~ p(x_{t_0} | y) goes to p(x_0 | y). The flow is affine: it carries laws exactly."""
    mean = torch.tensor([0.5, -1, 2, 0], dtype=torch.float64)
    posterior_gain = POOL.mT @ torch.linalg.inv(POOL @ POOL.mT + sigma_y**2 * torch.eye(2, dtype=torch.float64))
    posterior_mean = mean + posterior_gain @ (Y[0] - POOL @ mean)
    posterior_covariance = torch.eye(4, dtype=torch.float64) - posterior_gain @ POOL
    times = torch.linspace(0.8**0.5, 0, 201, dtype=torch.float64) ** 2
    alpha, sigma = path(times[0])
    start_mean = alpha * posterior_mean
    start_covariance = alpha**2 * posterior_covariance + sigma**2 * torch.eye(4, dtype=torch.float64)
    starts = torch.cat([start_mean[None], start_mean + torch.eye(4, dtype=torch.float64)])
    given = Measurement(Y.expand(5, 2), pool().operator, sigma_y)
    guided = PiGDM(Gaussian(mean.reshape(SHAPE), 1.0), given)
    ends = Heun(path, times)(guided, fixed(Z), start=starts.reshape(5, *SHAPE)).flatten(1)
    slope = (ends[1:] - ends[0]).mT
    torch.testing.assert_close(ends[0], posterior_mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(slope @ start_covariance @ slope.mT, posterior_covariance, rtol=0, atol=2e-4)


@pytest.mark.parametrize("guidance", [NRSD, DDNM])
def test_noiseless_inpainting_keeps_the_known_pixels(
    dense: type, guidance: Callable[[Denoiser, Measurement], Denoiser]
) -> None:
    shape, seen = (1, 4, 4), torch.arange(0, 16, 2)
    operator = dense(torch.eye(16, dtype=torch.float64)[seen], shape)
    y = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    for sampler in (
        Euler(ConditionalOT(), Uniform(start=0.8, end=0, zero=False), steps=6),
        DDIM(VariancePreserving(), Uniform(start=1, end=1e-3), steps=6, eta=1.0),
    ):
        noise = NoiseSource(0, range(3), shape)
        found = GuidedSampler(sampler, guidance)(Gaussian(torch.zeros(shape), 0.3), Measurement(y, operator), noise)
        torch.testing.assert_close(found.flatten(1)[:, seen], y, rtol=0, atol=1e-6)


def test_the_start_is_what_init_says(pool: Callable[..., Measurement], dense: type) -> None:
    seen: list[Tensor] = []

    class Recorder(SimpleNamespace):
        def __call__(self, denoiser: Denoiser, noise: NoiseSource, *, start: Tensor, **rest: Tensor) -> Tensor:
            seen.append(start)
            return start

    path = ConditionalOT()
    z = Z.reshape(1, 1, 2, 2)
    square = dense(POOL, (1, 2, 2))  # the mean of each row

    def start(init: str, t: float, given: Measurement) -> Tensor:
        return GuidedSampler(Recorder(path=path, times=torch.tensor([t, 0.0])), PiGDM, init)(None, given, fixed(z))  # type: ignore[arg-type]

    rows = torch.tensor([[0.3, 0.3], [-0.7, -0.7]], dtype=torch.float64)
    torch.testing.assert_close(start("pinv", 0.8, Measurement(Y, square))[0, 0], 0.2 * rows + 0.8 * z[0, 0])
    column = Measurement(Y.reshape(1, 1, 2, 1), square)
    torch.testing.assert_close(start("nearest", 0.8, column)[0, 0], 0.2 * rows + 0.8 * z[0, 0])
    torch.testing.assert_close(start("y", 0.5, Measurement(2 * z, square)), 0.5 * 2 * z + 0.5 * z)
    torch.testing.assert_close(start("noise", 1.0, column), z)
    torch.testing.assert_close(start("nearest", 1.0, column), z)  # alpha = 0: nothing of y


@pytest.mark.parametrize("grid", [Uniform(start=1, end=0, zero=False), Uniform(start=1, end=0.01)])
def test_conditional_ot_may_start_where_alpha_is_zero(pool: Callable[..., Measurement], grid: Grid) -> None:
    prior = Gaussian(torch.zeros(SHAPE), COVARIANCE)
    restore = GuidedSampler(Euler(ConditionalOT(), grid, 40), PiGDM, "noise")
    single, double = (
        restore(prior, Measurement(Y.to(dtype), pool().operator, 0.05), fixed(Z.to(dtype)))
        for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-4)
    torch.testing.assert_close(POOL @ double.flatten(), Y[0], rtol=0, atol=0.15)  # sigma_y = 0.05


def test_a_batch_is_its_samples_one_by_one(dense: type) -> None:
    operator, y = dense(POOL, SHAPE), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    prior = Gaussian(torch.zeros(SHAPE), COVARIANCE)
    sampler = DDIM(VariancePreserving(), Uniform(start=0.8), 5, eta=0.5)
    for guidance in (PiGDM, NRSD, DDNM, partial(DPS, weight=1.0)):
        restore = GuidedSampler(sampler, guidance)
        together = restore(prior, Measurement(y, operator), NoiseSource(7, range(3), SHAPE))
        for i in range(3):
            alone = restore(prior, Measurement(y[i : i + 1], operator), NoiseSource(7, [i], SHAPE))
            torch.testing.assert_close(alone[0], together[i])


def test_bad_input_is_said_in_one_line(prior: Gaussian, pool: Callable[..., Measurement]) -> None:
    late = Euler(ConditionalOT(), Uniform(start=0.8, end=0, zero=False), steps=4)
    with pytest.raises(ValueError, match=r"init=noise at t = 0.8, where sigma / alpha = 4, .* use init=pinv"):
        GuidedSampler(late, PiGDM, "noise")(prior, pool(), fixed(Z))
    with pytest.raises(ValueError, match="init is one of noise, y, pinv, nearest, got 'zeros'"):
        GuidedSampler(late, PiGDM, "zeros")
    with pytest.raises(ValueError, match="use init=pinv"):
        GuidedSampler(late, PiGDM, "y")(prior, pool(), fixed(Z))
    with pytest.raises(ValueError, match="RK45 has no grid of times"):
        GuidedSampler(RK45(EDM()), PiGDM)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"1 >= start > end >= 0, got start 1\.2"):
        Uniform(start=1.2)
