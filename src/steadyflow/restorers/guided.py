"""A sampler under guidance."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath
from steadyflow.restorers.restorer import Measurement, Restorer
from steadyflow.restorers.start import INITS, starting_state
from steadyflow.samplers.sampler import Progress

Guide = Callable[[Denoiser, Measurement], Denoiser]


class PathSampler(Protocol):
    """A sampler that says where it starts: OneStepSampler, the multistep methods and Restart do."""

    path: GaussianPath
    times: Tensor

    def __call__(
        self,
        denoiser: Denoiser,
        noise: NoiseSource,
        *,
        start: Tensor | None = None,
        progress: Progress | None = None,
        **condition: Tensor,
    ) -> Tensor: ...


class GuidedSampler(Restorer):
    """A sampler whose denoiser is guided towards the measurement:

        x_{t_0} = alpha y' + sigma z,   then sampler(guidance(D, measurement)) from t_0 on

    The guided denoiser stands for E[x_0 | x, y], so any sampler on any path will do. Presets of it:

        OT-ODE    ConditionalOT, Euler from t_0 = 0.8, PiGDM of constant weight 1, y' = y, pinv or nearest
        VP-ODE    VariancePreserving, Euler from t_0 = 0.6, PiGDM with gamma=vp_ode

    Source: Pokle et al. 2024, Algorithms 1 and 2 (thesis Algorithms 5 and 6; their time is 1 - t).

    Args:
        sampler: a sampler with a `path` and `times`.
        guidance: what makes a guided denoiser of (denoiser, measurement): PiGDM, NRSD, DPS or DDNM with its options
            bound.
        init: y', one of noise, y, pinv, nearest (see `starting_state`).

    Raises:
        ValueError: another init; a sampler without times.
    """

    def __init__(self, sampler: PathSampler, guidance: Guide, init: str = "pinv"):
        if init not in INITS:
            raise ValueError(f"init is one of {', '.join(INITS)}, got '{init}'")
        if not hasattr(sampler, "times"):
            raise ValueError(f"{type(sampler).__name__} has no grid of times, and a restorer starts at its first")
        self.sampler, self.guidance, self.init = sampler, guidance, init

    def __call__(
        self,
        denoiser: Denoiser,
        measurement: Measurement,
        noise: NoiseSource,
        *,
        progress: Progress | None = None,
        **condition: Tensor,
    ) -> Tensor:
        start = starting_state(self.init, self.sampler.path, self.sampler.times[0], measurement, noise)
        guided = self.guidance(denoiser, measurement)
        # y goes along as a condition, so that a sampler that regroups the batch regroups the measurements too
        return self.sampler(guided, noise, start=start, progress=progress, y=measurement.y, **condition)
