"""Parallel-in-time sampling: all states of a chain at once, as one fixed point."""

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.equilibrium import Anderson, FixedPointSolver, Picard
from steadyflow.grids import Grid
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath
from steadyflow.samplers.ddim import DDIM
from steadyflow.samplers.sampler import OneStepSampler, Progress, Sampler, noise_start
from steadyflow.samplers.sliding import slide
from steadyflow.samplers.trajectory import Parareal, TrajectoryMap, Transport

VARIANCES = {"thesis": math.inf, "increments": None}


class Parallel(Sampler):
    """The samples of a one-step sampler, its whole chain solved as one fixed point z = F(z), z = (x_1, ..., x_N).

    The fixed point is the sequential chain with the same noise, so the samples are those of the sequential sampler to
    the solver's tolerance. A sweep, one evaluation of F, calls the denoiser once for all states together (twice for
    Heun): far fewer calls one after another, more evaluations in all. It pays where a batch of N is nearly as fast as
    a single one: few samples, many steps, a large card.

    Three choices: the map F (`TrajectoryMap`), the mixing (`solver`: Picard, or Anderson with mixing state, item or
    causal), and the window: all states together, or only the W states after the front of each sample, the first state
    that has not converged; a window that reaches the end finishes in at most N sweeps.

    A sample is done when |F(z) - z| <= rtol |F(z)|, with rtol the solver's, in the norm of `stop`; in a window, the
    front passes a state with that tolerance of its own. F(z) is what is returned. The memory is that of a few tensors
    (B, N, *S), or (B, W, *S) with a window: 2 m more for Anderson's history m, and the noise where there is any.

    Source: Pokle 2025, Section 3.2 (DEQ-DDIM, DEQ-sDDIM); windows: Shih et al. 2023 (ParaDiGMS), Section 3.

    Args:
        trajectory: the map.
        solver: the solver; its max_iterations is the cap on sweeps.
        window: W >= 1, or None for all states together.
        stop: "all", the Euclidean norm of all states, each in units of sqrt(alpha^2 + sigma^2), which is 1 on a
            variance-preserving path; "last", that of the sample alone, which is all that is wanted, though it may stand
            still for a sweep before it has converged.
        init: what all states start from: "start", the state at the first time (the coarse chain for Parareal), or
            "zeros".

    Attributes: see Sampler; an iteration is a sweep.

    Raises:
        ValueError: an unknown stop or init, window < 1, a window over another map than Transport, or over a solver
            that is neither Picard nor Anderson.
        FloatingPointError: from a call whose states are not finite.

    Warns: samples that have not converged; they are returned at their best iterate.
    """

    def __init__(
        self,
        trajectory: TrajectoryMap,
        solver: FixedPointSolver,
        window: int | None = None,
        stop: str = "all",
        init: str = "start",
    ):
        if stop not in ("all", "last"):
            raise ValueError(f"stop must be all or last, got {stop!r}")
        if init not in ("start", "zeros"):
            raise ValueError(f"init must be start or zeros, got {init!r}")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1, or null for all states; got {window}")
        if window is not None and not (isinstance(trajectory, Transport) and isinstance(solver, Picard | Anderson)):
            kinds = f"{type(trajectory).__name__} and {type(solver).__name__}"
            raise ValueError(f"a window needs the map Transport, and Picard or Anderson; got {kinds}; set window=null")
        self.trajectory, self.solver, self.window, self.stop, self.init = trajectory, solver, window, stop, init
        self.shard = trajectory.shard

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        noise: NoiseSource,
        *,
        start: Tensor | None = None,
        progress: Progress | None = None,
        **condition: Tensor,
    ) -> Tensor:
        trajectory, sampler, cap = self.trajectory, self.trajectory.sampler, self.solver.max_iterations
        x = noise_start(sampler.path, sampler.times[0], noise) if start is None else start
        fresh = sampler.noises(noise)
        if self.window is not None:
            assert isinstance(trajectory, Transport)
            window = min(self.window, sampler.steps)
            zeros, last = self.init == "zeros", self.stop == "last"
            x, self.iterations, residual = slide(
                trajectory, self.solver, window, denoiser, x, fresh, condition, last, zeros, progress
            )
        else:

            def tell(k: int, rows: Tensor, image: Tensor, relative: Tensor) -> None:
                if progress is not None:
                    progress((k + 1) / cap)

            states = trajectory.initial(denoiser, x, self.init == "zeros", **condition)
            f = trajectory.bind(denoiser, condition)
            solution = self.solver(f, states, x, fresh, *condition.values(), norm=self._norm(x), callback=tell)
            x, self.iterations = solution.z[:, -1], solution.iterations
            left = solution.residual.gather(0, self.iterations.unsqueeze(0) - 1)[0]
            residual = torch.where(solution.converged, 0.0, left)
        if bool((missed := residual > 0).any()):
            warnings.warn(
                f"{int(missed.sum())} of {len(x)} samples have not converged after {int(self.iterations.max())} "
                f"parallel iterations: relative residual up to {float(residual.max()):.2g}, tolerance "
                f"{self.solver.rtol:.2g}; raise max_iterations or the tolerance",
                stacklevel=2,
            )
        if progress is not None:
            progress(1.0)
        return x

    def _norm(self, like: Tensor) -> Callable[[Tensor], Tensor]:
        """The norm of `stop`, (B, M, *S) -> (B,)."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        if self.stop == "last":
            return lambda r: torch.linalg.vector_norm(r[:, -1].flatten(1), dim=1, dtype=dtype)
        sampler = self.trajectory.sampler
        unit = torch.hypot(*sampler.path(sampler.times[self.trajectory.states])).to(like.device, dtype)
        return lambda r: (torch.linalg.vector_norm(r.flatten(2), dim=2, dtype=dtype) / unit).norm(dim=1)


def in_parallel(
    path: GaussianPath,
    grid: Grid | Tensor | Sequence[float],
    steps: int | None = None,
    eta: float | None = None,
    *,
    method: Callable[..., OneStepSampler] = DDIM,
    map: str = "gaussian",
    variance: float = 0.25,
    blocks: int | None = None,
    mixing: str = "none",
    history: int = 3,
    ridge: float = 1e-4,
    window: int | None = None,
    tolerance: float = 1e-3,
    max_iterations: int | None = None,
    stop: str = "all",
    init: str = "start",
    max_batch: int | None = None,
    shard: bool = False,
) -> Parallel:
    """The one-step sampler method(path, grid, steps), sampled in parallel: the choices of `Parallel` in plain words.

    Args:
        path, grid, steps: see OneStepSampler.
        eta: of DDIM, None for methods that have none.
        method: DDIM, Euler, Heun or another one-step sampler.
        map: thesis, increments or gaussian, see `Transport`; or parareal.
        variance: of the data, for map=gaussian.
        blocks: for map=parareal.
        mixing: none (Picard); or Anderson's, by state, item (the whole trajectory) or causal (triangular).
        history, ridge: Anderson's m and its relative regularisation.
        window, stop, init: see Parallel.
        tolerance: relative.
        max_iterations: the cap on sweeps; None: the number of states, after which any map is exact, and one to see it.
        max_batch, shard: see TrajectoryMap.

    Raises:
        ValueError: an unknown map or mixing, or what the classes refuse.
    """
    sampler = method(path, grid, steps) if eta is None else method(path, grid, steps, eta=eta)
    trajectory: TrajectoryMap
    if map == "parareal":
        trajectory = Parareal(sampler, blocks, max_batch, shard)
    elif map in (*VARIANCES, "gaussian"):
        trajectory = Transport(sampler, VARIANCES.get(map, variance), max_batch, shard)
    else:
        raise ValueError(f"map must be thesis, increments, gaussian or parareal, got {map!r}")
    cap = len(trajectory.states) + 1 if max_iterations is None else max_iterations
    solver: FixedPointSolver
    if mixing == "none":
        solver = Picard(max_iterations=cap, rtol=tolerance)
    elif mixing in ("state", "item", "causal"):
        solver = Anderson(history, ridge=ridge, mixing=mixing, max_iterations=cap, rtol=tolerance)
    else:
        raise ValueError(f"mixing must be none, state, item or causal, got {mixing!r}")
    return Parallel(trajectory, solver, window, stop, init)
