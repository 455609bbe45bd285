"""Pseudo-inverse guidance: PiGDM on any path, and its noiseless range/null-space variant."""

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser, denoise_and_pull
from steadyflow.paths import accumulate
from steadyflow.restorers.restorer import VARIANCES, Measurement, posterior_variance, require_variance

MAX_RATIO = 1e3  # of sigma / alpha; more is read as this: J falls with alpha, and rounding divided by it does not
GAMMAS = ("constant", "adaptive", "conjugate", "vp_ode")


class PiGDM(Denoiser):
    """x_0 = D + (sigma^2 / alpha) gamma J^T A^T (r^2 A A^T + sigma_y^2 I)^-1 (y - A D),   D = D(x, alpha, sigma)

    E[x_0 | x, y] where p(x_0 | x) = N(D, r^2 I), J = dD/dx, r^2 see `posterior_variance`: exact for x_0 ~ N(m, I)
    and gamma = 1. Without noise A^T (A A^T)^-1 is A^+. One evaluation and one vector-Jacobian product a
    call. gamma is the guidance weight w, times

        constant    1                                     (OT-ODE)
        adaptive    r^2                                   (PiGDM's own)
        conjugate   alpha^2 r^2                           (that of C-PiGDM and C-PiGFM)
        vp_ode      sqrt(alpha / (alpha^2 + sigma^2))     (VP-ODE)

    With the first two it obeys the scaling law of denoisers, so that all paths have one trajectory; the others depend
    on the path. Source: Song et al. 2023 (PiGDM), Eq. 7-8; Pokle et al. 2024, Eq. 5-9 (thesis Eq. 5.8, 5.11-5.16).

    Args:
        denoiser: D.
        measurement: y, A, sigma_y.
        weight: w.
        gamma: one of the four.
        r2: vp or ve.

    Raises:
        ValueError: another gamma or r2; a weight that is not positive.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        measurement: Measurement,
        weight: float = 1.0,
        gamma: str = "constant",
        r2: str = "vp",
    ):
        super().__init__()
        if gamma not in GAMMAS:
            raise ValueError(f"gamma is one of {', '.join(GAMMAS)}, got '{gamma}'")
        if not 0 < weight < float("inf"):
            raise ValueError(f"the guidance weight must be positive, got {weight}")
        self.denoiser, self.measurement, self.weight, self.gamma = denoiser, measurement, float(weight), gamma
        self.r2 = require_variance(r2)

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor | None = None, **condition: Tensor) -> Tensor:
        alpha = torch.maximum(alpha, sigma / MAX_RATIO)
        r2, norm2 = posterior_variance(alpha, sigma, self.r2), alpha**2 + VARIANCES[self.r2] * sigma**2
        x0, pull = denoise_and_pull(self.denoiser, x, alpha, sigma, **condition)
        step = pull(self.measurement.correction(x0, r2, y))  # r^2 times the gradient of log p(y | x)
        factor = {
            "constant": torch.ones_like(r2),
            "adaptive": r2,
            "conjugate": alpha**2 * r2,
            "vp_ode": torch.sqrt(alpha / (alpha**2 + sigma**2)),
        }
        return accumulate(x0, self.weight * factor[self.gamma] * norm2 / alpha, step)  # sigma^2 / (alpha r^2)


class NRSD(Denoiser):
    """x_0 = A^+ y + (I - A^+ A) D',   D' = PiGDM(D)

    the null-space, range-space decomposition: without noise A x_0 = y is known, and the guidance decides the rest
    alone. Source: Pokle et al. 2024, Appendix (thesis Eq. 5.19).

    Args:
        denoiser, measurement, weight, gamma: see PiGDM.

    Raises:
        ValueError: see PiGDM; a measurement with noise.
    """

    def __init__(self, denoiser: Denoiser, measurement: Measurement, weight: float = 1.0, gamma: str = "constant"):
        super().__init__()
        measurement.require_noiseless("NRSD")
        self.guided, self.measurement = PiGDM(denoiser, measurement, weight, gamma), measurement

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor | None = None, **condition: Tensor) -> Tensor:
        x0 = self.guided(x, alpha, sigma, y=y, **condition)
        return x0 + self.measurement.correction(x0, torch.zeros(()), y)
