"""A guided sampler in plain words, as the presets of configs/sampler write it."""

from collections.abc import Callable
from functools import partial

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid
from steadyflow.paths import GaussianPath
from steadyflow.restorers.guided import GuidedSampler, PathSampler


def guided(
    path: GaussianPath,
    steps: int,
    t0: float,
    weight: float | None = None,
    *,
    grid: Callable[..., Grid],
    sampler: Callable[..., PathSampler],
    guidance: Callable[..., Denoiser],
    init: str = "pinv",
) -> GuidedSampler:
    """GuidedSampler(sampler(path, grid(start=t0), steps), guidance(weight), init).

    Args:
        path, steps: see OneStepSampler.
        t0: where the path is entered, in its time: 1 is noise.
        weight: of the guidance; None for one that has none, or its own.
        grid: of times, without its start.
        sampler: Euler, DDIM, Heun or another sampler with a grid.
        guidance: what makes a guided denoiser of (denoiser, measurement, weight), or of the first two.
        init: see GuidedSampler.

    Raises:
        ValueError: what the classes refuse.
    """
    return GuidedSampler(
        sampler(path, grid(start=t0), steps), guidance if weight is None else partial(guidance, weight=weight), init
    )
