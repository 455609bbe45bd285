"""DDIM, deterministic or stochastic."""

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid
from steadyflow.paths import GaussianPath, expand
from steadyflow.samplers.sampler import OneStepSampler


class DDIM(OneStepSampler):
    """x_s = alpha_s D + sqrt(sigma_s^2 - std^2) eps + std z,  eps = (x_t - alpha_t D) / sigma_t,

        std = eta sigma_s sqrt(1 - (sigma_s alpha_t / (alpha_s sigma_t))^2)

    eta = 0 is the deterministic DDIM (exact for constant eps in any path), eta = 1 has DDPM's posterior variance.
    Source: Song et al. 2021 (DDIM), Eq. 12 and 16.

    Args:
        path, grid, steps: see OneStepSampler. One denoiser call a step.
        eta: 0 <= eta <= 1.
    """

    def __init__(self, path: GaussianPath, grid: Grid | Tensor, steps: int | None = None, eta: float = 0.0):
        super().__init__(path, grid, steps)
        if not 0 <= eta <= 1:
            raise ValueError(f"need 0 <= eta <= 1, got {eta}")
        self.eta, self.stochastic = float(eta), eta > 0

    def step(
        self, denoiser: Denoiser, x: Tensor, t: Tensor, s: Tensor, z: Tensor | None, **condition: Tensor
    ) -> Tensor:
        (a_t, s_t), (a_s, s_s) = self.path(t), self.path(s)
        std = self.eta * s_s * torch.sqrt(1 - (s_s * a_t / (a_s * s_t)) ** 2)
        c = torch.sqrt(s_s**2 - std**2) / s_t
        x0 = denoiser(x, a_t, s_t, **condition)
        x = expand(c, x) * x + expand(a_s - c * a_t, x) * x0
        return x if z is None else x + expand(std, x) * z
