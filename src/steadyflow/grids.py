"""Time grids 1 >= t_0 > t_1 > ... > t_N >= 0: where a sampler stops between noise and data."""

import json
import math
import os
from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from steadyflow.paths import DiscreteVariancePreserving, GaussianPath


class Grid(ABC):
    """A rule that places N steps between noise and data on a path."""

    @abstractmethod
    def __call__(self, path: GaussianPath, steps: int) -> Tensor:
        """The times (steps + 1,), float64, strictly falling, within [0, 1]."""


class Interval(Grid):
    """A grid from time `start` to time `end`, and with `zero` on to t = 0.

    With `zero`, the grid is N times from start to end and then t = 0, so that the last of the N steps is the denoiser
    itself (EDM's convention); without it, N + 1 times and the sample is left at `end`, still with its noise.

    Args:
        start, end: 1 >= start > end >= 0 (units of path time).
        zero: append t = 0 after `end`.

    Raises:
        ValueError: start and end out of order, or zero with end = 0.
    """

    def __init__(self, start: float = 1.0, end: float = 1e-3, zero: bool = True):
        if not 1 >= start > end >= 0:
            raise ValueError(f"need 1 >= start > end >= 0, got start {start} and end {end}")
        if zero and end == 0:
            raise ValueError("a grid that ends at t = 0 needs no zero appended; set zero=false or end > 0")
        self.start, self.end, self.zero = float(start), float(end), zero

    def __call__(self, path: GaussianPath, steps: int) -> Tensor:
        return _close(self.between(path, _unit(steps, self.zero)), self.zero)

    @abstractmethod
    def between(self, path: GaussianPath, u: Tensor) -> Tensor:
        """The times at u in [0, 1], from `start` at u = 0 to `end` at u = 1."""


class Uniform(Interval):
    """t = start + u (end - start)."""

    def between(self, path: GaussianPath, u: Tensor) -> Tensor:
        return (1 - u) * self.start + u * self.end


class Power(Interval):
    """t^(1/p) uniform: t = [start^(1/p) + u (end^(1/p) - start^(1/p))]^p; p > 1 is denser at the data end.

    Source: Zhang & Chen 2023 (DEIS), Section 4 ("power-t").
    """

    def __init__(self, power: float = 2.0, start: float = 1.0, end: float = 1e-3, zero: bool = True):
        super().__init__(start, end, zero)
        if not power > 0:
            raise ValueError(f"need power > 0, got {power}")
        self.power = float(power)

    def between(self, path: GaussianPath, u: Tensor) -> Tensor:
        return ((1 - u) * self.start ** (1 / self.power) + u * self.end ** (1 / self.power)) ** self.power


class Quadratic(Interval):
    """sqrt(t) uniform: t = [sqrt(start) + u (sqrt(end) - sqrt(start))]^2. Source: Song et al. 2021 (DDIM), App. D.2."""

    def between(self, path: GaussianPath, u: Tensor) -> Tensor:
        return ((1 - u) * self.start**0.5 + u * self.end**0.5) ** 2


class LogSNR(Interval):
    """log(sigma / alpha) uniform, half the log-SNR with its sign turned.

    The noise-to-signal ratio at `start` is cut at `max_ratio`, which only paths that reach it feel (conditional OT and
    cosine, whose ratio is infinite at t = 1; the others here end at 50 to 158): they start a little before t = 1.

    Source: Lu et al. 2022 (DPM-Solver), Section 3.4 ("logSNR").

    Raises:
        ValueError: the path has no noise at `end`, where log(sigma / alpha) is -infinity.
    """

    def __init__(self, start: float = 1.0, end: float = 1e-3, zero: bool = True, max_ratio: float = 160.0):
        super().__init__(start, end, zero)
        if not max_ratio > 0:
            raise ValueError(f"need max_ratio > 0, got {max_ratio}")
        self.max_ratio = float(max_ratio)

    def between(self, path: GaussianPath, u: Tensor) -> Tensor:
        ends = path.ratio(torch.tensor([self.start, self.end], dtype=torch.float64)).clamp(max=self.max_ratio)
        if not ends[1] > 0:
            raise ValueError(f"a log-SNR grid needs noise at its end, but sigma = 0 at t = {self.end}; set end=0.001")
        first, last = ends.log()
        return path.time_at(torch.exp((1 - u) * first + u * last))


class Karras(Grid):
    """EDM's grid in rho = sigma / alpha: rho^(1/p) uniform between sigma_max and sigma_min, then t = 0.

        rho_i = [sigma_max^(1/p) + i / (N - 1) (sigma_min^(1/p) - sigma_max^(1/p))]^p,  i < N,  rho_N = 0

    On a path with alpha = 1, as EDM's, rho is sigma. Limits that the path does not reach are its own ends; one that has
    noise of more than sigma_min at t = 0, as a variance-exploding path may, has no step after it.
    Source: Karras et al. 2022, Eq. 5.

    Args:
        sigma_min, sigma_max: the least and the largest noise-to-signal ratio.
        rho: the exponent p.
        zero: append t = 0; without it N + 1 nodes down to sigma_min.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max and rho > 0, or a path that lies outside them.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, zero: bool = True):
        if not (0 < sigma_min < sigma_max and rho > 0):
            raise ValueError(f"need 0 < sigma_min < sigma_max and rho > 0, got {sigma_min}, {sigma_max} and {rho}")
        self.sigma_min, self.sigma_max, self.rho, self.zero = float(sigma_min), float(sigma_max), float(rho), zero

    def __call__(self, path: GaussianPath, steps: int) -> Tensor:
        low, high = path.ratio(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        first, last = min(self.sigma_max, high), max(self.sigma_min, low)
        if not first > last:
            raise ValueError(f"the path's sigma / alpha, {low:.3g} to {high:.3g}, lies outside sigma_min..sigma_max")
        zero = self.zero and last > low
        u = _unit(steps, zero)
        times = path.time_at(((1 - u) * first ** (1 / self.rho) + u * last ** (1 / self.rho)) ** self.rho)
        if last == low:
            times[-1] = 0.0  # but for rounding
        return _close(times, zero)


class Indices(Grid):
    """A subset of the indices 0..T-1 of a discrete DDPM schedule, index i standing at t = (i + 1) / T; then t = 0.

        linear: i_k = floor(k T / N);  quadratic: i_k = floor(0.8 T (k / (N - 1))^2),  k = N-1, ..., 0

    The quadratic rule repeats small indices when N is large; a repeated index moves up to the next free one, so that
    N steps stay N different ones. Source: Song et al. 2021 (DDIM), App. D.2 and its code.

    Args:
        spacing: "linear" or "quadratic".
        train_steps: T.

    Raises:
        ValueError: an unknown spacing, more steps than indices, or a discrete path of another T.
    """

    def __init__(self, spacing: str = "linear", train_steps: int = 1000):
        if spacing not in ("linear", "quadratic"):
            raise ValueError(f"spacing must be linear or quadratic, got {spacing}")
        self.spacing, self.train_steps = spacing, int(train_steps)

    def __call__(self, path: GaussianPath, steps: int) -> Tensor:
        total = self.train_steps
        if isinstance(path, DiscreteVariancePreserving) and path.steps != total:
            raise ValueError(f"the path has {path.steps} indices, the grid {total}; set train_steps={path.steps}")
        if not 2 <= steps <= total:  # one step would start at index 0, without noise
            raise ValueError(f"steps must lie in 2..{total} on a grid of DDPM indices, got {steps}")
        if self.spacing == "linear":
            indices = [k * total // steps for k in range(steps)]
        else:  # floor(k^2 c) is convex in k, so moving repeated indices up amounts to the maximum with k
            indices = [max(k, int(0.8 * total * (k / (steps - 1)) ** 2 + 1e-9)) for k in range(steps)]
        return _close((torch.tensor(indices[::-1], dtype=torch.float64) + 1) / total, True)


class Variances(Grid):
    """The noise levels of a DDPM of N steps with variances of its own, between the ends of the path; then t = 0.

        alpha^2 / (alpha^2 + sigma^2) = prod_{j <= i} (1 - beta_j)  at t_{N-1-i},  i = 0, ..., N-1
        beta_i = beta_0 + i d  (linear)  or  (sqrt(beta_0) + i d)^2  (quadratic),  d > 0 such that t_0 = 1

    N = T linear ones are the discrete schedule with this beta_0; fewer lie between its indices, and the network is
    called at fractional ones. Where sigma / alpha passes 160 before t = 1, t_0 is where it does.
    Source: Kong & Ping 2021 (FastDPM), "VAR", and its code.

    Args:
        spacing: "linear" or "quadratic".
        first: beta_0, the variance of the last step.
        most: bounds d by most / N, so that few steps begin before t = 1, with less noise: 0.95 in the source's code,
            where it moves 10 quadratic steps, which begin at alpha^2 = 0.021, and hardly 20. None: no bound.

    Raises:
        ValueError: an unknown spacing, beta_0 outside (0, 1), most <= 0, fewer than two steps, or so many that
            variances of beta_0 pass the path's end.
    """

    def __init__(self, spacing: str = "quadratic", first: float = 1e-4, most: float | None = None):
        if spacing not in ("linear", "quadratic"):
            raise ValueError(f"spacing must be linear or quadratic, got {spacing}")
        if not (0 < first < 1 and (most is None or most > 0)):
            raise ValueError(f"need 0 < first < 1 and most > 0, got {first} and {most}")
        self.power, self.first, self.most = (1 if spacing == "linear" else 2), float(first), most

    def __call__(self, path: GaussianPath, steps: int) -> Tensor:
        end = torch.log1p(path.ratio(1.0).clamp(max=160.0) ** 2).item()
        most = math.ceil(-end / math.log1p(-self.first)) - 1
        if not 2 <= steps <= most:
            raise ValueError(f"variances of {self.first} and more need 2..{most} steps on this path, got {steps}")
        low, high = 0.0, (1 - self.first ** (1 / self.power)) / (steps - 1)
        if self.most is not None:
            high = min(high, self.most / steps)
        for _ in range(60):
            d = (low + high) / 2
            low, high = (low, d) if self._levels(d, steps)[-1] > end else (d, high)
        return _close(path.time_at(torch.sqrt(torch.expm1(self._levels(low, steps).flip(0)))), True)

    def _levels(self, d: float, steps: int) -> Tensor:
        """-log prod_{j <= i} (1 - beta_j), which rises with d."""
        root = self.first ** (1 / self.power) + d * torch.arange(steps, dtype=torch.float64)
        return -torch.log1p(-(root**self.power)).cumsum(0)


class Saved(Grid):
    """The grid of a file: a list of noise-to-signal ratios sigma / alpha for each number of steps, so it fits any path.

        {"ratios": {"5": [152.2, 20.1, 5.3, 1.4, 0.2, 0.01], "10": [...]}}        N + 1 falling ratios under "N"

    as scripts/find_grid.py writes it for a checkpoint, or anybody by hand.

    Args:
        file: the JSON file.
        zero: append t = 0, so that N steps are the list of N - 1 and then t = 0; without it, the list of N.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another form, or no list for the number of steps asked for.
    """

    def __init__(self, file: str | os.PathLike[str], zero: bool = False):
        self.file, self.zero = Path(file).expanduser(), zero
        if not self.file.is_file():
            raise FileNotFoundError(f"no grid at {self.file}; scripts/find_grid.py makes one for a checkpoint")
        try:
            found = json.loads(self.file.read_text())["ratios"]
            self.ratios = {int(n): [float(r) for r in ratios] for n, ratios in found.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{self.file}: expected {{"ratios": {{"N": [N + 1 numbers]}}}}, got {error!r}') from None
        for n, ratios in self.ratios.items():
            if len(ratios) != n + 1 or any(a <= b for a, b in pairwise(ratios)):
                raise ValueError(f"{self.file}: {n} steps are {n + 1} falling ratios, got {ratios}")

    def __call__(self, path: GaussianPath, steps: int) -> Tensor:
        wanted = steps - self.zero
        if wanted not in self.ratios:
            known = ", ".join(str(n + self.zero) for n in sorted(self.ratios))
            raise ValueError(f"{self.file} has no grid of {steps} steps; it has {known}")
        return _close(path.time_at(torch.tensor(self.ratios[wanted], dtype=torch.float64)), self.zero)


def _unit(steps: int, zero: bool) -> Tensor:
    """u from 0 to 1 at the `steps` times before an appended zero, or at all `steps` + 1."""
    return torch.linspace(0, 1, steps if zero else steps + 1, dtype=torch.float64)


def _close(times: Tensor, zero: bool) -> Tensor:
    """The times within [0, 1], free of the rounding of a map and its inverse, with the zero appended."""
    times = times.clamp(0, 1)
    return torch.cat([times, times.new_zeros(1)]) if zero else times
