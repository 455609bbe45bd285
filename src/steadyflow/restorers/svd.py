"""DDNM+ and DDRM: measured directions are set to what was measured, as exactly as the noise of the step allows."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath
from steadyflow.restorers.restorer import Measurement
from steadyflow.restorers.stepwise import StepwiseRestorer, level, require_share

TINY = 1e-300  # in the place of a noise of 0 that only looks as if it divided


class DDNM(StepwiseRestorer):
    """x_s = alpha_s (D + L u) + N (sqrt(1 - eta^2) eps + eta z)

        u = A^+ y - A^+ A D,   eps = (x_t - alpha_t D) / sigma_t
        L_i = min(1, sigma_s s_i / (alpha_s sigma_y)),   N_i^2 = sigma_s^2 - (alpha_s L_i sigma_y / s_i)^2

    in the direction of singular value s_i, and L = 0, N = sigma_s in the null space: the noise of y comes in place of
    the step's, so that x_s has noise sigma_s in every direction if D is right (DDNM+). Without noise, DDNM:
    L = A^+ A, N = sigma_s. No gradient. Source: Wang et al. 2023 (DDNM), Eq. 13 and Section 3.3.

    Args:
        path, grid, steps, init: see StepwiseRestorer.
        eta: how much of the step's noise is fresh; 0.85 in the source.

    Raises:
        ValueError: eta outside [0, 1]; noise and an operator that is not linear.
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        eta: float = 0.85,
        init: str = "noise",
    ):
        super().__init__(path, grid, steps, init)
        self.eta = require_share("eta", eta)

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
        (a_t, s_t), (a_s, s_s), noise = level(self.path, t), level(self.path, s), measurement.sigma_y
        x0 = denoiser(x, *self.path(t), **condition)
        u = measurement.residual(x0)
        fresh = (1 - self.eta**2) ** 0.5 / s_t * (x - a_t * x0) + self.eta * z
        if noise == 0:
            return a_s * (x0 + u) + s_s * fresh
        if not hasattr(measurement.operator, "spectral"):
            kind = type(measurement.operator).__name__
            raise ValueError(f"DDNM needs singular values where y has noise, and {kind} is not linear; set sigma_y=0")

        def scaled(g: Tensor) -> Tensor:  # L_i / s_i
            return torch.where(g > 0, torch.minimum(1 / g, torch.full_like(g, s_s / (a_s * noise))), 0.0)

        moved = measurement.operator.spectral(u, lambda g: scaled(g) * g)
        left = measurement.operator.spectral(
            fresh, lambda g: (s_s**2 - (a_s * noise * scaled(g)) ** 2).clamp(min=0).sqrt()
        )
        return a_s * (x0 + moved) + left


class DDRM(StepwiseRestorer):
    """With rho = sigma / alpha, u = A^+ y - A^+ A D, eps = (x_t - alpha_t D) / sigma_t, x_s = alpha_s D +

        sigma_s (sqrt(1 - eta^2) eps + eta z)                                in the null space
        sigma_s (sqrt(1 - eta^2) s_i u / sigma_y + eta z)                    where rho_s < sigma_y / s_i
        alpha_s (eta_b u + sqrt(rho_s^2 - eta_b^2 sigma_y^2 / s_i^2) z)      elsewhere, s_i the singular value

    so that x_s has noise sigma_s in every direction if D is right. The start is A^+ y with its noise filled up to
    sigma. No gradient. Source: Kawar et al. 2022 (DDRM), Eq. 7-8.

    Args:
        path, grid, steps: see StepwiseRestorer.
        eta, eta_b: 0.85 and 1 in the source.

    Raises:
        ValueError: eta or eta_b outside [0, 1]; an operator that is not linear.
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        eta: float = 0.85,
        eta_b: float = 1.0,
    ):
        super().__init__(path, grid, steps)
        self.eta, self.eta_b = require_share("eta", eta), require_share("eta_b", eta_b)

    def begin(self, measurement: Measurement, noise: NoiseSource) -> Tensor:
        if not hasattr(measurement.operator, "spectral"):
            raise ValueError(f"DDRM needs singular values, and {type(measurement.operator).__name__} is not linear")
        alpha, sigma = level(self.path, self.times[0])
        limit = alpha * measurement.sigma_y  # where y is noisier than the start, it is left out

        def fill(g: Tensor) -> Tensor:
            return torch.where(sigma * g >= limit, (sigma**2 - (limit / g) ** 2).clamp(min=0).sqrt(), sigma)

        known, filled = self._factor(lambda g: (sigma * g >= limit).to(g)), self._factor(fill, sigma)
        spectral = measurement.operator.spectral
        return alpha * spectral(measurement.back, known) + spectral(noise(0), filled)

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
        (a_t, s_t), (a_s, s_s), noise = level(self.path, t), level(self.path, s), measurement.sigma_y
        x0 = denoiser(x, *self.path(t), **condition)
        u = measurement.residual(x0)
        keep = (1 - self.eta**2) ** 0.5 * s_s

        def pull(g: Tensor) -> Tensor:  # first where y is less noisy than x_s, then elsewhere
            return torch.where(s_s * g >= a_s * noise, a_s * self.eta_b, keep * g / max(noise, TINY))

        def fill(g: Tensor) -> Tensor:
            rest = (s_s**2 - (a_s * self.eta_b * noise / g) ** 2).clamp(min=0).sqrt()
            return torch.where(s_s * g >= a_s * noise, rest, self.eta * s_s)

        towards, fresh = self._factor(pull), self._factor(fill, self.eta * s_s)
        old = self._factor(torch.zeros_like, keep)
        spectral = measurement.operator.spectral
        return a_s * x0 + spectral(u, towards) + spectral((x - a_t * x0) / s_t, old) + spectral(z, fresh)

    @staticmethod
    def _factor(measured: Callable[[Tensor], Tensor], null: float = 0.0) -> Callable[[Tensor], Tensor]:
        """A function of the singular values that is `null` where they are 0."""
        return lambda g: torch.where(g > 0, measured(torch.where(g > 0, g, 1.0)), null)
