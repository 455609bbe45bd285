"""Guidance by the gradient of the residual's norm."""

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser, denoise_and_pull
from steadyflow.guidance.pigdm import MAX_RATIO
from steadyflow.paths import accumulate
from steadyflow.restorers.restorer import Measurement


class DPS(Denoiser):
    """x_0 = D - (sigma^2 / alpha) w d|y - A D| / dx = D + (sigma^2 / alpha) w J^T A^T (y - A D) / |y - A D|

    DPS' p(y | x) = p(y | x_0 = D), with |y - A D| / w, the norm of each sample, in the place of sigma_y^2. The norm of
    a sample makes a batch of N equal N batches of one. A need not be linear, but must have a gradient. One
    evaluation and one vector-Jacobian product a call. (DPS' own loop, in which the size of a step does not scale the
    guidance, is `restorers.DPS`.) Source: Chung et al. 2023 (DPS), Eq. 14-16.

    Args:
        denoiser: D.
        measurement: y, A. sigma_y is not used.
        weight: w, in units of 1 / x; |y - A D| / sigma_y^2 gives the likelihood itself.

    Raises:
        ValueError: a weight that is not positive.
    """

    def __init__(self, denoiser: Denoiser, measurement: Measurement, weight: float):
        super().__init__()
        if not 0 < weight < float("inf"):
            raise ValueError(f"the guidance weight must be positive, got {weight}")
        self.denoiser, self.measurement, self.weight = denoiser, measurement, float(weight)

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor | None = None, **condition: Tensor) -> Tensor:
        alpha = torch.maximum(alpha, sigma / MAX_RATIO)
        x0, pull = denoise_and_pull(self.denoiser, x, alpha, sigma, **condition)
        _, slope = self.measurement.misfit(x0, y)
        return accumulate(x0, -self.weight * sigma**2 / alpha, pull(slope))
