"""DDPM, ancestral sampling."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid
from steadyflow.paths import GaussianPath, accumulate, combine, expand
from steadyflow.samplers.sampler import Coefficients, OneStepSampler


class DDPM(OneStepSampler):
    """x_s = alpha_s D + (alpha_t / alpha_s) (sigma_s / sigma_t)^2 (x_t - alpha_t D) + std z,  rho = sigma / alpha

        small: std = sigma_s sqrt(1 - (rho_s / rho_t)^2)    the variance of q(x_s | x_t, x_0), right for one data point
        large: std = sigma_t sqrt(1 - (rho_s / rho_t)^2)    beta_t of the chain, right for x_0 ~ N(0, I); for s = 0 none
        learned: small^(1 - v) large^v                      v by the network (Nichol & Dhariwal 2021, Eq. 15)

    the mean of q(x_s | x_t, x_0 = D) on any path and any grid; between neighbouring indices of the discrete path it is
    the chain as published. Source: Ho et al. 2020, Eq. 6-7, 11 and Section 3.2.

    Args:
        path, grid, steps: see OneStepSampler. One denoiser call a step.
        variance: "small", "large" or "learned".

    Raises:
        ValueError: another variance; in the call, a network that was not trained to predict one.
    """

    stochastic = True

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        variance: str = "small",
    ):
        super().__init__(path, grid, steps)
        if variance not in ("small", "large", "learned"):
            raise ValueError(f"variance must be small, large or learned, got {variance}")
        self.variance = variance

    def coefficients(self, t: Tensor, s: Tensor) -> Coefficients:
        (a_t, s_t), (a_s, s_s) = self.path(t), self.path(s)
        fresh = 1 - (s_s * a_t / (a_s * s_t)) ** 2  # the share of the noise at t that is new since s
        small, large = torch.sqrt(fresh) * s_s, torch.sqrt(fresh) * s_t
        return a_t, s_t, a_t / a_s * (s_s / s_t) ** 2, a_s * fresh, small, torch.where(s_s > 0, large, 0.0)

    def update(
        self, denoiser: Denoiser, x: Tensor, coefficients: Coefficients, z: Tensor | None, **condition: Tensor
    ) -> Tensor:
        if z is None:
            raise ValueError("a DDPM step needs its noise z")
        a_t, s_t, keep, pull, small, large = coefficients
        if self.variance == "learned":
            x0, v = denoiser.with_variance(x, a_t, s_t, **condition)
            log_ratio = torch.log((large / small.clamp(min=1e-30)).clamp(min=1))  # for s = 0 both are 0
            std = expand(small, x) * torch.exp(expand(log_ratio, x) * v)
            return combine(keep, x, pull, x0).addcmul_(std, z)
        x = combine(keep, x, pull, denoiser(x, a_t, s_t, **condition))
        return accumulate(x, small if self.variance == "small" else large, z)
