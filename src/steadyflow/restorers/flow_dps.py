"""FlowDPS: data consistency of the flow's clean end, fresh noise at its other."""

from collections.abc import Sequence

from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid
from steadyflow.paths import GaussianPath
from steadyflow.restorers.restorer import Measurement
from steadyflow.restorers.stepwise import StepwiseRestorer, level


class FlowDPS(StepwiseRestorer):
    """x_s = alpha_s x_0 + sigma_s [sqrt(sigma_s) eps + sqrt(1 - sigma_s) z],   eps = (x_t - alpha_t D) / sigma_t

        x_0 = (1 - sigma_t) D + sigma_t v,   v from D by `descents` times  v <- v + scale A^T (y - A v)

    on conditional OT, alpha = 1 - t, sigma = t. The last step, to s = 0, is x_0. No gradient of the network.
    Source: Kim et al. 2025 (FlowDPS), Algorithm 1.

    Args:
        path, grid, steps, init: see StepwiseRestorer. One evaluation a step.
        scale: step size on |y - A v|^2 / 2; below 2 / |A|^2 it does not diverge, and 1 suits an A of norm 1.
        descents: steps of it.

    Raises:
        ValueError: another path; scale <= 0 or descents < 1; an operator that is not linear.
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
        if not (0 < scale < float("inf") and descents >= 1):
            raise ValueError(f"need scale > 0 and descents >= 1, got {scale} and {descents}")
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
            v = v + self.scale * operator.adjoint(y - operator(v))
        return a_s * x0.lerp(v, s_t) + s_s * noise
