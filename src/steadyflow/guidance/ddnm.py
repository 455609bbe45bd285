"""Null-space guidance without gradients."""

from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.restorers.restorer import Measurement, posterior_variance


class DDNM(Denoiser):
    """x_0 = D + r^2 A^T (r^2 A A^T + sigma_y^2 I)^-1 (y - A D),   r^2 = sigma^2 / (alpha^2 + sigma^2)

    Without noise this is A^+ y + (I - A^+ A) D, DDNM's x_0: the measured part is set to what was measured. With noise
    it is E[x_0 | x, y] where p(x_0 | x) = N(D, r^2 I) and y says nothing of x but through x_0: PiGDM without its
    Jacobian (DDNM+, which also reduces the noise that a step adds, has a loop of its own: `restorers.DDNM`). One
    evaluation a call, no gradient. Source: Wang et al. 2023 (DDNM), Eq. 13.

    Args:
        denoiser: D.
        measurement: y, A, sigma_y.
    """

    def __init__(self, denoiser: Denoiser, measurement: Measurement):
        super().__init__()
        self.denoiser, self.measurement = denoiser, measurement

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor | None = None, **condition: Tensor) -> Tensor:
        x0 = self.denoiser(x, alpha, sigma, **condition)
        return x0 + self.measurement.correction(x0, posterior_variance(alpha, sigma), y)
