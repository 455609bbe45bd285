"""Multistep sampling of consistency models."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid
from steadyflow.paths import GaussianPath, accumulate, expand
from steadyflow.samplers.sampler import Coefficients, OneStepSampler


class Consistency(OneStepSampler):
    """x_s = alpha_s f(x_t) + sqrt(sigma_s^2 - (alpha_s m)^2) z

    for a consistency function f (`ConsistencyDenoiser`), whose values still have the noise m: in one step the sample
    itself, in several each value is given fresh noise and mapped again. Where f is exact, x_s has the law of the path.
    Source: Song et al. 2023 (consistency models), Algorithm 1.

    Args:
        path, grid, steps: see OneStepSampler. One call a step.
        sigma_min: m, of f.

    Raises:
        ValueError: sigma_min < 0.
    """

    stochastic = True

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        sigma_min: float = 0.002,
    ):
        super().__init__(path, grid, steps)
        if sigma_min < 0:
            raise ValueError(f"need sigma_min >= 0, got {sigma_min}")
        self.sigma_min = float(sigma_min)

    def coefficients(self, t: Tensor, s: Tensor) -> Coefficients:
        (a_t, s_t), (a_s, s_s) = self.path(t), self.path(s)
        return a_t, s_t, a_s, torch.sqrt((s_s**2 - (a_s * self.sigma_min) ** 2).clamp(min=0))

    def update(
        self, denoiser: Denoiser, x: Tensor, coefficients: Coefficients, z: Tensor | None, **condition: Tensor
    ) -> Tensor:
        if z is None:
            raise ValueError("a step of consistency sampling needs its noise z")
        a_t, s_t, a_s, std = coefficients
        return accumulate(expand(a_s, x) * denoiser(x, a_t, s_t, **condition), std, z)
