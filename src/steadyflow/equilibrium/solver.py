"""What a fixed-point solver is: a map and a start in, a solution per item out."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

Map = Callable[..., Tensor]  # f(z (n, *S), *args) -> (n, *S); args lead with n, or are None
Arguments = tuple[Tensor | None, ...]
Norm = Callable[[Tensor], Tensor]  # a (semi)norm (n, *S) -> (n,)
Callback = Callable[[int, Tensor, Tensor, Tensor], None]  # (k, rows (n,), f(z_k) (n, *S), relative residual (n,))


class Status(IntEnum):
    """How an item left the solver."""

    CONVERGED = 0
    CAP = 1  # reached max_iterations
    DIVERGED = 2  # the residual is not finite, or GROWTH times the first one
    CYCLE = 3  # reached max_iterations going round a limit cycle of `Solution.period` iterates


@dataclass(frozen=True)
class Solution:
    """What a solver returns for B items, in the order they came in.

    z (B, *S): the iterate of each item that met the tolerance, else that of the smallest absolute residual (see
        `FixedPointSolver.returns_image`).
    residual (K, B): |f(z_k) - z_k| / |f(z_k)| in float64, of every evaluated iterate z_0, z_1, ...; infinite where f
        was not finite, NaN after the item has left.
    status (B,): a `Status`, int8.
    period (B,): of the limit cycle, 0 where there is none.
    """

    z: Tensor
    residual: Tensor
    status: Tensor
    period: Tensor

    @property
    def iterations(self) -> Tensor:
        """(B,): iterates evaluated until the item left."""
        return (~self.residual.isnan()).sum(0)

    @property
    def converged(self) -> Tensor:
        """(B,): whether the tolerance was met."""
        return self.status == Status.CONVERGED


class Update(ABC):
    """One solve's memory: the next iterates from the present ones. Iterates are flat, (n, D), n <= B still active."""

    @abstractmethod
    def step(self, z: Tensor, g: Tensor, f: Map, args: Arguments) -> Tensor:
        """The next iterates (n, D) from z and g = f(z, *args) - z, which the loop leaves unchanged ever after."""

    def keep(self, order: Tensor) -> None:  # noqa: B027 (no memory, nothing to do)
        """Items have left: row i of what follows is row order[i] of what was. order[i] = i except where a row from
        the end fills a gap, so a memory need only move those rows (`fill`)."""

    def slide(self, by: Tensor, states: int) -> None:  # noqa: B027 (no memory, nothing to do)
        """The iterates are windows (n, states, ...) that have moved on: state t of row i is now what state t + by[i]
        was, and the last by[i] states are new."""


class FixedPointSolver(ABC):
    """Finds z = f(z, *args) for B independent items, from z0.

        item b converges at the first k with |f(z_k) - z_k| <= max(atol, rtol |f(z_k)|)

    Row b of f(z, *args) may depend on row b of z and args only. Every item has its own stopping and its own returned
    iterate, so a batch of B equals B batches of one. An item that is done leaves: f sees the rows still active, in an
    order of the solver's choosing, and the same rows of every argument (`compact`). The loop evaluates f once an
    iteration and waits for the device once an iteration, to learn who leaves.

    f runs without autograd (a map that needs gradients inside enables them itself) and under the caller's autocast;
    the solver's arithmetic runs in z0's dtype outside autocast. The solver builds no graph: for gradients through the
    solution see `Equilibrium`. f may be a compiled function; with compact=False its shapes never change.

    A diverging item leaves with its best iterate, and one warning names all such items. Limit cycles are looked for
    among items that reach the cap: iterates that repeat, to a thousandth, over their last three periods.

    Args:
        max_iterations: the cap K on evaluations of f per item.
        rtol, atol: the tolerances; 0 and 0 runs to the cap, or to an exact fixed point.
        compact: whether items that are done leave the computation. False: f always sees all B rows, and rows that are
            done no longer change.

    Raises:
        ValueError: max_iterations < 1, a negative tolerance, z0 not of a floating dtype, an argument that does not
            lead with B, or f(z) not of the shape of z.
    """

    GROWTH = 1e6  # of the residual over the first one (or the rounding error of f(z)) that counts as divergence
    returns_image = True  # the solution is f(z_k), already paid for and nearer for a contraction; False: z_k itself

    def __init__(self, max_iterations: int = 50, rtol: float = 1e-4, atol: float = 0.0, compact: bool = True):
        if max_iterations < 1 or rtol < 0 or atol < 0:
            raise ValueError(f"need max_iterations >= 1, rtol >= 0 and atol >= 0, got {max_iterations}, {rtol}, {atol}")
        self.max_iterations, self.rtol, self.atol, self.compact = max_iterations, float(rtol), float(atol), compact

    @abstractmethod
    def start(self, z0: Tensor) -> Update:
        """The memory of a solve that starts at z0 (B, *S)."""

    def __call__(
        self, f: Map, z0: Tensor, *args: Tensor | None, norm: Norm | None = None, callback: Callback | None = None
    ) -> Solution:
        """Solves z = f(z, *args).

        Args:
            f: the map.
            z0: (B, *S), any shape S, any floating dtype.
            args: what f takes besides z: tensors (B, ...), indexed by the solver as items leave, or None.
            norm: the (semi)norm (n, *S) -> (n,) that residuals are measured in; by default the Euclidean norm of the
                whole item. `lambda r: r[:, -1].flatten(1).norm(dim=1)` stops on the last state of a trajectory alone.
            callback: called after each evaluation with k, the positions in z0 of the rows f saw, and their f(z_k) and
                relative residuals. Copy what is kept.
        """
        kind = z0.device.type
        if not z0.is_floating_point():
            raise ValueError(f"z0 must be of a floating dtype, got {z0.dtype}")
        if wrong := [a.shape for a in args if a is not None and (a.ndim == 0 or len(a) != len(z0))]:
            raise ValueError(f"every argument must lead with the batch of z0, {len(z0)}; got shape {tuple(wrong[0])}")
        amp = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

        def evaluate(z: Tensor, *args: Tensor | None) -> Tensor:
            with torch.autocast(kind, enabled=amp[0], dtype=amp[1]):
                out = f(z.view(-1, *z0.shape[1:]), *args)
            if out.shape != (len(z), *z0.shape[1:]):
                raise ValueError(f"f must keep the shape {(len(z), *z0.shape[1:])} of z, got {tuple(out.shape)}")
            return out.reshape(z.shape).to(z.dtype)

        with torch.no_grad(), torch.autocast(kind, enabled=False):
            z, record = self._solve(evaluate, z0.detach(), args, norm or euclidean, callback)
            solution = record.solution(z)
        if amp[0]:
            torch.clear_autocast_cache()  # weights that autocast has cast without autograd must not serve a gradient
        record.warn()
        return solution

    def _solve(
        self, f: Map, z0: Tensor, args: Arguments, norm: Norm, callback: Callback | None
    ) -> tuple[Tensor, "_Record"]:
        batch, shape = len(z0), z0.shape[1:]
        z = z0.reshape(batch, math.prod(shape))
        best, rows = z.clone(), torch.arange(batch, device=z.device)  # of all items; f sees the first n rows
        n, active, alive = batch, args, torch.ones(batch, dtype=torch.bool, device=z.device)
        masked = False  # whether some of the n are done (not alive), and stay as they are
        record, update = _Record(self, z), self.start(z0)

        for k in range(self.max_iterations if batch else 0):
            fz = f(z, *active).detach()
            g = fz - z
            r, size = norm(g.view(n, *shape)).double(), norm(fz.view(n, *shape)).double()
            better, done = record.enter(rows[:n], alive, z, r, size)
            torch.where(better[:, None], fz if self.returns_image else z, best[:n], out=best[:n])
            if callback is not None:
                callback(k, rows[:n], fz.view(n, *shape), record.residuals[-1][rows[:n]])
            if bool(done.any()):
                stay = (alive & ~done).nonzero().squeeze(1)
                if len(stay) == 0:
                    break
                if self.compact:
                    n = len(stay)
                    gaps, movers = done[:n].nonzero().squeeze(1), stay[stay >= n]
                    order = torch.arange(n, device=z.device).index_copy_(0, gaps, movers)
                    swap(best, gaps, movers)
                    swap(rows, gaps, movers)
                    z, g, alive = z[order], g[order], alive[:n]
                    update.keep(order)
                    active = tuple(None if a is None else a[rows[:n]] for a in args)
                else:
                    alive, masked = alive & ~done, True
            if k + 1 < self.max_iterations:
                z = update.step(z, g, f, active)
                if masked:
                    z = torch.where(alive[:, None], z, best)
        return torch.empty_like(best).index_copy_(0, rows, best).view(z0.shape), record


class _Record:
    """What becomes of each of the B items, in the order they came in."""

    def __init__(self, solver: FixedPointSolver, z0: Tensor):
        batch, size = z0.shape
        self.solver, self.eps = solver, torch.finfo(z0.dtype).eps
        self.blank = z0.new_full((batch,), math.nan, dtype=torch.float64)
        self.first, self.last, self.lowest = (self.blank.nan_to_num(math.inf) for _ in range(3))  # of |f(z) - z|
        self.status = z0.new_full((batch,), Status.CAP, dtype=torch.int8)
        self.residuals: list[Tensor] = []  # relative
        self.prints: list[Tensor] = []  # a number per iterate, by which a limit cycle is recognised
        self.probe = (0.7 * torch.arange(size, device=z0.device, dtype=torch.float64)).cos().to(wide(z0.dtype))

    def enter(self, rows: Tensor, alive: Tensor, z: Tensor, r: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Takes down r = |f(z) - z| and size = |f(z)| of the rows still alive; which have improved, which are done."""
        finite = r.isfinite() & size.isfinite()
        relative = torch.where(finite, torch.where(r > 0, r / size, 0.0), math.inf)
        number = (z.to(self.probe.dtype) @ self.probe).double()
        self.residuals.append(self.blank.index_copy(0, rows, torch.where(alive, relative, math.nan)))
        self.prints.append(self.blank.index_copy(0, rows, torch.where(alive, number, math.nan)))
        if len(self.residuals) == 1:
            self.first[rows] = r
        met = finite & ((r <= self.solver.atol) | (r <= self.solver.rtol * size))
        better = alive & finite & (met | (r < self.lowest[rows]))
        lost = ~finite | (r > self.solver.GROWTH * torch.maximum(self.first[rows], self.eps * size))
        done = alive & (met | lost)
        verdict = torch.where(met, Status.CONVERGED, Status.DIVERGED).to(torch.int8)
        self.last[rows] = torch.where(alive, r, self.last[rows])
        self.lowest[rows] = torch.where(better, r, self.lowest[rows])
        self.status[rows] = torch.where(done, verdict, self.status[rows])
        return better, done

    def solution(self, z: Tensor) -> Solution:
        period = torch.zeros_like(self.status, dtype=torch.int64)
        if not self.residuals:
            return Solution(z, self.blank.new_empty(0, len(z)), self.status, period)
        stuck = (self.status == Status.CAP) & (self.residuals[-1] > 32 * self.eps)  # and not by rounding alone
        period = torch.where(stuck, cycle(torch.stack(self.prints)), period)
        status = torch.where(period > 0, Status.CYCLE, self.status).to(torch.int8)
        return Solution(z, torch.stack(self.residuals), status, period)

    def warn(self) -> None:
        """One warning that names the items that diverged, at the caller of the solver."""
        lost = (self.status == Status.DIVERGED).nonzero().squeeze(1).tolist()
        if lost:
            b = lost[0]
            iterations = sum(not math.isnan(float(row[b])) for row in self.residuals)
            warnings.warn(
                f"{type(self.solver).__name__}: {len(lost)} of {len(self.first)} items diverged "
                f"({', '.join(map(str, lost[:8]))}{', ...' if len(lost) > 8 else ''}); item {b} left at iteration "
                f"{iterations} with |f(z) - z| = {float(self.last[b]):.3g} ({float(self.first[b]):.3g} at first); "
                f"each is returned at its best iterate",
                stacklevel=3,
            )


def euclidean(r: Tensor) -> Tensor:
    """|r| of each item (n, *S) -> (n,), in float32 or wider."""
    return torch.linalg.vector_norm(r.flatten(1) if r.ndim > 1 else r[:, None], dim=1, dtype=wide(r.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that numbers of `dtype` are summed in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def swap(x: Tensor, a: Tensor, b: Tensor) -> None:
    """Exchanges the rows a and b of x."""
    x[a], x[b] = x[b], x[a]


def fill(x: Tensor, order: Tensor) -> None:
    """The first rows of x become x[order], in place; only rows that come from elsewhere are written."""
    gaps = (order != torch.arange(len(order), device=order.device)).nonzero().squeeze(1)
    x[gaps] = x[order[gaps]]


def cycle(prints: Tensor, longest: int = 16, tolerance: float = 1e-3) -> Tensor:
    """(B,): the smallest p in 2..longest with z_k = z_{k-p} for the last 2 p iterates, 0 where there is none.

    Told from one number (K, B) per iterate, to `tolerance` of its range over the last p iterates.
    """
    period = torch.zeros(prints.shape[1], dtype=torch.int64, device=prints.device)
    for p in range(min(longest, len(prints) // 3), 1, -1):
        change = (prints[-2 * p :] - prints[-3 * p : -p]).abs().amax(0)
        extent = prints[-p:].amax(0) - prints[-p:].amin(0)
        period = torch.where((change <= tolerance * extent) & (extent > 0), p, period)
    return period
