"""Parallel sampling in a window that slides along the chain of each sample."""

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.equilibrium import FixedPointSolver
from steadyflow.samplers.sampler import Progress
from steadyflow.samplers.trajectory import Transport


def slide(
    trajectory: Transport,
    solver: FixedPointSolver,
    window: int,
    denoiser: Denoiser,
    start: Tensor,
    noise: Tensor | None,
    condition: dict[str, Tensor],
    last: bool = False,
    zeros: bool = False,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The fixed point of a map whose state k + 1 depends on the states 0..k alone, W states of each sample at a time.

        front <- front + max(1, number of leading states with |F_k - z_k| <= rtol |F_k|)

    after each sweep: the first state of a window is exact once it is evaluated, so every sample moves by one or more,
    at its own pace, and needs N sweeps at most. The states it moves over are final, F_k; those that come in start as
    the last one before them. A sample that is done leaves.

    Args:
        trajectory: the map.
        solver: its update, rtol and max_iterations are used.
        window: W, at most the number of steps N.
        denoiser, start, noise, condition: see TrajectoryMap.sweep; noise holds all N steps.
        last: a sample is also done when its state N is in the window and meets the tolerance, whatever precedes it.
        zeros: start the first window at zero instead of at `start`.
        progress: called with the fraction of the states passed, of the slowest sample.

    Returns:
        x (B, *S), sweeps (B,), and the relative residual (B,) where the sweeps did not suffice, 0 where they did. A
        sample whose window has not reached the end is then taken there by one step from its last state.
    """
    steps, batch, device = trajectory.sampler.steps, len(start), start.device
    z = trajectory.initial(denoiser, start, zeros)[:, :window].contiguous()
    update = solver.start(z)
    out, sweeps = torch.empty_like(start), torch.full((batch,), solver.max_iterations, device=device)
    missing = torch.zeros(batch, dtype=torch.float64, device=device)
    rows, first, anchor = torch.arange(batch, device=device), torch.zeros_like(sweeps), start
    place = torch.arange(window, device=device)
    for i in range(solver.max_iterations):
        given = {name: value[rows] for name, value in condition.items()}
        fresh = None if noise is None else noise[rows]
        image = trajectory.sweep(denoiser, z, anchor, fresh, first=first, **given)
        g = image - z
        size, length = (torch.linalg.vector_norm(v.flatten(2), dim=2) for v in (image, g))
        met = length <= solver.rtol * size  # (n, W)
        met[:, 0] = True
        end = steps - 1 - first  # where in the window the last state is
        move = torch.minimum(met.cumprod(1).sum(1), end + 1)
        here = torch.arange(len(rows), device=device)
        inside = end.clamp(max=window - 1)
        done = move > end
        if last:
            done |= (end < window) & met[here, inside]
        if i + 1 == solver.max_iterations:
            late = ~done
            x = image[here, inside]
            short = late & (end >= window)  # the window has not reached the end
            if bool(short.any()):
                times = trajectory.sampler.times.to(device)
                t, s = times[first + window][short], times[-1].expand(int(short.sum()))
                quiet = torch.zeros_like(x[short]) if noise is not None else None
                part = {name: value[short] for name, value in given.items()}
                x[short] = trajectory.sampler.step(denoiser, x[short], t, s, quiet, **part)
            out[rows] = x
            worst = (length / size).amax(1).double()
            missing[rows] = torch.where(late, torch.where(short, worst.clamp(min=solver.rtol), worst), 0.0)
            break
        if bool(done.any()):
            out[rows[done]], sweeps[rows[done]] = image[here, inside][done], i + 1
            stay = (~done).nonzero()[:, 0]
            if len(stay) == 0:
                break
            update.keep(stay)
            z, g, image, rows, first, anchor, move = (v[stay] for v in (z, g, image, rows, first, anchor, move))
        z = update.step(z.flatten(1), g.flatten(1), trajectory.sweep, ()).reshape(z.shape)
        source = place + move.unsqueeze(1)  # (n, W): the state that comes to each place
        here = torch.arange(len(rows), device=device)
        anchor = image[here, move - 1]
        z = z[here.unsqueeze(1), source.clamp(max=window - 1)]
        update.slide(move, window)
        first = first + move
        if progress is not None:
            progress(float(first.min()) / steps)
    return out, sweeps, missing
