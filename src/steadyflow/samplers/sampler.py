"""What a sampler is: noise in, samples out."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.diffusions import LinearDiffusion
from steadyflow.grids import Grid
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath

Progress = Callable[[float], None]  # called with the fraction done, in [0, 1]
Coefficients = tuple[Tensor, ...]  # of a step or of many, float64, each of the shape of t and s


class Sampler(ABC):
    """Turns noise into samples of the data distribution by calling a denoiser.

    Attributes: `iterations` (B,), the parallel iterations of each sample of the last call, of a sampler that has them;
    `shard`, whether the processes of a run make every sample together instead of each its own.
    """

    iterations: Tensor | None = None
    shard = False

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
            denoiser: E[x_0 | x]. Wrap its network in a CountedDenoiser to count the evaluations.
            noise: the keyed noise of the batch; step 0 is the starting point, step k the k-th step's.
            start: the state (B, *S) at the first time; by default sigma(t_0) z_0.
            progress: called with the fraction done after each step.
            condition: passed on to the denoiser.

        Raises:
            FloatingPointError: when the state stops being finite; says at which step.
        """


class OneStepSampler(Sampler):
    """A sampler whose update x_t -> x_s needs nothing but the current state. Owns the one sequential loop.

    A step is split in two: its coefficients, functions of (t, s) alone, which the loop computes once for the whole
    grid, and its update, which calls the denoiser.

    Args:
        path: the Gaussian path to sample along.
        grid: the times t_0 > ... > t_N: a rule (`Grid`) or the N + 1 times themselves.
        steps: N, for a rule; a list of times brings its own.

    Raises:
        ValueError: a rule without steps, steps < 1, or times that do not fall or leave [0, 1].
    """

    stochastic = False  # whether `update` uses its noise z

    def __init__(self, path: GaussianPath, grid: Grid | Tensor | Sequence[float], steps: int | None = None):
        self.path = path
        self.times = time_grid(path, grid, steps)

    @property
    def steps(self) -> int:
        """N."""
        return len(self.times) - 1

    @abstractmethod
    def coefficients(self, t: Tensor, s: Tensor) -> Coefficients:
        """What the steps t -> s need of the path; t, s of any shape."""

    @abstractmethod
    def update(
        self, denoiser: Denoiser, x: Tensor, coefficients: Coefficients, z: Tensor | None, **condition: Tensor
    ) -> Tensor:
        """x_s from x_t with the coefficients, each () or (B,), of its step. z (B, *S) is the step's noise."""

    def step(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, z: Tensor | None = None, **condition: Tensor
    ) -> Tensor:
        """x_s from x_t, s < t. t and s are () or (B,): a batch may mix times. z (B, *S) is the step's noise."""
        return self.update(denoiser, x, self.coefficients(t, s), z, **condition)

    def noises(self, noise: NoiseSource) -> Tensor | None:
        """The noises of all steps, (B, N, *S), of a stochastic sampler; else None."""
        return torch.stack([noise(k + 1) for k in range(self.steps)], 1) if self.stochastic else None

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
        table = [c.unbind() for c in self.coefficients(self.times[:-1], self.times[1:])]
        watch = Watch(self.times, progress)
        for k, row in enumerate(zip(*table, strict=True)):
            x = self.update(denoiser, x, row, noise(k + 1) if self.stochastic else None, **condition)
            watch(x)
        watch.check()
        return x


class Watch:
    """What a loop over the times t_0 > ... > t_N of a grid tells: after each step the fraction done, at the end of a
    state that is not finite.

    Args:
        times: (N + 1,).
        progress: called with the fraction done.
    """

    def __init__(self, times: Tensor, progress: Progress | None):
        self.times, self.progress = times, progress
        self.sums: list[Tensor] = []  # one number a step: `check` waits for the device once

    def __call__(self, x: Tensor) -> None:
        """After each step, with its state."""
        self.sums.append(x.sum(dtype=torch.float32))
        if self.progress is not None:
            self.progress(len(self.sums) / (len(self.times) - 1))

    def check(self) -> None:
        """Raises a FloatingPointError at the first step whose state, by the sum of its entries, is not finite."""
        bad = (~torch.stack(self.sums).isfinite()).nonzero()
        if len(bad):
            k = int(bad[0])
            raise FloatingPointError(
                f"the state is not finite after step {k + 1} of {len(self.times) - 1} (t = {self.times[k]:.4g} -> "
                f"{self.times[k + 1]:.4g}); the network returned NaN or the step diverged"
            )


def time_grid(
    path: GaussianPath | LinearDiffusion,
    grid: Grid | Tensor | Sequence[float],
    steps: int | None,
    linear: bool = False,
) -> Tensor:
    """The times (N + 1,) in float64 of a grid rule, or of a list of times, checked to fall within [0, 1].

    linear: whether the sampler takes linear diffusions.
    """
    if isinstance(path, LinearDiffusion) and not linear:
        raise ValueError(
            f"this sampler is of Gaussian paths, not of {type(path).__name__}; choose sampler=gddim, ancestral, "
            "euler_maruyama or linear_rk45"
        )
    if isinstance(grid, Grid):
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a positive integer, got {steps}; set steps (sampler.steps=20)")
        times = grid(cast(GaussianPath, path), steps)  # a linear diffusion refuses rules in sigma / alpha
    else:
        times = torch.as_tensor(list(grid), dtype=torch.float64)
        if steps is not None and steps != len(times) - 1:
            raise ValueError(f"steps = {steps}, but the grid given has {len(times)} times; leave steps out")
    if times.ndim != 1 or len(times) < 2 or not (times.diff() < 0).all() or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"a time grid must fall strictly within [0, 1], got {times.tolist()}")
    return times


def noise_start(path: GaussianPath, t: Tensor, noise: NoiseSource) -> Tensor:
    """The state at a time so noisy that the data no longer matters: sigma(t) z_0."""
    return path(t)[1].item() * noise(0)
