"""The time grid that is best for one checkpoint, found on a few of its trajectories."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Karras, LogSNR, Quadratic
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath
from steadyflow.samplers.deis import AdamsBashforth

LONGER = 1.5  # the most by which a step may be longer than the one before, in log rho


@torch.no_grad()
def best_grids(
    denoiser: Denoiser,
    path: GaussianPath,
    noise: NoiseSource,
    steps: Sequence[int],
    end: float = 1e-3,
    nodes: int = 100,
    **condition: Tensor,
) -> dict[int, list[float]]:
    """The ratios rho = sigma / alpha of the grids with the least sum of local errors along exact trajectories:

        min over rho_0 > ... > rho_N of  sum_n e(rho_{n-1}, rho_n, rho_{n+1}),
        e(h, i, j)^2 = growth(rho_j)^2 mean |y_j - y_i - (rho_j - rho_i) eps_i - W_hij (eps_h - eps_i)|^2

    y = x / alpha, W the weight of AB of degree 1 in log rho, so e is the error of one step of it (of DDIM in the first)
    from exact values (the worst of those up to rho_j), times what the flow makes of an error at rho_j by the end: its
    growth, measured on a small perturbation at every fifth node. No step may be over 1.5 times as long in log rho as
    the one before, since a long extrapolation amplifies the errors of the past. Trajectories are those of log-rho AB3
    on `nodes` steps uniform in log rho, from which the grid is chosen: all e follow from the inner products of y and
    eps, and the best N steps for every N at once from dynamic programming. Last, that grid is kept where the samples at
    hand end nearer to the exact ones with it than with the quadratic, the log-SNR and EDM's grid, else the best of
    these: a sum of local errors knows nothing of how they meet.

    The idea is that of Align Your Steps (Sabour et al. 2024), of a schedule fitted to a checkpoint; the criterion and
    the search are our own, and need no optimiser: a few hundred calls a sample and O(max(steps) nodes^3) operations.

    Args:
        denoiser, path: of the checkpoint.
        noise: of some samples; 16 are plenty.
        steps: the N wanted.
        end: the last time.
        nodes: how many steps the exact trajectories have.
        condition: passed on to the denoiser.

    Raises:
        ValueError: no N between 1 and nodes.
    """
    if not steps or not all(1 <= n <= nodes for n in steps):
        raise ValueError(f"steps must lie in 1..{nodes}, got {list(steps)}")
    sampler = AdamsBashforth(path, LogSNR(end=end, zero=False), nodes, "log_rhoab", 3)
    alpha, sigma = path(sampler.times)
    rho = sigma / alpha
    x = sigma[0].item() * noise(0)
    past, states, eps = sampler.past(x), [], []
    for k, step in enumerate(sampler.schedule(x)):
        states.append(x.flatten().double() / alpha[k].item())
        x, past = sampler.step(denoiser, x, past, step, **condition)
        eps.append(past[0].flatten().double() / sigma[k].item())
    states.append(x.flatten().double() / alpha[-1].item())
    y, e = torch.stack(states).cpu(), torch.stack([*eps, eps[-1]]).cpu()
    growth = _growth(sampler, denoiser, y.reshape(nodes + 1, *x.shape).to(x), **condition)
    error = _local_errors(y, e, rho) * growth
    first = (y - y[0] - (rho - rho[0]).unsqueeze(1) * e[0]).square().mean(1).sqrt() * growth

    cost = torch.full((nodes + 1, nodes + 1), torch.inf, dtype=torch.float64)
    cost[0, 1:] = first[1:]  # of the best way whose last step is i -> j
    before: list[Tensor] = []
    found: dict[int, list[float]] = {}
    for n in range(1, max(steps) + 1):
        if n in steps:
            way = [nodes, int(cost[:, -1].argmin())]
            for back in reversed(before):
                way.append(int(back[way[-1], way[-2]]))
            found[n] = rho[way[::-1]].tolist()
        total = cost.unsqueeze(2) + error  # (h, i, j)
        cost, back = total.min(0)
        before.append(back)

    def error_of(ratios: list[float]) -> float:
        few = AdamsBashforth(path, path.time_at(torch.tensor(ratios, dtype=torch.float64)), None, "log_rhoab", 1)
        x = few(denoiser, noise, start=sigma[0].item() * noise(0), progress=None, **condition)
        return float((x.flatten().double().cpu() / alpha[-1].item() - y[-1]).square().mean())

    rules = [
        Quadratic(float(sampler.times[0]), end, zero=False),
        LogSNR(float(sampler.times[0]), end, zero=False),
        Karras(rho[-1].item(), rho[0].item(), zero=False),
    ]
    for n, ratios in found.items():
        found[n] = min([ratios, *(path.ratio(rule(path, n)).tolist() for rule in rules)], key=error_of)
    return found


def _local_errors(y: Tensor, eps: Tensor, rho: Tensor) -> Tensor:
    """e(h, i, j) in units of y, root mean squares over all entries; infinite unless h < i < j. (M, M, M)."""
    m = len(rho)
    log, delta = rho.log(), rho.unsqueeze(0) - rho.unsqueeze(1)  # delta_ij = rho_j - rho_i
    d, index = y.shape[1], torch.arange(m)
    yy, ye, ee = y @ y.T / d, y @ eps.T / d, eps @ eps.T / d
    own = ee.diagonal().unsqueeze(1)
    move = yy.diagonal().unsqueeze(0) + yy.diagonal().unsqueeze(1) - 2 * yy  # |y_j - y_i|^2
    along = ye.T - ye.diagonal().unsqueeze(1)  # <y_j - y_i, eps_i> at (i, j)
    alone = move - 2 * delta * along + delta**2 * own
    turn = ee.diagonal().unsqueeze(1) + ee.diagonal().unsqueeze(0) - 2 * ee  # |eps_h - eps_i|^2 at (h, i)
    # <y_j - y_i - delta eps_i, eps_h - eps_i> at (h, i, j)
    cross = ye.T.unsqueeze(1) - ye.T.unsqueeze(2) - (ye.T - ye.diagonal().unsqueeze(1))
    cross = cross - delta * (ee.unsqueeze(2) - own)
    # the integral of (log r - log rho_i) / (log rho_h - log rho_i) over r from rho_i to rho_j
    span = log.unsqueeze(0) - log.unsqueeze(1)
    weight = (rho * span - delta).unsqueeze(0) / span.T.unsqueeze(2)
    square = alone - 2 * weight * cross + weight**2 * turn.unsqueeze(2)
    steady = span.unsqueeze(0) >= LONGER * span.unsqueeze(2)  # both negative, at (i, j) and (h, i)
    falls = steady & (index.view(-1, 1, 1) < index.view(-1, 1)) & (index.view(-1, 1) < index)
    worst = torch.where(falls, square.clamp(min=0).sqrt(), 0.0).cummax(2).values
    return torch.where(falls, worst, torch.inf)


def _growth(sampler: AdamsBashforth, denoiser: Denoiser, y: Tensor, **condition: Tensor) -> Tensor:
    """The growth of small errors of y (M, B, *S) until the last node: |difference there| / |difference at it|, (M,),
    the geometric mean over samples.

    The end of a perturbed trajectory is found in steps of five nodes beside that of the trajectory itself in the same
    steps, so that what is left of both is the flow's. Between the nodes it is interpolated in its logarithm.
    """
    m, times = len(y), sampler.times
    alpha, rho = sampler.path(times)[0], sampler.path.ratio(times)
    spread = y[-1].double().square().mean()
    g = torch.Generator().manual_seed(0)
    direction = torch.randn(y[0].shape, generator=g, dtype=torch.float64).to(y)
    at = list(range(0, m - 1, 5))
    found = []
    for k in at:
        size = 1e-2 * float((spread * rho[k] ** 2 / (spread + rho[k] ** 2)).sqrt())
        rest = AdamsBashforth(sampler.path, times[[*range(k, m - 1, 5), m - 1]], None, "log_rhoab", 1)
        ends = []
        for start in (y[k], y[k] + size * direction):
            x = alpha[k].item() * start
            past = rest.past(x)
            for step in rest.schedule(x):
                x, past = rest.step(denoiser, x, past, step, **condition)
            ends.append(x.double() / alpha[-1].item())
        grown = (ends[1] - ends[0]).flatten(1).norm(dim=1) / (size * direction.double().flatten(1).norm(dim=1))
        found.append(float(grown.clamp(min=1e-12).log().mean()))
    logs = np.interp(np.arange(m), [*at, m - 1], [*found, 0.0])
    return torch.from_numpy(np.exp(logs))
