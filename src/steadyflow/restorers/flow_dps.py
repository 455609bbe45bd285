"""FlowDPS: data consistency of the flow's clean end, fresh noise at its other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid
from steadyflow.paths import GaussianPath, expand
from steadyflow.restorers.restorer import Measurement
from steadyflow.restorers.stepwise import StepwiseRestorer, level

TINY = 1e-30  # of |A g|^2: where it is 0, so is g


class FlowDPS(StepwiseRestorer):
    """x_s = alpha_s x_0 + sigma_s [sqrt(sigma_s) eps + sqrt(1 - sigma_s) z],   eps = (x_t - alpha_t D) / sigma_t

        x_0 = (1 - sigma_t) D + sigma_t v,   v from D by `descents` times  v <- v + scale (|g|^2 / |A g|^2) g
                                                                           g = A^T (y - A v)

    on conditional OT, alpha = 1 - t, sigma = t. The last step, to s = 0, is x_0. With scale 1 each descent goes to the
    least |y - A v| along g, of each sample, whatever the size of A (the source has one step size for each A). No
    gradient of the network. Source: Kim et al. 2025 (FlowDPS), Algorithm 1.

    Args:
        path, grid, steps, init: see StepwiseRestorer. One evaluation a step.
        scale: of a descent; it does not diverge below 2.
        descents: how many a step.

    Raises:
        ValueError: another path; scale outside (0, 2) or descents < 1; an operator that is not linear.
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        scale: float = 1.0,
        descents: int = 3,
        init: str = "noise",
    ):
        super().__init__(path, grid, steps, init)
        alpha, sigma = path(self.times)
        if (alpha + sigma - 1).abs().max() > 1e-9:
            raise ValueError(f"FlowDPS needs a path with alpha + sigma = 1, not {type(path).__name__}")
        if not (0 < scale < 2 and descents >= 1):
            raise ValueError(f"need 0 < scale < 2 and descents >= 1, got {scale} and {descents}")
        self.scale, self.descents = float(scale), int(descents)

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
        operator, y = measurement.operator, measurement.y
        if not hasattr(operator, "adjoint"):
            raise ValueError(f"FlowDPS here needs A^T, and {type(operator).__name__} is not linear")
        (a_t, s_t), (a_s, s_s) = level(self.path, t), level(self.path, s)
        x0 = denoiser(x, *self.path(t), **condition)
        noise = s_s**0.5 / s_t * (x - a_t * x0) + (1 - s_s) ** 0.5 * z
        v = x0
        for _ in range(self.descents):
            g = operator.adjoint(y - operator(v))
            size, seen = (torch.linalg.vector_norm(r.flatten(1), dim=1) for r in (g, operator(g)))
            v = v + expand(self.scale * size.square() / seen.square().clamp(min=TINY), g) * g
        return a_s * x0.lerp(v, s_t) + s_s * noise
