"""Conjugate integrators of the guided flow: C-PiGDM for diffusions, C-PiGFM for conditional OT flows."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser, denoise_and_pull
from steadyflow.grids import Grid
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath, combine
from steadyflow.quadrature import gauss_legendre
from steadyflow.restorers.restorer import Measurement, Restorer, posterior_variance
from steadyflow.restorers.start import starting_state
from steadyflow.samplers.sampler import Progress, Watch, time_grid

NODES = 48  # of the quadrature of a step, exact to 1e-10 as far as MAX_DAMPING
MAX_DAMPING = 600.0  # largest exponent of a step: e^-600 of the residual is left


class ConjugateIntegrator(Restorer):
    """The PiGDM-guided flow with what is linear in x, the stiff part of the guidance, solved exactly.

        D = D(x_t),   x_t = m D + n f,   u = A^+ y - A^+ A D,   zeta = (df/dx)^T K_t u
        x_s = m' D + Y u + n' f + Z zeta                                          (m', n' at s; m, n at t or tau)
        Y = m' (1 - exp(-int_s^t c_i)),   Z = -int_s^t c n m' exp(-int_s^tau c_i) dtau

    The subclass chooses f, which a step freezes, and that fixes c, the rate at which a guidance of weight
    w alpha^2 r^2 damps what was measured. Y and Z are functions of A^T A: c_i = c r^2 / (r^2 + sigma_y^2 / s_i^2) in
    the direction of singular value s_i, 0 in the null space, and K_t = c_i / c at t. So a step is DDIM (for the
    velocity, Euler) with a corrected denoiser and one Jacobian term: one evaluation, one vector-Jacobian product, and
    no transform of x. A linear term lambda x, stepped by Euler, shifts what is exact: with a = e^(lambda (tau - s))
    (m' / m) exp(-int_s^tau c_i), h = s - t, and time in the paper's direction,

        Y = m' - m a_t - lambda int_t^s m a,   Z = -int c n m a,   n' + lambda (h n a_t - int_t^s n a) before f,
        (1 + lambda h) m a_t + Y before D

    Without noise an operator need not be linear: then everything has the factors of what is measured, lambda 0
    (heuristic: most of such an image is measured, and the factor of zeta in the null space grows with w).

    Of order 2, f and zeta are not frozen but continued on the line through the step before (from r > t), an
    Adams-Bashforth step of the same cost: with g = (t - tau) / (r - t), and lambda 0, the step adds

        (n' g_s - int_s^t n (m' / m) exp(-int_s^tau c_i) |dg|) (f - f_r) - (int_s^t c n m' exp(...) g) (zeta - zeta_r)

    or, Heun's for two calls a step, on the line to where that of order 1 ends, r = s. A step to t = 0, where f is not
    defined, stays of order 1.

    Source: Pandey et al. 2024 (fast samplers for inverse problems), Section 3, its transform applied step by step;
    of order 1.

    Args:
        path: where to sample; `grid` and `steps` as of OneStepSampler. The first time is tau. One evaluation a step.
        weight: w.
        lam: lambda.
        init: the start, see `starting_state`.
        denoise_last: a last step to t = 0 is D alone, without guidance (and without a vector-Jacobian product).
        order: 1 or 2, which halves the error where there are steps enough to continue on; lambda must be 0.
        heun: of order 2 by a second evaluation a step, instead of the step before.

    Raises:
        ValueError: a path of another family, a start where alpha = 0, w <= 0, or w so large that a step's
            coefficients overflow; another order, order 2 with lambda, or Heun's step of order 1.
    """

    form: str  # in errors
    direction: float  # of the paper's time

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None,
        weight: float,
        lam: float,
        init: str,
        denoise_last: bool,
        order: int,
        heun: bool,
    ):
        self.path, self.times = path, time_grid(path, grid, steps)
        self.weight, self.lam, self.init, self.denoise_last = float(weight), float(lam), init, denoise_last
        alpha, sigma = path(self.times)
        if not alpha[0] > 0:
            raise ValueError(f"{type(self).__name__} starts where there is signal, not at t = {self.times[0]:g}")
        if not torch.allclose(self.frame(-alpha.log())[0], sigma, rtol=1e-6, atol=1e-9):
            raise ValueError(f"{type(self).__name__} needs a path with {self.form}, not {type(path).__name__}")
        if not self.weight > 0:
            raise ValueError(f"the guidance weight must be positive, got {weight}")
        if order not in (1, 2) or (order == 2 and lam != 0):
            raise ValueError(f"the order is 1, or 2 with lambda = 0; got {order} with lambda = {lam:g}")
        if heun and order != 2:
            raise ValueError(f"Heun's step is of order 2, got heun=true with order={order}")
        self.order, self.heun = order, heun
        ends = torch.tensor([0, torch.inf])  # noiseless: (null space, range) of the coefficients of each step
        self.table = [self.coefficients(k, ends) for k in range(len(self.times) - 1)]

    @abstractmethod
    def frame(self, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(sigma, m, n, c / w per unit of b) where alpha = exp(-b)."""

    def coefficients(self, k: int, snr: Tensor) -> Tensor:
        """(4 or 6, *): the factors of D, u, f, zeta in step k for directions of snr = s_i^2 / sigma_y^2 (*), and of

        f - f_r and zeta - zeta_r where the order is 2 and there is an r. By Gauss-Legendre quadrature in
        sqrt(b - b_s), b = -log(alpha), in which all integrands are smooth.
        """
        snr, (t, s) = snr.double(), self.times[k : k + 2]
        shape, device = (-1, *[1] * snr.ndim), snr.device
        z, weights, integral = (v.to(device) for v in gauss_legendre(NODES))
        b_t, b_s = (-self.path(v)[0].log().to(device) for v in (t, s))
        b, db = b_s + (b_t - b_s) * z**2, 2 * (b_t - b_s) * z
        (_, m_t, n_t, _), (_, m_s, n_s, _), (sigma, m, n, rate) = map(self.frame, (b_t, b_s, b))
        sigma, m, n, rate, db, weights = (v.reshape(shape) for v in (sigma, m, n, rate, db, weights))
        ratio = (sigma**2 / (torch.exp(-2 * b).reshape(shape) + sigma**2)) * snr  # r^2 / (sigma_y^2 / s_i^2)
        pull = self.weight * rate * db  # c dtau
        damping = pull / (1 + 1 / ratio)  # c_i dtau
        depth, total = torch.tensordot(integral, damping, 1), (weights * damping).sum(0)
        if not (most := total.max().item()) < MAX_DAMPING:
            raise ValueError(
                f"w = {self.weight:g} damps the residual by e^-{most:.3g} in the step t = {t:.4g} -> {s:.4g}, and its "
                f"coefficients overflow; use w < {self.weight * MAX_DAMPING / most:.3g}"
            )
        kept, kept_t = m_s / m * torch.exp(-depth), m_s / m_t * torch.exp(-total)
        tau = self.path.time_at((sigma / torch.exp(-b).reshape(shape)).cpu())
        alpha_tau, slope = self.path(tau)[0], self.path.derivative(tau)[0]
        dtau = (alpha_tau / slope).to(device) * db * weights  # from t to s
        if self.lam == 0:
            one, jacobian = torch.ones_like(total), -(weights * pull * m * n * kept)
            rows = [m_s * one, m_s * (1 - torch.exp(-total)), n_s * one, jacobian.sum(0)]
            if self.order == 2 and (s > 0 if self.heun else k > 0):
                run = self.times[k + 1 if self.heun else k - 1] - t  # r - t
                g = ((t - tau) / run).to(device)
                rows += [(t - s) / run * n_s + (kept * n * dtau).sum(0) / run, (jacobian * g).sum(0)]
            return torch.stack(rows)
        clock, h, dtau = self.direction * self.lam, self.direction * (s - t), self.direction * dtau
        kept = kept * torch.exp(clock * (tau - s)).to(device)
        kept_t = kept_t * torch.exp(clock * (t - s))
        x, y = (1 + self.lam * h) * m_t * kept_t, m_s - m_t * kept_t - self.lam * (m * kept * dtau).sum(0)
        f = n_s + self.lam * (h * n_t * kept_t - (n * kept * dtau).sum(0))
        return torch.stack([x + y, y, f, -(weights * pull * m * n * kept).sum(0)])

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        measurement: Measurement,
        noise: NoiseSource,
        *,
        progress: Progress | None = None,
        **condition: Tensor,
    ) -> Tensor:
        x = starting_state(self.init, self.path, self.times[0], measurement, noise)
        watch = Watch(self.times, progress)
        before: list[Tensor] = []
        for k, (t, s) in enumerate(zip(self.times, self.times[1:], strict=False)):
            if self.denoise_last and s == 0:
                x = denoiser(x, *self.path(t), **condition)
            else:
                parts = self._parts(denoiser, measurement, x, t, **condition)
                changes = [new - old for new, old in zip(parts[2:], before, strict=False)]
                x = self._mix(measurement, k, [*parts, *changes])
                if self.heun and s > 0:
                    after = self._parts(denoiser, measurement, x, s, **condition)[2:]
                    x = self._mix(measurement, k, [*parts, *(v - w for v, w in zip(parts[2:], after, strict=True))])
                elif self.order == 2:
                    before = parts[2:]
            watch(x)
        watch.check()
        return x

    def _parts(
        self, denoiser: Denoiser, measurement: Measurement, x: Tensor, t: Tensor, **condition: Tensor
    ) -> list[Tensor]:
        """D, u, f, zeta at t."""
        alpha, sigma = self.path(t)
        _, m, n, _ = self.frame(-alpha.log())
        x0, pull = denoise_and_pull(denoiser, x, alpha, sigma, **condition)
        u = measurement.residual(x0)
        shrunk = u if measurement.sigma_y == 0 else measurement.correction(x0, posterior_variance(alpha, sigma))
        return [x0, u, combine(1 / n, x, -m / n, x0), combine(1 / n, shrunk, -m / n, pull(shrunk))]

    def _mix(self, measurement: Measurement, k: int, parts: list[Tensor]) -> Tensor:
        """The step's sum of functions of A^T A, each of a part: D, u, f, zeta, and the changes of the last two."""
        operator = measurement.operator
        if measurement.sigma_y > 0:
            known: list[tuple[Tensor, Tensor]] = []  # singular values and their coefficients: once for all parts

            def at(g: Tensor) -> Tensor:
                for seen, found in known:
                    if torch.equal(seen, g):
                        return found
                known.append((g, self.coefficients(k, (g / measurement.sigma_y) ** 2)))
                return known[-1][1]

            def factor(j: int, v: Tensor) -> Tensor:
                null, measured = self.table[k][j].tolist()
                return null * v if null == measured else operator.spectral(v, lambda g: at(g)[j])

            return sum((factor(j, v) for j, v in enumerate(parts)), torch.zeros_like(parts[0]))
        table = self.table[k].tolist()
        if not hasattr(operator, "spectral"):
            if self.lam:
                raise ValueError(f"{type(operator).__name__} is not linear; lambda must be 0, not {self.lam:g}")
            table = [[measured, measured] for _, measured in table]
        x, of_range = torch.zeros_like(parts[0]), []
        for j, (v, (null, measured)) in enumerate(zip(parts, table, strict=False)):
            x += (measured if j == 1 else null) * v  # u has no part in the null space
            if j != 1 and null != measured:
                of_range.append((measured - null) * v)
        return x + operator.project(sum(of_range[1:], of_range[0])) if of_range else x


class CPiGDM(ConjugateIntegrator):
    """C-PiGDM: a ConjugateIntegrator with f the noise, m = alpha, n = sigma, on a variance-preserving path.

    c = w beta / 2, so q = (alpha_t / alpha_s)^w without noise. Source: Pandey et al. 2024, Section 3.

    Args:
        path, grid, steps, weight, lam, init, denoise_last, order, heun: see ConjugateIntegrator. The paper's grid is
            uniform from tau to 1e-3, then one denoising.
    """

    form, direction = "alpha^2 + sigma^2 = 1", 1.0

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        weight: float = 4.0,
        lam: float = 0.0,
        init: str = "pinv",
        denoise_last: bool = True,
        order: int = 1,
        heun: bool = False,
    ):
        super().__init__(path, grid, steps, weight, lam, init, denoise_last, order, heun)

    def frame(self, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sigma = torch.sqrt(-torch.expm1(-2 * b))
        return sigma, torch.exp(-b), sigma, torch.ones_like(b)


class CPiGFM(ConjugateIntegrator):
    """C-PiGFM: a ConjugateIntegrator on conditional OT, alpha = 1 - t, sigma = t.

        velocity    f = dx/dt,  m = 1,      n = t,  c = w t (1 - t)      the paper's
        noise       f = eps,    m = 1 - t,  n = t,  c = w t / (1 - t)    more stable for large w and an early start

    w is not that of C-PiGDM: the same total damping takes about thirty times as much.
    Source: Pandey et al. 2024, Section 3, for flows.

    Args:
        path, grid, steps, weight, lam, init, denoise_last, order, heun: see ConjugateIntegrator. The paper's grid is
            uniform from tau < 1 to 0, and its last step is guided too.
        frozen: "velocity" or "noise".
    """

    form, direction = "alpha + sigma = 1", -1.0

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        weight: float = 20.0,
        lam: float = 0.0,
        init: str = "pinv",
        denoise_last: bool = False,
        order: int = 1,
        heun: bool = False,
        frozen: str = "velocity",
    ):
        if frozen not in ("velocity", "noise"):
            raise ValueError(f"frozen is velocity or noise, got '{frozen}'")
        self.frozen = frozen
        super().__init__(path, grid, steps, weight, lam, init, denoise_last, order, heun)

    def frame(self, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha, sigma = torch.exp(-b), -torch.expm1(-b)
        if self.frozen == "velocity":
            return sigma, torch.ones_like(b), sigma, alpha**2 * sigma
        return sigma, alpha, sigma, sigma
