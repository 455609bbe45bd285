"""DiffPIR: a proximal step on the data between two denoisings."""

from collections.abc import Sequence

from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid
from steadyflow.paths import GaussianPath
from steadyflow.restorers.restorer import Measurement
from steadyflow.restorers.stepwise import StepwiseRestorer, level, require_share

MAX_RATIO = 1e3  # of sigma / alpha, infinite where conditional OT begins


class DiffPIR(StepwiseRestorer):
    """x_0 = argmin_v |y - A v|^2 / (2 sigma_y^2) + |v - D|^2 / (2 r^2),   r^2 = (sigma_t / alpha_t)^2 / lambda
    x_s = alpha_s x_0 + sigma_s (sqrt(1 - zeta) (x_t - alpha_t x_0) / sigma_t + sqrt(zeta) z)

    solved exactly, x_0 = D + r^2 A^T (r^2 A A^T + sigma_y^2 I)^-1 (y - A D); without noise A^+ y + (I - A^+ A) D.
    No gradient. Source: Zhu et al. 2023 (DiffPIR), Algorithm 1.

    Args:
        path, grid, steps, init: see StepwiseRestorer.
        weight: lambda, larger trusts the denoiser more.
        zeta: how much of the noise is fresh.

    Raises:
        ValueError: lambda <= 0; zeta outside [0, 1].
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        weight: float = 7.0,
        zeta: float = 0.3,
        init: str = "noise",
    ):
        super().__init__(path, grid, steps, init)
        if not 0 < weight < float("inf"):
            raise ValueError(f"lambda must be positive, got {weight}")
        self.weight, self.zeta = float(weight), require_share("zeta", zeta)

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
        (a_t, s_t), (a_s, s_s) = level(self.path, t), level(self.path, s)
        x0 = denoiser(x, *self.path(t), **condition)
        x0 = x0 + measurement.correction(x0, self.path.ratio(t).clamp(max=MAX_RATIO) ** 2 / self.weight)
        return a_s * x0 + s_s * ((1 - self.zeta) ** 0.5 / s_t * (x - a_t * x0) + self.zeta**0.5 * z)
