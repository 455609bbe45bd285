"""DDIM, deterministic or stochastic."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid
from steadyflow.paths import GaussianPath, accumulate, combine
from steadyflow.samplers.sampler import Coefficients, OneStepSampler


class DDIM(OneStepSampler):
    """x_s = alpha_s D + sqrt(sigma_s^2 - std^2) eps + std z,  eps = (x_t - alpha_t D) / sigma_t,

        std = eta sigma_s sqrt(1 - (rho_s / rho_t)^2),  rho = sigma / alpha

    eta = 0 is the deterministic DDIM: Euler's method for y = x / alpha in the variable rho, of order 1, the same on
    every path for the same rho, and exact where eps is constant (one data point). eta = 1 is ancestral sampling with
    DDPM's posterior variance. The step to sigma_s = 0 is x_s = alpha_s D.
    Source: Song et al. 2021 (DDIM), Eq. 12 and 16.

    Args:
        path, grid, steps: see OneStepSampler. One denoiser call a step.
        eta: 0 <= eta <= 1.
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        eta: float = 0.0,
    ):
        super().__init__(path, grid, steps)
        if not 0 <= eta <= 1:
            raise ValueError(f"need 0 <= eta <= 1, got {eta}")
        self.eta, self.stochastic = float(eta), eta > 0

    def coefficients(self, t: Tensor, s: Tensor) -> Coefficients:
        (a_t, s_t), (a_s, s_s) = self.path(t), self.path(s)
        std = self.eta * s_s * torch.sqrt(1 - (s_s * a_t / (a_s * s_t)) ** 2)
        keep = torch.sqrt(s_s**2 - std**2) / s_t
        return a_t, s_t, keep, a_s - keep * a_t, std

    def update(
        self, denoiser: Denoiser, x: Tensor, coefficients: Coefficients, z: Tensor | None, **condition: Tensor
    ) -> Tensor:
        a_t, s_t, keep, pull, std = coefficients
        x = combine(keep, x, pull, denoiser(x, a_t, s_t, **condition))
        return x if z is None else accumulate(x, std, z)
