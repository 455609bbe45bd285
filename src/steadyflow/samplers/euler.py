"""Euler's method for the probability-flow ODE."""

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.paths import combine
from steadyflow.samplers.sampler import Coefficients, OneStepSampler


class Euler(OneStepSampler):
    """x_s = x_t + (s - t) v(x_t, t),  v = alpha' D + sigma' (x - alpha D) / sigma  (' = d/dt of the path)

    of order 1. It integrates in the path's own time, so the path chooses the variable: on conditional OT and on EDM,
    whose alpha and sigma are straight lines, it is DDIM; on VP it is not, and DDIM is the better method. The step to
    sigma_s = 0 is the denoiser, x_s = alpha_s D, to which the formula tends on those straight paths.
    Source: Song et al. 2021 (score SDE), Eq. 13; Lipman et al. 2023, Eq. 4.

    Args:
        path, grid, steps: see OneStepSampler. One denoiser call a step.
    """

    def coefficients(self, t: Tensor, s: Tensor) -> Coefficients:
        (a_t, s_t), (a_s, s_s), (p, q) = self.path(t), self.path(s), self.path.velocity(t)
        last = s_s == 0
        return a_t, s_t, torch.where(last, 0.0, 1 + (s - t) * p), torch.where(last, a_s, (s - t) * q)

    def update(
        self, denoiser: Denoiser, x: Tensor, coefficients: Coefficients, z: Tensor | None, **condition: Tensor
    ) -> Tensor:
        a_t, s_t, keep, pull = coefficients
        return combine(keep, x, pull, denoiser(x, a_t, s_t, **condition))
