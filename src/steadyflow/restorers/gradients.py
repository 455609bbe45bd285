"""PiGDM and DPS in the loops they were published with: DDIM's step, and a gradient beside it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser, denoise_and_pull
from steadyflow.grids import Grid
from steadyflow.paths import GaussianPath
from steadyflow.restorers.restorer import Measurement, posterior_variance, require_variance
from steadyflow.restorers.stepwise import StepwiseRestorer, ancestral, level, require_share

TINY = 1e-30  # in the place of the square of no guidance


class PiGDM(StepwiseRestorer):
    """x_s = DDIM(D, x_t, eta) + w alpha_t J^T v,   v = r^2 A^T (r^2 A A^T + sigma_y^2 I)^-1 (y - A D)

    with r^2 of `posterior_variance`, J = dD/dx, and v = A^+ y - A^+ A D without noise. The guidance is of
    the same size however small the step (`guidance.PiGDM` puts it into the denoiser); but of no image is it longer than

        |v|^2 / |J^T v|^2 J^T v

    beyond which J J^T v, the change of D, would go past v. Of a prior of variance c, J is alpha_t c / (alpha_t^2 c +
    sigma_t^2), and as published the step is 1 / alpha_t times too long where c is large: it diverges within a few steps
    of small alpha_t. Source: Song et al. 2023 (PiGDM), Algorithm 1, but for the limit.

    Args:
        path, grid, steps, init: see StepwiseRestorer. One evaluation and one vector-Jacobian product a step.
        weight: w; 1 in the source.
        eta: DDIM's; 1 in the source.
        r2: vp or ve.

    Raises:
        ValueError: w <= 0; eta outside [0, 1]; another r2.
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        weight: float = 1.0,
        eta: float = 1.0,
        init: str = "noise",
        r2: str = "vp",
    ):
        super().__init__(path, grid, steps, init)
        if not 0 < weight < float("inf"):
            raise ValueError(f"the guidance weight must be positive, got {weight}")
        self.weight, self.eta, self.r2 = float(weight), require_share("eta", eta), require_variance(r2)

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
        alpha, sigma = self.path(t)
        x0, pull = denoise_and_pull(denoiser, x, alpha, sigma, **condition)
        wanted = measurement.correction(x0, posterior_variance(alpha, sigma, self.r2))
        guidance = pull(wanted)
        ahead, back = (v.flatten(1).square().sum(1) for v in (wanted, guidance))
        length = torch.minimum(ahead / back.clamp(min=TINY), torch.full_like(back, self.weight * alpha.item()))
        x = ancestral(x, x0, level(self.path, t), level(self.path, s), self.eta, z)
        return x.addcmul_(length.reshape(-1, *[1] * (x.ndim - 1)), guidance)


class DPS(StepwiseRestorer):
    """x_s = DDIM(D, x_t, eta) - zeta d|y - A D| / dx_t

    with the norm of each sample, so that a batch of N equals N batches of one; A need only have a gradient. The size of
    the guidance does not depend on that of the step: zeta belongs to a number of steps (1000 in the source).
    (The source's Algorithm 1 has |.|^2 and zeta / |.|, twice as much.) Source: Chung et al. 2023 (DPS), Algorithm 1.

    Args:
        path, grid, steps, init: see StepwiseRestorer. One evaluation and one vector-Jacobian product a step.
        scale: zeta.
        eta: DDIM's; 1, ancestral sampling, in the source.

    Raises:
        ValueError: zeta <= 0; eta outside [0, 1].
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        scale: float = 1.0,
        eta: float = 1.0,
        init: str = "noise",
    ):
        super().__init__(path, grid, steps, init)
        if not 0 < scale < float("inf"):
            raise ValueError(f"the step size of the guidance must be positive, got {scale}")
        self.scale, self.eta = float(scale), require_share("eta", eta)

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
        x0, pull = denoise_and_pull(denoiser, x, *self.path(t), **condition)
        guidance = pull(measurement.misfit(x0)[1])
        x = ancestral(x, x0, level(self.path, t), level(self.path, s), self.eta, z)
        return x.sub_(guidance, alpha=self.scale)
