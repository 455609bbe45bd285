"""What a sampler is: noise in, samples out."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath

Progress = Callable[[float], None]  # called with the fraction done, in [0, 1]


class Sampler(ABC):
    """Turns noise into samples of the data distribution by calling a denoiser."""

    @abstractmethod
    def __call__(
        self,
        denoiser: Denoiser,
        noise: NoiseSource,
        *,
        start: Tensor | None = None,
        progress: Progress | None = None,
        **condition: Tensor,
    ) -> Tensor:
        """Samples (B, *S).

        Args:
            denoiser: E[x_0 | x].
            noise: the keyed noise of the batch; step 0 is the starting point, step k the k-th step's.
            start: the state (B, *S) at the grid's first time; by default sigma(t_0) z_0.
            progress: called with the fraction done after each step.
            condition: passed on to the denoiser.

        Raises:
            FloatingPointError: when the state stops being finite; says at which step.
        """


class OneStepSampler(Sampler):
    """A sampler whose update x_t -> x_s needs nothing but the current state. Owns the one sequential loop.

    Args:
        path: the Gaussian path to sample along.
        grid: the times t_0 > ... > t_N: a rule (`Grid`) or the times themselves (N + 1,).
        steps: N, for a rule; a tensor of times brings its own.

    Raises:
        ValueError: a rule without steps, steps < 1, or times that do not fall or leave [0, 1].
    """

    stochastic = False  # whether `step` uses its noise z

    def __init__(self, path: GaussianPath, grid: Grid | Tensor, steps: int | None = None):
        self.path = path
        self.times = time_grid(path, grid, steps)

    @abstractmethod
    def step(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, z: Tensor | None, **condition: Tensor
    ) -> Tensor:
        """x_s from x_t, s < t. t and s are () or (B,): a batch may mix times. z (B, *S) is the step's noise."""

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
        x = self.path(self.times[0])[1].to(noise.dtype) * noise(0) if start is None else start
        steps, sums = len(self.times) - 1, []
        for k in range(steps):
            z = noise(k + 1) if self.stochastic else None
            x = self.step(denoiser, x, self.times[k], self.times[k + 1], z, **condition)
            sums.append(x.sum())  # one number a step: the check below costs no synchronisation inside the loop
            if progress is not None:
                progress((k + 1) / steps)
        bad = ~torch.stack(sums).isfinite()
        if bad.any():
            k = int(bad.nonzero()[0])
            raise FloatingPointError(
                f"the state is not finite after step {k + 1} of {steps} (t = {self.times[k]:.4g} -> "
                f"{self.times[k + 1]:.4g}); the network returned NaN or the step diverged"
            )
        return x


def time_grid(path: GaussianPath, grid: Grid | Tensor, steps: int | None) -> Tensor:
    """The times (N + 1,) in float64 of a grid rule or a tensor, checked to fall within [0, 1]."""
    if isinstance(grid, Tensor):
        times = grid.double()
        if steps is not None and steps != len(times) - 1:
            raise ValueError(f"steps = {steps}, but the grid given has {len(times)} times; leave steps out")
    elif steps is None or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps}; set steps (sampler.steps=20)")
    else:
        times = grid(path, steps)
    if times.ndim != 1 or len(times) < 2 or not (times.diff() < 0).all() or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"a time grid must fall strictly within [0, 1], got {times.tolist()}")
    return times
