"""UniPC, the unified predictor-corrector."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steadyflow.grids import Grid
from steadyflow.paths import GaussianPath
from steadyflow.samplers.adams import adams_integrals
from steadyflow.samplers.multistep import DataMultistep


class UniPC(DataMultistep):
    """x_{n+1} = (sigma_{n+1} / sigma_n) x_n + sigma_{n+1} int D d(alpha / sigma) from t_n to t_{n+1}, where D is

        predictor   the polynomial in log(sigma / alpha) through D_n, ..., D_{n-order+1}
        corrector   the one through D_{n+1}, D_n, ..., D_{n-order+1}, with D_{n+1} the denoiser at the predicted x_{n+1}

    D_{n+1} is then the next step's D_n: one denoiser call a step, and order + 1 as order of convergence. The last state
    is a predicted one. The first steps have fewer values, the step to sigma = 0 is the denoiser. Straight lines are
    integrated by the midpoint, D_n + (D' - D_n) / 2 at the step's end, as in the source's code (its B(h) = e^h - 1;
    where the polynomial is of higher degree, B(h) cancels): a long step then leans less on D'.

    Source: Zhao et al. 2023 (UniPC), Algorithms 1 and 2 with data prediction, Eq. 11-13.

    Args:
        path, grid, steps: see OneStepSampler.
        order: 1, 2 or 3.
        lower_final: use fewer values at the end, one in the last step and two in the one before, for any number of
            steps: steadier where the last steps are long in log rho, but for N to infinity the order is 2.

    Raises:
        ValueError: another order.
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        order: int = 3,
        lower_final: bool = True,
    ):
        super().__init__(path, grid, steps)
        if order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {order}")
        rho = path.ratio(self.times)

        def rate(at: Tensor, n: Tensor) -> Tensor:  # of sigma_{n+1} / alpha_{n+1} d (alpha / sigma)
            return -rho[n + 1] / at**2

        def weights(offsets: list[int]) -> Tensor:
            w, _ = adams_integrals(path, self.times, offsets, "log_rho", rate, lower_final)
            n = torch.arange(self.steps).unsqueeze(1)
            level = rho.log()
            away = (level[n - torch.tensor(offsets, dtype=torch.int64)] - level[n]) / (level[n + 1] - level[n])
            line = (w != 0).sum(1, keepdim=True) == 1
            return torch.where(line & (w != 0), (1 - rho[n + 1] / rho[n]) / (2 * away), w)

        past = [*range(1, order)]
        self.table = self.rows(torch.ones(self.steps, dtype=torch.float64), weights(past), weights([-1, *past]))
