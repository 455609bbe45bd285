"""DPM-Solver, singlestep, of order 1, 2 and 3."""

from collections.abc import Sequence
from itertools import groupby

from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath
from steadyflow.samplers.ddim import DDIM
from steadyflow.samplers.deis import RungeKutta
from steadyflow.samplers.sampler import Progress, Sampler, time_grid


class DPMSolver(Sampler):
    """Steps of the probability flow d(x / alpha) = eps d rho, rho = sigma / alpha, each by itself, with h =
    log(rho_t / rho_s) and the nodes t_i at rho_i = rho_t e^(-r_i h):

        1   x_s = (alpha_s / alpha_t) x - sigma_s (e^h - 1) eps_0                                                (DDIM)
        2   x_s = (alpha_s / alpha_t) x - sigma_s (e^h - 1) eps_1,   x_1 by order 1,   r_1 = 1/2
        3   x_s = (alpha_s / alpha_t) x - sigma_s (e^h - 1) eps_0 - sigma_s [(e^h - 1) / h - 1] (eps_2 - eps_0) / r_2,
            x_2 likewise from eps_1 - eps_0,   x_1 by order 1,   r_1 = 1/3, r_2 = 2/3

    with eps_i = eps(x_i, t_i). They are `RungeKutta`'s dpm2 and dpm3: an order takes as many denoiser calls.

    A budget `nfe` = 3 K + r is spent to the last call: K steps of order 3 and one of order r, or for r = 0 K - 1 of
    order 3, one of 2 and one of 1 ("DPM-Solver-fast"). On a grid that ends at sigma = 0 the last call is the denoiser's
    and the others are spent so on the way there.
    Source: Lu et al. 2022 (DPM-Solver), Eq. 3.7, Algorithms 1 and 2, Section 3.4.

    Args:
        path, grid, steps: see OneStepSampler.
        order: 1, 2 or 3; with `nfe`, the largest.
        nfe: a budget of denoiser calls in place of steps, exact but where the path starts without signal.

    Raises:
        ValueError: another order; nfe < 1, with steps, or with a list of times.
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        order: int = 3,
        nfe: int | None = None,
    ):
        if order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {order}")
        if nfe is not None and not (isinstance(grid, Grid) and nfe >= 1):
            raise ValueError(f"nfe must be a positive number of calls, on a grid that is a rule; got nfe = {nfe}")
        if nfe is not None and steps is not None:
            raise ValueError(f"steps = {steps} and nfe = {nfe}: choose one; for steps of one order set nfe=null")
        orders = spent(nfe, order) if nfe is not None else None
        self.path, self.times = path, time_grid(path, grid, len(orders) if orders else steps)
        if nfe is not None and path(self.times[-1])[1] == 0:
            orders = [*spent(nfe - 1, order), 1]
            self.times = time_grid(path, grid, len(orders))
        self.parts: list[DDIM | RungeKutta] = []
        first = 0
        for degree, run in groupby(orders or [order] * (len(self.times) - 1)):
            last = first + len(list(run))
            times = self.times[first : last + 1]
            self.parts.append(DDIM(path, times) if degree == 1 else RungeKutta(path, times, order=f"dpm{degree}"))
            first = last

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def nfe(self) -> int:
        """The denoiser calls of a sample."""
        return sum(part.steps if isinstance(part, DDIM) else part.nfe for part in self.parts)

    def __call__(
        self,
        denoiser: Denoiser,
        noise: NoiseSource,
        *,
        start: Tensor | None = None,
        progress: Progress | None = None,
        **condition: Tensor,
    ) -> Tensor:
        x, done = start, 0
        for part in self.parts:

            def advance(fraction: float, done: int = done, steps: int = part.steps) -> None:
                if progress is not None:
                    progress((done + fraction * steps) / self.steps)

            x, done = part(denoiser, noise, start=x, progress=advance, **condition), done + part.steps
        assert x is not None
        return x


def spent(nfe: int, order: int) -> list[int]:
    """The orders of the steps that take nfe calls in all, none above `order`."""
    steps, rest = divmod(nfe, order)
    if order == 3 and steps and not rest:
        return [3] * (steps - 1) + [2, 1]
    return [order] * steps + [rest] * (rest > 0)
