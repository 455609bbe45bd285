"""Methods with a loop of their own: PiGDM, DPS, DDNM, DDRM, RED-diff, DiffPIR, FlowDPS."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from steadyflow import guidance
from steadyflow.denoisers import CountedDenoiser, Denoiser, Gaussian
from steadyflow.grids import Uniform
from steadyflow.linear import Blur, Clip, Inpainting
from steadyflow.noise import NoiseSource
from steadyflow.paths import ConditionalOT, VariancePreserving
from steadyflow.restorers import (
    DDNM,
    DDRM,
    DPS,
    CPiGDM,
    CPiGFM,
    DiffPIR,
    FlowDPS,
    GuidedSampler,
    Measurement,
    PiGDM,
    REDDiff,
    Restorer,
)
from steadyflow.samplers import Euler

VP, OT = VariancePreserving(), ConditionalOT()
SHAPE = (1, 2, 3)


def _random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Wavy(Denoiser):
    """A denoiser without any structure: its Jacobian is not symmetric."""

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) / (alpha + sigma) @ (0.5 * _random(6, 6, seed=9))).reshape(x.shape)


class Truth(Denoiser):
    """Knows the image, and that no gradient is asked of it."""

    def __init__(self, image: Tensor):
        super().__init__()
        self.image = image

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return self.image.expand_as(x)


@pytest.fixture
def measured(dense: type) -> Callable[..., Measurement]:
    def make(sigma_y: float, count: int = 3) -> Measurement:
        return Measurement(_random(count, 4, seed=2), dense(_random(4, 6, seed=1), SHAPE), sigma_y)

    return make


def fixed(z: Tensor) -> NoiseSource:
    return lambda step: z  # type: ignore[return-value]


@pytest.mark.parametrize(("sigma_y", "name"), [(0.0, "vp"), (0.3, "vp"), (0.3, "ve")])
def test_a_pigdm_step_is_ddim_and_a_gradient_that_does_not_go_past_what_it_wants(
    measured: Callable[..., Measurement], sigma_y: float, name: str
) -> None:
    given, network, z, eta, weight = measured(sigma_y), Wavy(), _random(3, *SHAPE, seed=3), 0.6, 0.5
    found = PiGDM(VP, [0.7, 0.4], weight=weight, eta=eta, init="pinv", r2=name)(network, given, fixed(z))
    (alpha, sigma), (alpha_s, sigma_s) = VP(0.7), VP(0.4)
    x = (alpha * given.operator.pinv(given.y) + sigma * z).requires_grad_()
    x0, matrix = network(x, alpha, sigma), given.operator.matrix  # type: ignore[attr-defined]
    r2 = sigma**2 if name == "vp" else (1 - alpha**2) / (2 - alpha**2)  # of a variance-preserving path
    law = torch.distributions.MultivariateNormal(
        given.operator(x0), r2 * matrix @ matrix.mT + sigma_y**2 * torch.eye(4, dtype=torch.float64)
    )
    (score,) = torch.autograd.grad(law.log_prob(given.y).sum(), x, retain_graph=True)
    std = eta * ((1 - alpha_s**2) / (1 - alpha**2) * (1 - alpha**2 / alpha_s**2)).sqrt()  # Song et al. 2021, Eq. 16
    eps = (x - alpha * x0) / sigma
    ddim = alpha_s * x0 + (sigma_s**2 - std**2).sqrt() * eps + std * z
    torch.testing.assert_close(found, (ddim + weight * alpha * r2 * score).detach(), rtol=1e-9, atol=1e-9)
    limited = PiGDM(VP, [0.7, 0.4], weight=1e9, eta=eta, init="pinv", r2=name)(network, given, fixed(z)) - ddim
    past = torch.autograd.functional.jvp(lambda x: network(x, alpha, sigma), x.detach(), limited.detach())[1]
    wanted = given.correction(x0.detach(), r2)
    share = (past * wanted).flatten(1).sum(1) / wanted.flatten(1).square().sum(1)  # of the way to it, along it
    torch.testing.assert_close(share, torch.ones_like(share), rtol=1e-9, atol=1e-9)


def test_pigdm_is_stable_where_the_prior_is_broad_and_alpha_small() -> None:
    shape, mask = (1, 4, 4), (torch.arange(16).reshape(4, 4) % 2).double()
    y = mask.float() * 10 * torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    given, noise = Measurement(y, Inpainting(shape, mask)), NoiseSource(0, [0], shape)
    found = PiGDM(VP, Uniform(), 60)(Gaussian(torch.zeros(shape), 100.0), given, noise)
    torch.testing.assert_close(mask * found, y.double(), rtol=0, atol=0.1, check_dtype=False)


def test_a_dps_step_is_ddim_and_the_gradient_of_each_norm(measured: Callable[..., Measurement]) -> None:
    given, network, z = measured(0.1), Wavy(), _random(3, *SHAPE, seed=3)
    found = DPS(VP, [0.7, 0.4], scale=0.5, eta=0.0, init="pinv")(network, given, fixed(z))
    (alpha, sigma), (alpha_s, sigma_s) = VP(0.7), VP(0.4)
    for i in range(3):
        x = (alpha * given.operator.pinv(given.y[i : i + 1]) + sigma * z[i : i + 1]).requires_grad_()
        x0 = network(x, alpha, sigma)
        (slope,) = torch.autograd.grad((given.y[i : i + 1] - given.operator(x0)).norm(), x, retain_graph=True)
        expected = alpha_s * x0 + sigma_s * (x - alpha * x0) / sigma - 0.5 * slope
        torch.testing.assert_close(found[i : i + 1], expected.detach(), rtol=1e-9, atol=1e-9)


SPECTRAL = [partial(DDNM, eta=0.0), partial(DDNM, eta=0.6), partial(DDRM, eta=0.6), partial(DDRM, eta_b=0.5)]


@pytest.mark.parametrize("path", [VP, OT])
@pytest.mark.parametrize("sigma_y", [0.0, 0.3])
@pytest.mark.parametrize("make", SPECTRAL)
def test_with_the_right_denoiser_every_direction_has_the_noise_of_the_path(
    dense: type, make: partial[DDNM], sigma_y: float, path: VariancePreserving
) -> None:
    """Singular values 2 and 0.2 and a null space: with noise, y is sharper than x_s in the first, not in the other."""
    count, image = 20000, _random(1, *SHAPE, seed=4)
    matrix = torch.zeros(2, 6, dtype=torch.float64)
    matrix[0, 1], matrix[1, 4] = 2.0, 0.2
    operator = dense(matrix, SHAPE)
    y = operator(image) + sigma_y * _random(count, 2, seed=5)
    (alpha, sigma), (alpha_s, sigma_s) = path(0.5), path(0.3)
    x, z = alpha * image + sigma * _random(count, *SHAPE, seed=6), _random(count, *SHAPE, seed=7)
    t, s = torch.tensor([0.5, 0.3], dtype=torch.float64)
    with torch.no_grad():
        found = make(path, [t, s]).update(Truth(image), x, t, s, z, Measurement(y, operator, sigma_y))
    rest = (found - alpha_s * image).flatten(1)
    error = 5 * float(sigma_s) / count**0.5
    torch.testing.assert_close(rest.mean(0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=error)
    expected = sigma_s**2 * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(rest.mT @ rest / count, expected, rtol=0, atol=8 * float(sigma_s) ** 2 / count**0.5)


@pytest.mark.parametrize("make", [DDNM, DDRM, partial(DiffPIR, weight=1.0)])
def test_noiseless_inpainting_keeps_the_known_pixels(make: Callable[..., Restorer]) -> None:
    shape, mask = (1, 4, 4), (torch.arange(16).reshape(4, 4) % 2).double()
    operator = Inpainting(shape, mask)
    y = mask.float() * torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    found = make(VP, Uniform(), 5)(
        Gaussian(torch.zeros(shape), 0.4), Measurement(y, operator), NoiseSource(0, [0, 1], shape)
    )
    torch.testing.assert_close(mask * found, y.double(), rtol=0, atol=1e-6, check_dtype=False)
    assert (found * (1 - mask)).abs().max() > 0.1


def test_a_diffpir_step_solves_its_least_squares(measured: Callable[..., Measurement]) -> None:
    given, network, z = measured(0.3), Wavy(), _random(3, *SHAPE, seed=3)
    found = DiffPIR(VP, [0.7, 0.4], weight=2.0, zeta=0.25, init="pinv")(network, given, fixed(z))
    (alpha, sigma), (alpha_s, sigma_s) = VP(0.7), VP(0.4)
    x = alpha * given.operator.pinv(given.y) + sigma * z
    # the step is affine in x_0: undo it, and ask the objective for its gradient there
    share = sigma_s * 0.75**0.5 / sigma
    x0 = ((found - share * x - sigma_s * 0.5 * z) / (alpha_s - share * alpha)).requires_grad_()
    data = (given.y - given.operator(x0)).square().sum() / (2 * 0.3**2)
    near = (x0 - network(x, alpha, sigma)).square().sum() * 2.0 * alpha**2 / sigma**2 / 2
    (gradient,) = torch.autograd.grad(data + near, x0)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


def test_a_flow_dps_step_moves_the_clean_end_along_the_flow(measured: Callable[..., Measurement]) -> None:
    """Written with the velocity: the clean end x - t v, the noisy end x + (1 - t) v, and two gradients by autograd."""
    given, network, z, t, s = measured(0.1), Wavy(), _random(3, *SHAPE, seed=3), 0.7, 0.4
    found = FlowDPS(OT, [t, s], scale=0.7, descents=2, init="pinv")(network, given, fixed(z))
    x = (1 - t) * given.operator.pinv(given.y) + t * z
    velocity = (x - network(x, *OT(t))) / t
    clean, noisy = x - t * velocity, x + (1 - t) * velocity
    moved = clean
    for _ in range(2):
        moved = moved.detach().requires_grad_()
        (slope,) = torch.autograd.grad((given.y - given.operator(moved)).square().sum() / 2, moved)
        bends = given.operator(slope).flatten(1).square().sum(1)
        moved = moved - (0.7 * slope.flatten(1).square().sum(1) / bends).reshape(-1, 1, 1, 1) * slope
    clean = (1 - t) * clean + t * moved.detach()
    expected = (1 - s) * clean + s * (s**0.5 * noisy + (1 - s) ** 0.5 * z)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_red_diff_is_adam_on_the_source_s_loss(measured: Callable[..., Measurement]) -> None:
    given, network, times = measured(0.1), Wavy(), [0.9, 0.6, 0.3, 0.1, 0.0]
    noise = NoiseSource(0, range(3), SHAPE, dtype=torch.float64)
    found = REDDiff(VP, times, weight=0.3, lr=0.05, means=False)(network, given, noise)
    mu = given.operator.pinv(given.y).clone().requires_grad_()
    adam = torch.optim.Adam([mu], lr=0.05, betas=(0.9, 0.99))
    for k, t in enumerate(times[:-1]):
        (alpha, sigma), z = VP(t), noise(k + 1)
        with torch.no_grad():
            x = alpha * mu + sigma * z
            eps = (x - alpha * network(x, alpha, sigma)) / sigma
        fit = (given.y - given.operator(mu)).square().sum() / 2
        adam.zero_grad()
        (fit + 0.3 * sigma / alpha * ((eps - z) * mu).sum()).backward()
        adam.step()
    torch.testing.assert_close(found, mu.detach(), rtol=1e-7, atol=1e-7)


def test_red_diff_counts_means_over_what_is_measured() -> None:
    shape, mask = (1, 4, 4), (torch.arange(16).reshape(4, 4) % 4 > 0).double()
    y, noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)), NoiseSource(0, [0, 1], shape)
    given = Measurement(mask.float() * y, Inpainting(shape, mask))
    by_means, by_sums = (
        REDDiff(VP, Uniform(), 3, **options)(Gaussian(torch.zeros(shape), 0.4), given, noise)
        for options in ({"weight": 0.4}, {"weight": 0.3, "means": False})
    )
    assert torch.equal(by_means, by_sums)


METHODS: dict[str, Callable[[], Restorer]] = {
    "pigdm": lambda: PiGDM(VP, Uniform(), 4),
    "dps": lambda: DPS(VP, Uniform(), 4, scale=0.3),
    "ddnm": lambda: DDNM(VP, Uniform(), 4),
    "ddrm": lambda: DDRM(VP, Uniform(), 4),
    "red_diff": lambda: REDDiff(VP, Uniform(end=0, zero=False), 4),
    "diffpir": lambda: DiffPIR(VP, Uniform(), 4),
    "diffpir_ot": lambda: DiffPIR(OT, Uniform(), 4),
    "flow_dps": lambda: FlowDPS(OT, Uniform(end=0, zero=False), 4),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_is_its_samples_one_by_one_at_one_evaluation_a_step(name: str) -> None:
    shape = (1, 8, 8)
    operator, prior = Blur(shape, std=1.0, size=5), Gaussian(torch.zeros(shape), 0.4)
    y, noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)), NoiseSource(0, [3, 5], shape)
    counted = CountedDenoiser(prior)
    together = METHODS[name]()(counted, Measurement(y, operator, 0.1), noise)
    assert counted.rows == 8
    for i in (0, 1):
        given = Measurement(y[i : i + 1], operator, 0.1)
        alone = METHODS[name]()(prior, given, NoiseSource(0, noise.index[i : i + 1], shape))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


class Watched(Denoiser):
    """Counts its evaluations, those under autograd, and the vector-Jacobian products taken of them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.graphs = self.products = 0

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        self.calls, self.graphs = self.calls + 1, self.graphs + torch.is_grad_enabled()
        out = 0.3 * torch.tanh(x / (alpha + sigma))
        if out.requires_grad:
            out.register_hook(self._product)
        return out

    def _product(self, _: Tensor) -> None:
        self.products += 1


GUIDED: dict[str, Callable[[], Restorer]] = {
    "ot_ode": lambda: GuidedSampler(Euler(OT, Uniform(0.8), 4), guidance.PiGDM),
    "vp_ode": lambda: GuidedSampler(Euler(VP, Uniform(0.6), 4), partial(guidance.PiGDM, gamma="vp_ode")),
    "nrsd": lambda: GuidedSampler(Euler(OT, Uniform(0.8), 4), guidance.NRSD),
    "guided_dps": lambda: GuidedSampler(Euler(OT, Uniform(0.8), 4), partial(guidance.DPS, weight=1.0)),
    "guided_ddnm": lambda: GuidedSampler(Euler(OT, Uniform(0.8), 4), guidance.DDNM),
    "c_pigdm": lambda: CPiGDM(VP, Uniform(0.6), 4, denoise_last=False),
    "c_pigdm_denoised": lambda: CPiGDM(VP, Uniform(0.6), 4),
    "c_pigfm": lambda: CPiGFM(OT, Uniform(0.8), 4, order=2),
}
PRODUCTS = dict.fromkeys(("pigdm", "dps", "ot_ode", "vp_ode", "nrsd", "guided_dps", "c_pigdm", "c_pigfm"), 4)


@pytest.mark.parametrize("name", [*METHODS, *GUIDED])
def test_a_step_takes_one_product_with_the_jacobian_or_builds_no_graph(name: str) -> None:
    shape, watched = (1, 4, 4), Watched()
    operator = Inpainting(shape, (torch.arange(16).reshape(4, 4) % 2).double())
    y = operator(torch.randn(2, *shape, generator=torch.Generator().manual_seed(1)))
    found = {**METHODS, **GUIDED}[name]()(watched, Measurement(y, operator), NoiseSource(0, [0, 1], shape))
    products = {**PRODUCTS, "c_pigdm_denoised": 3}.get(name, 0)
    assert (watched.calls, watched.graphs, watched.products) == (4, products, products)
    assert not found.requires_grad


@pytest.mark.parametrize("name", ["pigdm", "ddnm", "ddrm", "red_diff", "diffpir"])
def test_the_restored_image_fits_the_measurement(name: str) -> None:
    """x_0 ~ N(0, 0.4 I) seen through a mask with noise 0.1: the residual is of the size of the noise."""
    shape, mask = (1, 8, 8), (torch.arange(64).reshape(8, 8) % 3 > 0).double()
    operator, prior = Inpainting(shape, mask), Gaussian(torch.zeros(shape), 0.4)
    image = 0.4**0.5 * torch.randn(1, *shape, generator=torch.Generator().manual_seed(1))
    y = operator(image + 0.1 * torch.randn(1, *shape, generator=torch.Generator().manual_seed(2)))
    methods = {
        **METHODS,
        "pigdm": lambda: PiGDM(VP, Uniform(), 40),
        "ddnm": lambda: DDNM(VP, Uniform(), 40),
        "ddrm": lambda: DDRM(VP, Uniform(), 40),
        "red_diff": lambda: REDDiff(VP, Uniform(), 100, weight=0.02),
    }
    found = methods[name]()(prior, Measurement(y, operator, 0.1), NoiseSource(0, [0], shape))
    residual = (operator(found) - y).square().sum().div(mask.sum()).sqrt().item()
    assert residual < 0.25, residual


def test_bad_input_is_said_in_one_line(measured: Callable[..., Measurement]) -> None:
    with pytest.raises(ValueError, match=r"need 0 <= eta <= 1, got 1\.5"):
        DDRM(VP, Uniform(), 4, eta=1.5)
    with pytest.raises(ValueError, match="need 0 <= zeta <= 1, got -1"):
        DiffPIR(VP, Uniform(), 4, zeta=-1)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        PiGDM(VP, Uniform(), 4, weight=0)
    with pytest.raises(ValueError, match="must be positive, got 0"):
        DPS(VP, Uniform(), 4, scale=0)
    with pytest.raises(ValueError, match="lambda must be positive"):
        DiffPIR(VP, Uniform(), 4, weight=0)
    with pytest.raises(ValueError, match=r"need weight >= 0 and lr > 0, got 0\.25 and 0"):
        REDDiff(VP, Uniform(), 4, lr=0)
    with pytest.raises(ValueError, match="init is y or pinv, got 'noise'"):
        REDDiff(VP, Uniform(), 4, init="noise")
    with pytest.raises(ValueError, match="init is one of noise, y, pinv, nearest, got 'x'"):
        DDNM(VP, Uniform(), 4, init="x")
    with pytest.raises(ValueError, match=r"FlowDPS needs a path with alpha \+ sigma = 1, not VariancePreserving"):
        FlowDPS(VP, Uniform(), 4)
    with pytest.raises(ValueError, match="need 0 < scale < 2 and descents >= 1, got 0 and 3"):
        FlowDPS(OT, Uniform(), 4, scale=0)
    clip = Clip((1, 2, 2))
    for name, sigma_y in (("ddrm", 0.0), ("red_diff", 0.0), ("flow_dps", 0.0), ("ddnm", 0.1)):
        bent = Measurement(torch.zeros(1, 1, 2, 2), clip, sigma_y)
        with pytest.raises(ValueError, match="Clip is not linear"):
            METHODS[name]()(Gaussian(torch.zeros(1, 2, 2), 1.0), bent, NoiseSource(0, [0], (1, 2, 2)))


def test_the_gradient_of_a_misfit_keeps_its_precision_under_autocast() -> None:
    x = torch.linspace(-1, 1, 36).reshape(1, 1, 6, 6)
    measurement = Measurement(0 * x, Blur((1, 6, 6), std=1.0, size=3))
    with torch.autocast("cpu", torch.bfloat16):
        norm, slope = measurement.misfit(x)
    blurred = measurement.operator(x)
    torch.testing.assert_close(slope, measurement.operator.adjoint(blurred) / norm, rtol=1e-5, atol=1e-6)
