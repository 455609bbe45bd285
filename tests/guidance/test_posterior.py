"""PiGDM, NRSD, DDNM and DPS against Gaussian conditioning, automatic differentiation and each other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from steadyflow.denoisers import CountedDenoiser, Denoiser, Gaussian
from steadyflow.guidance import DDNM, DPS, NRSD, PiGDM
from steadyflow.paths import ConditionalOT, VariancePreserving
from steadyflow.restorers import Measurement
from steadyflow.samplers import DDIM

SHAPE = (1, 2, 3)
EYE = torch.eye(6, dtype=torch.float64)


def _random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Wavy(Denoiser):
    """A denoiser without any structure: its Jacobian is not symmetric."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(0.5 * _random(6, 6, seed=9))

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        scale = (alpha + sigma).reshape(-1, 1)
        return torch.tanh(x.flatten(1) / scale @ self.weight).reshape(x.shape)


@pytest.fixture
def measured(dense: type) -> Callable[..., Measurement]:
    def make(sigma_y: float, count: int = 5) -> Measurement:
        return Measurement(_random(count, 4, seed=2), dense(_random(4, 6, seed=1), SHAPE), sigma_y)

    return make


LEVELS = [
    torch.tensor([0.9, 0.6, 0.3, 0.1, 1.0], dtype=torch.float64),
    torch.tensor([0.1, 0.5, 0.7, 0.9, 2.0], dtype=torch.float64),
]


@pytest.mark.parametrize(("sigma_y", "name", "k"), [(0.0, "vp", 1), (0.3, "vp", 1), (0.0, "ve", 2), (0.3, "ve", 2)])
def test_pigdm_adds_the_gradient_of_the_gaussian_log_likelihood(
    measured: Callable[..., Measurement], sigma_y: float, name: str, k: int
) -> None:
    given, network, x = measured(sigma_y), Wavy(), _random(5, *SHAPE, seed=3)
    (alpha, sigma), matrix = LEVELS, given.operator.matrix  # type: ignore[attr-defined]
    r2 = sigma**2 / (alpha**2 + k * sigma**2)
    covariance = r2.reshape(-1, 1, 1) * (matrix @ matrix.mT) + sigma_y**2 * torch.eye(4, dtype=torch.float64)
    x.requires_grad_()
    x0 = network(x, alpha, sigma)
    law = torch.distributions.MultivariateNormal(given.operator(x0), covariance)
    (gradient,) = torch.autograd.grad(law.log_prob(given.y).sum(), x)
    x.requires_grad_(False)
    factors = {
        "constant": torch.ones(5, dtype=torch.float64),
        "adaptive": r2,
        "conjugate": r2 * alpha**2,
        "vp_ode": (alpha / (alpha**2 + sigma**2)).sqrt(),
    }
    for gamma, factor in factors.items():
        found = PiGDM(network, given, weight=0.7, gamma=gamma, r2=name)(x, alpha, sigma)
        change = (0.7 * factor * sigma**2 / alpha).reshape(-1, 1, 1, 1) * gradient
        torch.testing.assert_close(found, x0.detach() + change, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sigma_y", [0.0, 0.3])
@pytest.mark.parametrize("guidance", [PiGDM, DDNM])
def test_guidance_is_exact_for_a_prior_of_unit_covariance(
    measured: Callable[..., Measurement], guidance: type[PiGDM] | type[DDNM], sigma_y: float
) -> None:
    given, mean, x = measured(sigma_y), _random(*SHAPE, seed=5), _random(5, *SHAPE, seed=3)
    (alpha, sigma), matrix = LEVELS, given.operator.matrix  # type: ignore[attr-defined]
    found = guidance(Gaussian(mean, 1.0), given)(x, alpha, sigma)
    for i in range(5):  # x_0 given x = alpha x_0 + sigma eps and y = A x_0 + sigma_y n, by conditioning on both at once
        both = torch.cat([alpha[i] * EYE, matrix])
        noise = torch.cat([sigma[i].expand(6), torch.full((4,), sigma_y, dtype=torch.float64)]).square().diag()
        gain = both.mT @ torch.linalg.inv(both @ both.mT + noise)
        seen = torch.cat([x[i].flatten(), given.y[i]])
        expected = mean.flatten() + gain @ (seen - both @ mean.flatten())
        torch.testing.assert_close(found[i].flatten(), expected, rtol=1e-9, atol=1e-9)


def test_guidance_at_pure_noise_is_that_of_the_prior(measured: Callable[..., Measurement]) -> None:
    given, factor = measured(0.3), _random(6, 6, seed=6)
    covariance, mean = factor @ factor.mT / 6, _random(*SHAPE, seed=5)
    matrix = given.operator.matrix  # type: ignore[attr-defined]
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    found = PiGDM(Gaussian(mean, covariance), given)(_random(5, *SHAPE), zero, one)
    inverse = torch.linalg.inv(matrix @ matrix.mT + 0.09 * torch.eye(4, dtype=torch.float64))
    residual = given.y - mean.flatten() @ matrix.mT
    expected = mean.flatten() + residual @ (covariance @ matrix.mT @ inverse).mT
    torch.testing.assert_close(found.flatten(1), expected, rtol=0, atol=0.02)  # at sigma / alpha = 1000


@pytest.mark.parametrize(
    "guide", [lambda d, m: PiGDM(d, m), lambda d, m: PiGDM(d, m, 0.5, "adaptive"), lambda d, m: DDNM(d, m)]
)
def test_paths_that_share_their_noise_levels_share_the_trajectory(
    measured: Callable[..., Measurement], guide: Callable[[Denoiser, Measurement], Denoiser]
) -> None:
    given, start, vp, ot = measured(0.2), _random(5, *SHAPE, seed=4), VariancePreserving(), ConditionalOT()
    times = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1], dtype=torch.float64)
    same = ot.time_at(vp.ratio(times))

    def end(path: VariancePreserving | ConditionalOT, at: Tensor, guided: Denoiser) -> Tensor:
        return DDIM(path, at)(guided, None, start=path(at[0])[0] * start) / path(at[-1])[0]  # type: ignore[arg-type]

    guided = guide(Wavy(), given)
    torch.testing.assert_close(end(vp, times, guided), end(ot, same, guided), rtol=1e-10, atol=1e-10)
    bound_to_a_path = PiGDM(Wavy(), given, gamma="vp_ode")
    assert (end(vp, times, bound_to_a_path) - end(ot, same, bound_to_a_path)).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [NRSD, DDNM])
def test_without_noise_the_measured_part_is_the_measurement(
    measured: Callable[..., Measurement], guidance: type[NRSD] | type[DDNM]
) -> None:
    given, x = measured(0.0), _random(5, *SHAPE, seed=3)
    found = guidance(Wavy(), given)(x, *LEVELS)
    torch.testing.assert_close(given.operator(found), given.y, rtol=0, atol=1e-12)
    free = Wavy() if guidance is DDNM else PiGDM(Wavy(), given)
    rest = found - free(x, *LEVELS)  # the null space is the denoiser's
    torch.testing.assert_close(given.operator.project(rest), rest, rtol=0, atol=1e-12)


def test_dps_is_the_gradient_of_each_residual(measured: Callable[..., Measurement]) -> None:
    given, network, x = measured(0.0), Wavy(), _random(5, *SHAPE, seed=3)
    found = DPS(network, given, weight=2.0)(x, *LEVELS)
    alpha, sigma = LEVELS
    for i in range(5):
        z = x[i : i + 1].clone().requires_grad_()
        x0 = network(z, alpha[i], sigma[i])
        (gradient,) = torch.autograd.grad((given.y[i : i + 1] - given.operator(x0)).norm(), z)
        torch.testing.assert_close(found[i : i + 1], x0.detach() - 2 * sigma[i] ** 2 / alpha[i] * gradient)
    met = Measurement(given.operator(network(x, *LEVELS)).detach(), given.operator)  # a residual of exactly 0
    torch.testing.assert_close(DPS(network, met, weight=2.0)(x, *LEVELS), network(x, *LEVELS).detach())


GUIDES: dict[str, Callable[[Denoiser, Measurement], Denoiser]] = {
    "pigdm": lambda d, m: PiGDM(d, m),
    "nrsd": lambda d, m: NRSD(d, m),
    "dps": lambda d, m: DPS(d, m, 1.0),
    "ddnm": lambda d, m: DDNM(d, m),
}


@pytest.mark.parametrize("name", GUIDES)
def test_a_call_is_one_evaluation_needs_no_gradients_switched_on_and_leaves_none(
    measured: Callable[..., Measurement], name: str
) -> None:
    network = Wavy()
    counted, x = CountedDenoiser(network), _random(5, *SHAPE)
    with torch.no_grad():
        out = GUIDES[name](counted, measured(0.0))(x, *LEVELS)
    assert counted.rows == 5
    assert not out.requires_grad
    assert not x.requires_grad
    assert network.weight.grad is None


@pytest.mark.parametrize("name", GUIDES)
def test_a_batch_is_its_samples_one_by_one(measured: Callable[..., Measurement], name: str) -> None:
    given, x = measured(0.0), _random(5, *SHAPE)
    together = GUIDES[name](Wavy(), given)(x, *LEVELS)
    regrouped = GUIDES[name](Wavy(), given)(x[3:], LEVELS[0][3:], LEVELS[1][3:], y=given.y[3:])
    torch.testing.assert_close(regrouped, together[3:])
    for i in range(5):
        alone = Measurement(given.y[i : i + 1], given.operator)
        torch.testing.assert_close(GUIDES[name](Wavy(), alone)(x[i : i + 1], *(v[i] for v in LEVELS))[0], together[i])


def test_bad_input_is_said_in_one_line(measured: Callable[..., Measurement]) -> None:
    given = measured(0.1)
    with pytest.raises(ValueError, match="NRSD reproduces y, its noise too; it needs sigma_y=0"):
        NRSD(Wavy(), given)
    with pytest.raises(ValueError, match="gamma is one of constant, adaptive, conjugate, vp_ode"):
        PiGDM(Wavy(), given, gamma="linear")
    with pytest.raises(ValueError, match="r2 is one of vp, ve, got 'VE'"):
        PiGDM(Wavy(), given, r2="VE")
    with pytest.raises(ValueError, match="must be positive, got inf"):
        PiGDM(Wavy(), given, weight=float("inf"))
    with pytest.raises(ValueError, match="must be positive, got -1"):
        DPS(Wavy(), given, weight=-1.0)
    with pytest.raises(ValueError, match="5 measurements for 2 images"):
        PiGDM(Wavy(), given)(_random(2, *SHAPE), LEVELS[0][0], LEVELS[1][0])
