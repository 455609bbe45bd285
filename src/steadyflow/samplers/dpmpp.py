"""DPM-Solver++ (2M), deterministic and stochastic."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steadyflow.grids import Grid
from steadyflow.paths import GaussianPath
from steadyflow.samplers.multistep import DataMultistep


class DPMpp(DataMultistep):
    """x_{n+1} = A x_n + (alpha_{n+1} - A alpha_n) [D_n + (D_n - D_{n-1}) h_n / (2 h_{n-1})] + std z_n,

        A = (sigma_{n+1} / sigma_n) g,   std = sigma_{n+1} sqrt(1 - g^2),   g = exp(-eta h_n)

    h_n = log(rho_n / rho_{n+1}), rho = sigma / alpha. eta = 0 is DPM-Solver++ (2M), of order 2, which extrapolates D
    linearly in log rho; eta = 1 is its SDE-2M. The first step, from one value, and the step to sigma = 0, where h is
    infinite, are of order 1, whatever the number of steps. Source: Lu et al. 2022 (DPM-Solver++), Algorithm 2, Eq. 19.

    Args:
        path, grid, steps: see OneStepSampler. One denoiser call a step.
        eta: the share of noise that is drawn afresh, >= 0.
        lower_final: take the last step from D_n alone, for any number of steps: steadier where it is long in log rho.

    Raises:
        ValueError: eta < 0.
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        eta: float = 0.0,
        lower_final: bool = True,
    ):
        super().__init__(path, grid, steps)
        if not eta >= 0:
            raise ValueError(f"need eta >= 0, got {eta}")
        self.stochastic = eta > 0
        rho = path.ratio(self.times)
        h = (rho[:-1] / rho[1:]).log()
        shrink = rho[1:] / rho[:-1]
        slope = torch.zeros_like(h)
        slope[1:] = torch.where(h[1:].isfinite(), h[1:] / (2 * h[:-1]), 0.0)
        if lower_final:
            slope[-1] = 0.0
        gain = shrink**eta
        self.table = self.rows(gain, -((1 - gain * shrink) * slope).unsqueeze(1))
