"""SA-Solver, stochastic Adams methods."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from steadyflow.grids import Grid
from steadyflow.paths import GaussianPath
from steadyflow.samplers.adams import adams_integrals
from steadyflow.samplers.multistep import DataMultistep


class SASolver(DataMultistep):
    """x_{n+1} = (sigma_{n+1} / sigma_n) g x_n + alpha_{n+1} int D dm + sigma_{n+1} sqrt(1 - g^2) z_n,

        g = (rho_{n+1} / rho_n)^(tau^2),   m(rho) = (rho_{n+1} / rho)^(1 + tau^2),   rho = sigma / alpha

    the reverse diffusion with tau times its usual noise, where D is the polynomial in log rho through

        predictor   D_n, ..., D_{n-predictor+1}
        corrector   D_{n+1}, D_n, ..., D_{n-corrector+1}, with D_{n+1} at the predicted x_{n+1} and the same z_n

    one denoiser call a step. tau = 0 is UniPC. The last state is a predicted one; a step to sigma = 0 is the denoiser.
    Source: Xue et al. 2023 (SA-Solver), Eq. 14, 17 and Algorithm 1; tau constant on an interval as in their Appendix E.

    Args:
        path, grid, steps: see OneStepSampler.
        predictor: 1, 2 or 3 values.
        corrector: 0 (none), 1, 2 or 3 values beside the new one.
        tau: >= 0.
        tau_min, tau_max: tau is 0 for steps that start at a rho outside; 0.05 and 1 in the source for CIFAR-10.
        lower_final: use fewer values at the end, one in the last step and two in the one before, for any number of
            steps: steadier where the last steps are long in log rho, but for N to infinity the order is 2.

    Raises:
        ValueError: other orders, tau < 0 or tau_min > tau_max.
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        predictor: int = 3,
        corrector: int = 3,
        tau: float = 1.0,
        tau_min: float = 0.0,
        tau_max: float = math.inf,
        lower_final: bool = True,
    ):
        super().__init__(path, grid, steps)
        if predictor not in (1, 2, 3) or corrector not in (0, 1, 2, 3):
            raise ValueError(f"need predictor 1, 2 or 3 and corrector 0, 1, 2 or 3, got {predictor} and {corrector}")
        if not (tau >= 0 and tau_min <= tau_max):
            raise ValueError(f"need tau >= 0 and tau_min <= tau_max, got {tau}, {tau_min} and {tau_max}")
        self.stochastic = tau > 0
        rho = path.ratio(self.times)
        power = torch.where((tau_min <= rho[:-1]) & (rho[:-1] <= tau_max), float(tau) ** 2, 0.0).double()

        def rate(at: Tensor, n: Tensor) -> Tensor:
            return -(1 + power[n]) * (rho[n + 1] / at) ** (1 + power[n]) / at

        predict = adams_integrals(path, self.times, range(1, predictor), "log_rho", rate, lower_final)[0]
        ahead = (-1, *range(1, corrector))
        correct = adams_integrals(path, self.times, ahead, "log_rho", rate, lower_final)[0] if corrector else None
        self.table = self.rows((rho[1:] / rho[:-1]) ** power, predict, correct)
