"""ER-SDE-Solver, for reverse diffusions of any noise."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steadyflow.grids import Grid
from steadyflow.paths import GaussianPath
from steadyflow.samplers.adams import adams_integrals
from steadyflow.samplers.multistep import DataMultistep


class ERSDE(DataMultistep):
    """x_{n+1} / alpha_{n+1} = (phi_{n+1} / phi_n) x_n / alpha_n + phi_{n+1} int D d(1 / phi) + noise,

        noise of variance rho_{n+1}^2 - rho_n^2 (phi_{n+1} / phi_n)^2,   rho = sigma / alpha

    where D is the polynomial in rho through D_n, ..., D_{n-order+1}. phi = rho psi says how much noise is drawn afresh:

        er_sde_5   psi = exp(rho^0.3) + 10, the source's choice
        sde        psi = rho, the usual reverse diffusion
        ode        psi = 1, the probability flow

    One denoiser call a step, of which the first have fewer values; the step to sigma = 0 is the denoiser.
    Source: Cui et al. 2023 (ER-SDE-Solvers), Eq. 12-20, Algorithms 1-3. Order 3 is the full parabola here: the source
    leaves out the term (rho - rho_n) (rho_n - rho_{n-1}) of the second difference, and with it the third order.

    Args:
        path, grid, steps: see OneStepSampler.
        order: 1, 2 or 3.
        scale: er_sde_5, sde or ode.
        lower_final: use fewer values at the end, one in the last step and two in the one before, for any number of
            steps: steadier where the last steps are long in log rho, but for N to infinity the order is 2.

    Raises:
        ValueError: another order or scale.
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        order: int = 3,
        scale: str = "er_sde_5",
        lower_final: bool = False,
    ):
        super().__init__(path, grid, steps)
        if order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, got {order}")
        if scale not in ("er_sde_5", "sde", "ode"):
            raise ValueError(f"scale must be er_sde_5, sde or ode, got {scale}")
        self.scale, self.stochastic = scale, scale != "ode"
        rho = path.ratio(self.times)

        def rate(at: Tensor, n: Tensor) -> Tensor:  # of phi_{n+1} d(1 / phi) = -phi_{n+1} / phi (1 / rho + psi' / psi)
            return -(rho[n + 1] / at) * self.gain(at, rho[n + 1]) * (1 + self.slope(at)) / at

        weights, _ = adams_integrals(path, self.times, range(1, order), "rho", rate, lower_final)
        self.table = self.rows(self.gain(rho[:-1], rho[1:]), weights)

    def gain(self, rho: Tensor, rho_next: Tensor) -> Tensor:
        """psi(rho_next) / psi(rho)."""
        if self.scale == "ode":
            return torch.ones_like(rho)
        if self.scale == "sde":
            return rho_next / rho
        return (torch.exp(rho_next**0.3) + 10) / (torch.exp(rho**0.3) + 10)

    def slope(self, rho: Tensor) -> Tensor:
        """d log psi / d log rho."""
        if self.scale != "er_sde_5":
            return torch.full_like(rho, 0.0 if self.scale == "ode" else 1.0)
        return 0.3 * rho**0.3 / (1 + 10 * torch.exp(-(rho**0.3)))
