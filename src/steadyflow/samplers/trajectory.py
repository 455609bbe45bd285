"""The chain of a one-step sampler as one unknown, and the maps whose fixed point is the sequential chain."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser, Gaussian
from steadyflow.paths import expand
from steadyflow.samplers.sampler import Coefficients, OneStepSampler

MAX_RATIO = 1e3  # a path that begins at a larger sigma / alpha has no alpha to divide by


class TrajectoryMap(ABC):
    """A map of the states x_1..x_M of a chain that starts at x_0, for B samples at once, with z (B, M, *S):

        F_{k+1}(z) = Phi_k(x_k) + P_k(F_k) - P_k(x_k),    F_0 = x_0,

    Phi_k the chain's own propagator from state k to state k+1, evaluated for all k together, and P_k a cheap stand-in
    for it that carries what was wrong before k on to the later states. Whatever P, the fixed point is the sequential
    chain, F_{k+1} depends on x_0..x_k alone, and the first k states are exact after k sweeps. (Newton's method has
    P_k = dPhi_k/dx, and Parareal a coarse solver.)

    The rows of a sweep, B M of them flattened, go through the network `max_batch` at a time. With `shard` and
    torch.distributed initialised, each process takes its share of the rows and one all-gather puts them together; all
    processes must then hold the same samples.

    Args:
        sampler: the one-step sampler.
        max_batch: rows a denoiser call takes; None: all.
        shard: share the rows with the other processes.

    Raises:
        ValueError: max_batch < 1.
        FloatingPointError: from a sweep whose states are not finite; says after which step.
    """

    def __init__(self, sampler: OneStepSampler, max_batch: int | None = None, shard: bool = False):
        if max_batch is not None and max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, or null for all rows at once; got {max_batch}")
        self.sampler, self.max_batch, self.shard = sampler, max_batch, shard
        self.table = sampler.coefficients(sampler.times[:-1], sampler.times[1:])

    @property
    @abstractmethod
    def states(self) -> Tensor:
        """Which of the chain's states 0..N are the unknown ones: (M,) int64, the last of them N."""

    @abstractmethod
    def initial(self, denoiser: Denoiser, start: Tensor, zeros: bool = False, **condition: Tensor) -> Tensor:
        """Where the iteration starts, (B, M, *S), for the state `start` (B, *S) at the first time."""

    @abstractmethod
    def sweep(
        self,
        denoiser: Denoiser,
        z: Tensor,
        start: Tensor,
        noise: Tensor | None = None,
        **condition: Tensor,
    ) -> Tensor:
        """F(z), (B, M, *S).

        Args:
            z: (B, M, *S) the states x_1..x_M.
            start: (B, *S) the state x_0.
            noise: (B, N, *S) of the sampler's N steps, where it is stochastic.
            condition: of the denoiser, each leading with B.
        """

    def bind(self, denoiser: Denoiser, names: Iterable[str]) -> Callable[..., Tensor]:
        """F as a solver takes it: f(z, start, noise, *condition), the conditions in the order of their `names`."""
        names = list(names)

        def f(z: Tensor, start: Tensor, noise: Tensor | None, *condition: Tensor) -> Tensor:
            return self.sweep(denoiser, z, start, noise, **dict(zip(names, condition, strict=True)))

        return f

    def update(
        self, denoiser: Denoiser, x: Tensor, table: Coefficients, k: Tensor, z: Tensor | None, **condition: Tensor
    ) -> Tensor:
        """Row r of x (R, *S) takes step k[r] of a table of steps, with noise z (R, *S)."""
        world = torch.distributed.get_world_size() if self.shard and torch.distributed.is_initialized() else 1
        share = -(-len(x) // world)
        begin = share * (torch.distributed.get_rank() if world > 1 else 0)
        end = min(begin + share, len(x))
        parts = []
        for low in range(begin, end, self.max_batch or max(share, 1)):
            part = slice(low, min(low + (self.max_batch or share), end))
            given = {name: value[part] for name, value in condition.items()}
            row = tuple(c.to(x.device)[k[part]] for c in table)
            parts.append(self.sampler.update(denoiser, x[part], row, None if z is None else z[part], **given))
        if world == 1:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        mine = torch.cat([*parts, x.new_zeros(share - max(end - begin, 0), *x.shape[1:])])
        shares = [torch.empty_like(mine) for _ in range(world)]
        torch.distributed.all_gather(shares, mine)
        return torch.cat(shares)[: len(x)]

    def check(self, states: Tensor, steps: Tensor) -> Tensor:
        """The states (B, M, *S), made by the steps (M,) or (B, M), if all are finite; waits for the device."""
        if not states.sum(dtype=torch.float32).isfinite():
            bad = ~states.flatten(2).isfinite().all(2)
            k, times = int(steps.expand(bad.shape)[bad].min()) if bool(bad.any()) else 0, self.sampler.times
            raise FloatingPointError(
                f"the state is not finite after step {k + 1} of {self.sampler.steps} (t = {times[k]:.4g} -> "
                f"{times[k + 1]:.4g}) of a parallel sweep; the network returned NaN or the iteration diverged"
            )
        return states


class Transport(TrajectoryMap):
    """The map with P_k(x) = J_k x, a number per step: the errors of earlier states are added up, each in proportion.

        F_{k+1} = step_k(x_k) + sum_{i=1..k} (c_{k+1} / c_i) [step_{i-1}(x_{i-1}) - x_i],   c_{k+1} = J_k c_k

    One sum along the chain, of the defects alone, so that rounding errors vanish with them. J_k is the derivative of
    step k for data N(m, v I), whatever the sampler and its noise: then F is exact in one sweep, up to m. `variance` v:

        infinite   the thesis' map, Pokle 2025 Eq. 3.6 and 3.11: J_k = alpha_s / alpha_t for DDIM with any eta, the sum
                   of the eps in the frame x / alpha. A path that begins at alpha = 0 takes v = 0 instead.
        0          for DDIM with eta = 0, J = sigma_s / sigma_t: the sum of the denoised in the frame x / sigma
        None       J = 1, plain increments: F_{k+1} = x_0 + sum_{i <= k} (step_i(x_i) - x_i). On a variance-preserving
                   path and eta = 0 that is v = 1 but for the grid: ParaDiGMS (Shih et al. 2023, Eq. 5)
        a number   the data's variance per coordinate, 0.25 for images in [-1, 1] as in EDM

    Args:
        sampler, max_batch, shard: see TrajectoryMap.
        variance: v >= 0, or None.

    Raises:
        ValueError: a negative variance.
    """

    def __init__(
        self,
        sampler: OneStepSampler,
        variance: float | None = 0.25,
        max_batch: int | None = None,
        shard: bool = False,
    ):
        super().__init__(sampler, max_batch, shard)
        if variance is not None and not variance >= 0:
            raise ValueError(f"need variance >= 0, got {variance}")
        if variance == math.inf and not sampler.path.ratio(sampler.times[0]) <= MAX_RATIO:
            variance = 0.0
        gain = torch.ones(sampler.steps, dtype=torch.float64) if variance is None else self._derivative(variance)
        # c_1..c_N: the first step starts from x_0 itself, so J_0, which may be 0, is not needed
        self.scale = torch.cat([gain.new_ones(1), gain[1:].clamp(min=1e-30)]).cumprod(0).clamp(min=1e-30)

    def _derivative(self, variance: float) -> Tensor:
        """J (N,): what a step makes of 1 where the data are N(0, variance)."""
        unit = torch.ones(self.sampler.steps, 1, dtype=torch.float64)
        denoiser = Unbounded() if variance == math.inf else Gaussian([0.0], variance)
        return self.sampler.update(denoiser, unit, self.table, 0 * unit if self.sampler.stochastic else None)[:, 0]

    @property
    def states(self) -> Tensor:
        return torch.arange(1, self.sampler.steps + 1)

    def initial(self, denoiser: Denoiser, start: Tensor, zeros: bool = False, **condition: Tensor) -> Tensor:
        return (0 * start if zeros else start).unsqueeze(1).repeat(1, self.sampler.steps, *[1] * (start.ndim - 1))

    def sweep(
        self,
        denoiser: Denoiser,
        z: Tensor,
        start: Tensor,
        noise: Tensor | None = None,
        first: Tensor | None = None,
        **condition: Tensor,
    ) -> Tensor:
        """F(z), see TrajectoryMap; or of a window: z (B, W, *S) are the states first + 1, ..., first + W of each
        sample, `start` its state `first` (B,). States beyond the last stay as they are."""
        n, w = z.shape[:2]
        x = torch.cat([start.unsqueeze(1), z[:, :-1]], 1)
        k = torch.arange(w, device=z.device).expand(n, w)
        k = k if first is None else k + first.unsqueeze(1)
        step = k.clamp(max=self.sampler.steps - 1)
        if noise is not None:
            noise = noise[torch.arange(n, device=z.device).unsqueeze(1), step].flatten(0, 1)
        given = {name: value.repeat_interleave(w, 0) for name, value in condition.items()}
        if first is None:
            out = self.update(denoiser, x.flatten(0, 1), self.table, k.flatten(), noise, **given)
        else:
            rows = (k < self.sampler.steps).flatten().nonzero()[:, 0]
            given = {name: value[rows] for name, value in given.items()}
            noise = None if noise is None else noise[rows]
            out = self.update(denoiser, x.flatten(0, 1)[rows], self.table, k.flatten()[rows], noise, **given)
            out = z.flatten(0, 1).index_copy(0, rows, out)
        out = out.reshape(z.shape)
        if w > 1:
            c = self.scale.to(z.device)[step].flatten()
            c, inverse = (expand(value, z.flatten(0, 1)).reshape(n, w, *[1] * (z.ndim - 2)) for value in (c, 1 / c))
            defect = (out[:, :-1] - z[:, :-1]) * inverse[:, :-1]
            if first is not None:
                defect = torch.where(expand_rows(k[:, 1:] < self.sampler.steps, defect), defect, 0.0)
            out = torch.cat([out[:, :1], out[:, 1:] + c[:, 1:] * defect.cumsum(1)], 1)
        return self.check(out, step)


class Parareal(TrajectoryMap):
    """The map of Parareal: the states are the ends of M blocks of steps, and P_k is one step over the whole block.

        F_{k+1} = fine_k(x_k) + coarse_k(F_k) - coarse_k(x_k)

    A sweep is as deep as a block has steps, and then M coarse steps one after another. It starts from the coarse chain.
    Source: Lions, Maday & Turinici 2001; for diffusion models Selvam et al. 2024 (SRDS).

    Args:
        sampler, max_batch, shard: see TrajectoryMap.
        blocks: M; None: about sqrt(N).

    Raises:
        ValueError: blocks outside 1..N.
    """

    def __init__(
        self,
        sampler: OneStepSampler,
        blocks: int | None = None,
        max_batch: int | None = None,
        shard: bool = False,
    ):
        super().__init__(sampler, max_batch, shard)
        steps = sampler.steps
        blocks = round(math.sqrt(steps)) if blocks is None else blocks
        if not 1 <= blocks <= steps:
            raise ValueError(f"blocks must lie in 1..{steps}, the number of steps; got {blocks}")
        sizes = [steps // blocks + (k < steps % blocks) for k in range(blocks)]  # the long ones first
        self.ends = torch.tensor([0, *sizes]).cumsum(0)  # (M + 1,)
        times = sampler.times[self.ends]
        self.coarse = sampler.coefficients(times[:-1], times[1:])

    @property
    def states(self) -> Tensor:
        return self.ends[1:]

    def _coarse(self, denoiser: Denoiser, x: Tensor, k: Tensor, **condition: Tensor) -> Tensor:
        """A step over block k[r] for row r of x; without noise, which is the same in both of its uses."""
        quiet = torch.zeros_like(x) if self.sampler.stochastic else None
        return self.update(denoiser, x, self.coarse, k, quiet, **condition)

    def initial(self, denoiser: Denoiser, start: Tensor, zeros: bool = False, **condition: Tensor) -> Tensor:
        states = [start]
        for k in range(len(self.ends) - 1):
            at = torch.full((len(start),), k, device=start.device)
            states.append(0 * start if zeros else self._coarse(denoiser, states[-1], at, **condition))
        return torch.stack(states[1:], 1)

    def sweep(
        self, denoiser: Denoiser, z: Tensor, start: Tensor, noise: Tensor | None = None, **condition: Tensor
    ) -> Tensor:
        n, m = z.shape[:2]
        x = torch.cat([start.unsqueeze(1), z[:, :-1]], 1)
        given = {name: value.repeat_interleave(m, 0) for name, value in condition.items()}
        block = torch.arange(m, device=z.device).repeat(n)
        before = self._coarse(denoiser, x.flatten(0, 1), block, **given).reshape(z.shape)
        ends, fine = self.ends.to(z.device), x
        sizes = self.ends.diff()
        for i in range(int(sizes[0])):
            long = int((sizes > i).sum())  # the blocks with a step i, the first ones
            k = (ends[:long] + i).expand(n, long)
            fresh = None if noise is None else noise[:, k[0]].flatten(0, 1)
            part = {name: value.repeat_interleave(long, 0) for name, value in condition.items()}
            moved = self.update(denoiser, fine[:, :long].flatten(0, 1), self.table, k.flatten(), fresh, **part)
            fine = torch.cat([moved.reshape(n, long, *z.shape[2:]), fine[:, long:]], 1)
        states = [fine[:, 0]]
        for b in range(1, m):
            carried = self._coarse(denoiser, states[-1], torch.full((n,), b, device=z.device), **condition)
            states.append(fine[:, b] + carried - before[:, b])
        return self.check(torch.stack(states, 1), ends[1:] - 1)


class Unbounded(Denoiser):
    """E[x_0 | x] = x / alpha, of data without a prior: N(0, v I) as v grows."""

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        return x / expand(alpha, x)


def expand_rows(mask: Tensor, x: Tensor) -> Tensor:
    """A mask (B, M) with trailing axes of 1, to go with x (B, M, *S)."""
    return mask.reshape(*mask.shape, *[1] * (x.ndim - 2))
