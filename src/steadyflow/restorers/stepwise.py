"""Restorers that go from time to time: the loop, and DDIM's step from a denoised image."""

from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath
from steadyflow.restorers.restorer import Measurement, Restorer
from steadyflow.restorers.start import INITS, starting_state
from steadyflow.samplers.sampler import Progress, Watch, time_grid

Level = tuple[float, float]  # (alpha, sigma)


class StepwiseRestorer(Restorer):
    """A restorer whose update x_t -> x_s needs nothing but the current state. Owns the loop.

    Args:
        path, grid, steps: see OneStepSampler. One denoiser call a step.
        init: the start, see `starting_state`.

    Raises:
        ValueError: another init; times that do not fall within [0, 1].
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        init: str = "noise",
    ):
        if init not in INITS:
            raise ValueError(f"init is one of {', '.join(INITS)}, got '{init}'")
        self.path, self.times, self.init = path, time_grid(path, grid, steps), init

    @abstractmethod
    def update(
        self,
        denoiser: Denoiser,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        z: Tensor,
        measurement: Measurement,
        **condition: Tensor,
    ) -> Tensor:
        """x_s from x_t; t, s () float64; z (B, *S) is the step's noise."""

    def begin(self, measurement: Measurement, noise: NoiseSource) -> Tensor:
        """The state at the first time."""
        return starting_state(self.init, self.path, self.times[0], measurement, noise)

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        measurement: Measurement,
        noise: NoiseSource,
        *,
        progress: Progress | None = None,
        **condition: Tensor,
    ) -> Tensor:
        x, watch = self.begin(measurement, noise), Watch(self.times, progress)
        for k, (t, s) in enumerate(pairwise(self.times)):
            x = self.update(denoiser, x, t, s, noise(k + 1), measurement, **condition)
            watch(x)
        watch.check()
        return x


def require_share(name: str, value: float) -> float:
    """The number in [0, 1], or a ValueError."""
    if not 0 <= value <= 1:
        raise ValueError(f"need 0 <= {name} <= 1, got {value}")
    return float(value)


def ancestral(x: Tensor, x0: Tensor, t: Level, s: Level, eta: float, z: Tensor) -> Tensor:
    """alpha_s x_0 + sqrt(sigma_s^2 - std^2) (x - alpha_t x_0) / sigma_t + std z, DDIM's step; std see `DDIM`."""
    (a_t, s_t), (a_s, s_s) = t, s
    std = eta * s_s * max(0.0, 1 - (s_s * a_t / (a_s * s_t)) ** 2) ** 0.5
    keep = (s_s**2 - std**2) ** 0.5 / s_t
    return keep * x + (a_s - keep * a_t) * x0 + std * z


def level(path: GaussianPath, t: Tensor) -> Level:
    """(alpha, sigma) at t, as numbers."""
    alpha, sigma = path(t)
    return alpha.item(), sigma.item()
