"""DEIS: Adams-Bashforth and Runge-Kutta methods for the probability flow as d(x / alpha) = eps d(sigma / alpha)."""

from collections.abc import Callable, Sequence
from itertools import count

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath, accumulate, combine, expand
from steadyflow.samplers.adams import Variable, adams_integrals
from steadyflow.samplers.multistep import NoiseMultistep
from steadyflow.samplers.sampler import Coefficients, OneStepSampler, Progress, Sampler

VARIABLES: dict[str, Variable] = {"tab": "t", "rhoab": "rho", "log_rhoab": "log_rho"}


class DEIS(Sampler):
    """The probability flow is d(x / alpha) = eps d rho, rho = sigma / alpha, so a step t_n -> t_{n+1} is exactly

        x_{n+1} = (alpha_{n+1} / alpha_n) x_n + alpha_{n+1} int_{rho_n}^{rho_{n+1}} eps d rho

    and only eps = (x - alpha D) / sigma is approximated:

        tab         by the polynomial in t through its last order + 1 values      (Eq. 6.13-6.15)
        rhoab       the same in rho                                               (Eq. 6.17)
        log_rhoab   the same in log rho (not in the source)
        rho_rk      by a Runge-Kutta method in rho: heun2, kutta3 or rk4          (Eq. 6.17);  dpm2, dpm3: DPM-Solver's

    `order` of an AB variant is the degree of the polynomial, as in the source: 0 is DDIM, and tAB3 converges with order
    4. Other libraries count the values (diffusers' solver_order=3 is order=2 here). The first steps use what values
    there are; that caps the order of convergence as N grows at 2 on some paths, but not the accuracy at few steps.
    AB takes one denoiser call a step, heun2 and dpm2 2, kutta3 and dpm3 3, rk4 4, but a step to sigma = 0 or from
    alpha = 0 takes one.

    Choose the grid by its variable: tab with quadratic, log_rhoab and rho_rk with log_snr or karras.
    Source: Zhang & Chen 2023 (DEIS); Zhang 2023, Section 6.3-6.4 and Algorithm 5.

    Args:
        path, grid, steps: see OneStepSampler.
        variant: tab, rhoab, log_rhoab or rho_rk.
        order: 0..3 for AB; heun2, kutta3, rk4, dpm2 or dpm3 for rho_rk.
        nfe: a budget of denoiser calls in place of steps: the fewest steps that reach it.
        lower_final: of AB, use fewer values at the end, one in the last step and two in the one before, for any number
            of steps: steadier where the last steps are long in the variable, but for N to infinity the order is 2.

    Raises:
        ValueError: an unknown variant, an order that it does not have, or nfe with a list of times.
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        variant: str = "tab",
        order: int | str = 3,
        nfe: int | None = None,
        lower_final: bool = False,
    ):
        if variant == "rho_rk":
            calls = RungeKutta.calls_of(order)
        elif variant in VARIABLES:
            calls = 1
        else:
            raise ValueError(f"variant must be tab, rhoab, log_rhoab or rho_rk, got {variant}")
        if nfe is not None and not (isinstance(grid, Grid) and nfe >= 1):
            raise ValueError(f"nfe must be a positive number of calls, on a grid that is a rule; got nfe = {nfe}")

        def build(steps: int | None) -> AdamsBashforth | RungeKutta:
            if variant == "rho_rk":
                return RungeKutta(path, grid, steps, order)
            return AdamsBashforth(path, grid, steps, variant, order, lower_final)

        self.method = (
            build(steps)
            if nfe is None
            else next(method for steps in count(-(-nfe // calls)) if (method := build(steps)).nfe >= nfe)
        )

    @property
    def path(self) -> GaussianPath:
        return self.method.path

    @property
    def times(self) -> Tensor:
        return self.method.times

    @property
    def steps(self) -> int:
        return self.method.steps

    @property
    def nfe(self) -> int:
        """The denoiser calls of a sample."""
        return self.method.nfe

    def __call__(
        self,
        denoiser: Denoiser,
        noise: NoiseSource,
        *,
        start: Tensor | None = None,
        progress: Progress | None = None,
        **condition: Tensor,
    ) -> Tensor:
        return self.method(denoiser, noise, start=start, progress=progress, **condition)


class AdamsBashforth(NoiseMultistep):
    """tAB, rhoAB and log-rho AB of DEIS: W_nj = int_{rho_n}^{rho_{n+1}} L_nj d rho, L_nj the Lagrange basis on
    t_n, ..., t_{n-order} in t, rho or log rho.

    A step to sigma = 0 in log rho, and a value at rho = infinity in rho or log rho, have no polynomial: the order is
    lower there.

    Args:
        path, grid, steps: see OneStepSampler.
        variant: tab, rhoab or log_rhoab.
        order: the degree, 0..3.
        lower_final: see DEIS.

    Attributes:
        quadrature_error: the estimated error of the coefficients, times alpha: of what is added to x for eps of size 1.
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        variant: str = "tab",
        order: int | str = 3,
        lower_final: bool = False,
    ):
        super().__init__(path, grid, steps)
        if order not in (0, 1, 2, 3):
            raise ValueError(f"the order of {variant} must be 0, 1, 2 or 3, got {order}")
        degree = int(order)
        weights, error = adams_integrals(path, self.times, range(1, degree + 1), VARIABLES[variant], None, lower_final)
        self.quadrature_error = float((path(self.times[1:])[0] * error).max())
        self.table = self.rows(weights)


class IPNDM(NoiseMultistep):
    """DDIM with eps replaced by the Adams-Bashforth mean of its last values, as if the steps were equal:

        e = eps_n;  (3 eps_n - eps_{n-1}) / 2;  (23 eps_n - 16 eps_{n-1} + 5 eps_{n-2}) / 12;
            (55 eps_n - 59 eps_{n-1} + 37 eps_{n-2} - 9 eps_{n-3}) / 24         for order 0, 1, 2, 3
        x_{n+1} = (alpha_{n+1} / alpha_n) x_n + (sigma_{n+1} - sigma_n alpha_{n+1} / alpha_n) e

    No integrals, at the price of the order: it converges with order 2 for every order >= 1, but on a grid uniform in
    rho, where it is rhoAB. Source: Zhang & Chen 2023 (iPNDM, Appendix H.2); Liu et al. 2022 (PNDM), Eq. 12.

    Args:
        path, grid, steps: see OneStepSampler. One denoiser call a step.
        order: 0..3, the number of past values.
    """

    PAST = ((), (-1 / 2,), (-16 / 12, 5 / 12), (-59 / 24, 37 / 24, -9 / 24))

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        order: int = 3,
    ):
        super().__init__(path, grid, steps)
        if order not in (0, 1, 2, 3):
            raise ValueError(f"order must be 0, 1, 2 or 3, got {order}")
        rho = path.ratio(self.times)
        weights = rho.new_zeros(self.steps, order)
        for n in range(1, self.steps):
            past = self.PAST[min(n, order)]
            weights[n, : len(past)] = (rho[n + 1] - rho[n]) * rho.new_tensor(past)
        self.table = self.rows(weights)


class RungeKutta(OneStepSampler):
    """rho RK-DEIS: a Runge-Kutta method for z = x / alpha, dz / d rho = eps(alpha z), of nodes rho_i and weights w_ij:

        eps_i = eps(alpha(rho_i) [z + sum_j w_ij eps_j], rho_i),   x_s = alpha_s [z + sum_j w_j eps_j]

    heun2, kutta3 and rk4 are Heun's method, Kutta's of order 3 and the classical one of order 4 in rho, w = (rho_s -
    rho_t) a; dpm2 and dpm3 are DPM-Solver's, which have their nodes in log rho (see `DPMSolver`). The digit is the
    order and the number of calls. A step to sigma_s = 0, where eps says nothing, or from alpha_t = 0, where rho is
    infinite, is DDIM's.

    Args:
        path, grid, steps: see OneStepSampler.
        order: heun2, kutta3, rk4, dpm2 or dpm3.
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        order: int | str = "heun2",
    ):
        super().__init__(path, grid, steps)
        self.calls, self.stages = self.calls_of(order), METHODS[str(order)]

    @classmethod
    def calls_of(cls, order: int | str) -> int:
        """The calls of a step."""
        if order not in METHODS:
            raise ValueError(f"the order of rho_rk must be {', '.join(METHODS)}, got {order}")
        return int(str(order)[-1])

    @property
    def nfe(self) -> int:
        """The denoiser calls of a sample."""
        single = self.single(self.times[:-1], self.times[1:])
        return int(torch.where(single, 1, self.calls).sum())

    def single(self, t: Tensor, s: Tensor) -> Tensor:
        """Where a step is DDIM's; alpha(1) = 0 to rounding counts as 0."""
        return (self.path(s)[1] == 0) | (self.path.ratio(t) > 1e8)

    def coefficients(self, t: Tensor, s: Tensor) -> Coefficients:
        """single, alpha, sigma; keep and pull of DDIM; then of each further node and the end alpha_i, sigma_i,
        alpha_i / alpha and alpha_i w_ij."""
        (a_t, s_t), (a_s, s_s) = self.path(t), self.path(s)
        keep = s_s / s_t
        out = [self.single(t, s), a_t, s_t, keep, a_s - keep * a_t]
        end = self.path.ratio(s)
        for rho, weights in self.stages(self.path.ratio(t), end):
            a_i, s_i = (a_s, s_s) if rho is end else self.path(self.path.time_at(rho))
            out += [a_i, s_i, a_i / a_t, *(a_i * w for w in weights)]
        return tuple(out)

    def update(
        self, denoiser: Denoiser, x: Tensor, coefficients: Coefficients, z: Tensor | None, **condition: Tensor
    ) -> Tensor:
        single, alpha, sigma, keep, pull, *rest = coefficients
        if single.any() and not single.all():  # a batch of mixed times: some rows need one call, some more
            out = torch.empty_like(x)
            for rows in (single.nonzero()[:, 0], (~single).nonzero()[:, 0]):
                part = tuple(c[rows] for c in coefficients)
                given = {name: value[rows] for name, value in condition.items()}
                out[rows] = self.update(denoiser, x[rows], part, None, **given)
            return out
        x0 = denoiser(x, alpha, sigma, **condition)
        if single.all():
            return combine(keep, x, pull, x0)
        eps = [combine(1 / sigma, x, -alpha / sigma, x0)]

        def node(grow: Tensor, *weights: Tensor) -> Tensor:
            y = expand(grow, x) * x
            for w, e in zip(weights, eps, strict=True):
                if w.any():
                    y = accumulate(y, w, e)
            return y

        for i in range(1, self.calls):
            a_i, s_i, *own = rest[: 3 + i]
            rest = rest[3 + i :]
            y = node(*own)
            eps.append(combine(1 / s_i, y, -a_i / s_i, denoiser(y, a_i, s_i, **condition)))
        return node(*rest[2:])


Stages = list[tuple[Tensor, list[Tensor]]]  # of each node after the first and of the end: rho_i and (w_i0, w_i1, ...)


def classical(nodes: list[float], matrix: list[list[float]]) -> Callable[[Tensor, Tensor], Stages]:
    """The stages from rho to `end` of a tableau: c of the nodes after the first; a of them, and b as its last row."""

    def stages(rho: Tensor, end: Tensor) -> Stages:
        delta = end - rho
        at = [end if c == 1 else rho + c * delta for c in (*nodes, 1)]
        return [(r, [a * delta for a in row]) for r, row in zip(at, matrix, strict=True)]

    return stages


def dpm2(rho: Tensor, end: Tensor) -> Stages:
    """The midpoint rule, the midpoint in log rho. Source: Lu et al. 2022 (DPM-Solver), Algorithm 1."""
    middle = torch.sqrt(rho * end)
    return [(middle, [middle - rho]), (end, [torch.zeros_like(rho), end - rho])]


def dpm3(rho: Tensor, end: Tensor) -> Stages:
    """eps linear in log rho through its first value and the last, integrated exactly; nodes at thirds of the step in
    log rho. Source: Lu et al. 2022 (DPM-Solver), Algorithm 2."""
    h = torch.log(rho / end)

    def slope(to: Tensor, node: float) -> Tensor:
        """int_rho^to log(rho / r) dr / (node h): the weight of eps_node - eps_0."""
        u = torch.log(rho / to)
        return to * (u - torch.expm1(u)) / (node * h)

    first, second = rho * torch.exp(-h / 3), rho * torch.exp(-2 * h / 3)
    w, v = slope(second, 1 / 3), slope(end, 2 / 3)
    return [
        (first, [first - rho]),
        (second, [second - rho - w, w]),
        (end, [end - rho - v, torch.zeros_like(v), v]),
    ]


METHODS: dict[str, Callable[[Tensor, Tensor], Stages]] = {
    "heun2": classical([1], [[1], [1 / 2, 1 / 2]]),
    "kutta3": classical([1 / 2, 1], [[1 / 2], [-1, 2], [1 / 6, 2 / 3, 1 / 6]]),
    "rk4": classical([1 / 2, 1 / 2, 1], [[1 / 2], [0, 1 / 2], [0, 0, 1], [1 / 6, 1 / 3, 1 / 3, 1 / 6]]),
    "dpm2": dpm2,
    "dpm3": dpm3,
}
