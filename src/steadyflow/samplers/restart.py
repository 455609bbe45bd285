"""Restart sampling: back to more noise, several times, around a deterministic sampler."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid, Karras
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath, combine
from steadyflow.samplers.heun import Heun
from steadyflow.samplers.sampler import Progress, Sampler, Watch, noise_start, time_grid


class Restart(Sampler):
    """Heun's method from noise to data and, `repeats` times where it passes ratio_min, from there

        up     x_max = (alpha_max / alpha_min) x_min + alpha_max sqrt(rho_max^2 - rho_min^2) z,   rho = sigma / alpha
        down   `steps` steps of Heun's method back to rho_min, on EDM's grid

    The noise added at once contracts errors made before, and the deterministic steps keep those made since small. An
    interval begins at the grid time nearest to ratio_min in log rho; its repeats are done when the sampler reaches it.
    Source: Xu et al. 2023 (Restart), Algorithm 1.

    Args:
        path, grid, steps: see OneStepSampler. Two denoiser calls a step, one on the step to sigma = 0.
        intervals: of (steps, repeats, ratio_min, ratio_max); their N_restart counts the ends, one more than steps.

    Raises:
        ValueError: an interval with less than one step, or that does not rise, or beyond the path's own ratios.
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        intervals: Sequence[tuple[int, int, float, float]] = ((2, 2, 0.06, 0.3),),
    ):
        self.path, self.times = path, time_grid(path, grid, steps)
        self.heun = Heun(path, self.times)
        level, after = path.ratio(self.times), dict[int, list[list[float]]]()
        top = float(path.ratio(1.0))
        for count, repeats, low, high in intervals:
            if not (count >= 1 and repeats >= 0 and 0 < low < high <= top):
                raise ValueError(
                    f"need steps >= 1, repeats >= 0 and 0 < ratio_min < ratio_max <= {top:.4g}, the path's own; got "
                    f"[{count}, {repeats}, {low}, {high}]"
                )
            k = int((level.log() - torch.tensor(low).log()).abs().nan_to_num(nan=torch.inf).argmin())
            if not float(level[k]) < high:
                raise ValueError(
                    f"the grid has no time near ratio_min = {low}, below ratio_max = {high}; take more steps"
                )
            loop = Karras(float(level[k]), high, zero=False)(path, count).tolist()
            after.setdefault(k, []).extend([self.times[k].item(), *loop[:-1]] for _ in range(repeats))
        stops = [self.times[0].item()]
        for k, t in enumerate(self.times.tolist()):
            stops += [t] if k else []
            for loop in after.get(k, []):
                stops += [*loop[1:], t]
        self.stops = torch.tensor(stops, dtype=torch.float64)  # where it rises, noise is added

    @property
    def nfe(self) -> int:
        """The denoiser calls of a sample."""
        down = self.stops.diff() < 0
        return int(2 * down.sum()) - int(self.path(self.stops[-1])[1] == 0)

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
        x = noise_start(self.path, self.times[0], noise) if start is None else start
        t, s = self.stops[:-1], self.stops[1:]
        table = list(zip(*[c.unbind() for c in self.heun.coefficients(t, s)], strict=True))
        (alpha, alpha_s), rho, rho_s = (self.path(v)[0] for v in (t, s)), self.path.ratio(t), self.path.ratio(s)
        grow, std = alpha_s / alpha, alpha_s * torch.sqrt((rho_s**2 - rho**2).clamp(min=0))
        watch = Watch(self.stops, progress)
        for k, row in enumerate(table):
            if s[k] > t[k]:
                x = combine(grow[k], x, std[k], noise(k + 1))
            else:
                x = self.heun.update(denoiser, x, row, None, **condition)
            watch(x)
        watch.check()
        return x
