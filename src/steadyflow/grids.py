"""Time grids 1 >= t_0 > t_1 > ... > t_N >= 0: where a sampler stops between noise and data."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from steadyflow.paths import GaussianPath


class Grid(ABC):
    """A rule that places N steps between t = `start` and t = `end`.

    With `zero`, the grid is N times from start to end and then t = 0, so that the last of the N steps is the denoiser
    itself (EDM's convention); without it, N + 1 times and the sample is left at `end`.

    Args:
        start, end: 1 >= start > end >= 0 (units of path time).
        zero: append t = 0 after `end`.
    """

    def __init__(self, start: float = 1.0, end: float = 1e-3, zero: bool = True):
        if not 1 >= start > end >= 0:
            raise ValueError(f"need 1 >= start > end >= 0, got start {start} and end {end}")
        if zero and end == 0:
            raise ValueError("a grid that ends at t = 0 needs no zero appended; set zero=false or end > 0")
        self.start, self.end, self.zero = float(start), float(end), zero

    def __call__(self, path: GaussianPath, steps: int) -> Tensor:
        """The times (steps + 1,), float64, falling."""
        nodes = steps if self.zero else steps + 1
        u = torch.linspace(0, 1, nodes, dtype=torch.float64)
        times = self.between(path, u)
        if len(u) > 1:  # the end points exactly, free of the rounding of a map and its inverse
            times[0], times[-1] = self.start, self.end
        return torch.cat([times, times.new_zeros(1)]) if self.zero else times

    @abstractmethod
    def between(self, path: GaussianPath, u: Tensor) -> Tensor:
        """The times at u in [0, 1], from `start` at u = 0 to `end` at u = 1."""


class Uniform(Grid):
    """t = start + u (end - start)."""

    def between(self, path: GaussianPath, u: Tensor) -> Tensor:
        return self.start + u * (self.end - self.start)
