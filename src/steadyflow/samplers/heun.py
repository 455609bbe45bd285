"""Heun's second-order method with EDM's churn."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid
from steadyflow.paths import GaussianPath, accumulate, combine
from steadyflow.samplers.sampler import Coefficients, OneStepSampler


class Heun(OneStepSampler):
    """Heun's method for the probability-flow ODE dx/dt = v(x, t), after a little fresh noise (churn):

        rho_h = (1 + gamma) rho_t,  x_h = (alpha_h / alpha_t) x_t + alpha_h sqrt(rho_h^2 - rho_t^2) S_noise z
        x' = x_h + (s - h) v(x_h, h),   x_s = x_h + (s - h) / 2 [v(x_h, h) + v(x', s)]
        gamma = min(S_churn / N, sqrt(2) - 1) where S_tmin <= rho_t <= S_tmax, else 0

    rho = sigma / alpha, h the time of rho_h (at most 1), v = alpha' D + sigma' (x - alpha D) / sigma. Of order 2, two
    denoiser calls a step. The step to sigma_s = 0 is the denoiser, x_s = alpha_s D, one call: on a grid that ends at
    t = 0, NFE = 2 N - 1.

    It integrates in the path's own time, so the path chooses the variable, whatever path the network was trained on:
    on EDM this is EDM's Algorithm 2, on conditional OT Heun's method for flow matching, on VP EDM's Algorithm 1 with
    the VP schedule (on the discrete one, whose derivative jumps between indices, order 2 is lost).
    Source: Karras et al. 2022, Algorithms 1 and 2.

    Args:
        path, grid, steps: see OneStepSampler.
        churn, churn_min, churn_max, churn_noise: S_churn, S_tmin, S_tmax, S_noise; 0 is deterministic.

    Raises:
        ValueError: churn < 0, churn_noise <= 0 or churn_min > churn_max.
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        churn: float = 0.0,
        churn_min: float = 0.0,
        churn_max: float = math.inf,
        churn_noise: float = 1.0,
    ):
        super().__init__(path, grid, steps)
        if not (churn >= 0 and churn_noise > 0 and churn_min <= churn_max):
            got = f"{churn}, {churn_noise}, {churn_min}, {churn_max}"
            raise ValueError(f"need churn >= 0, churn_noise > 0 and churn_min <= churn_max, got {got}")
        self.churn, self.churn_noise = float(churn), float(churn_noise)
        self.churn_min, self.churn_max = float(churn_min), float(churn_max)
        self.stochastic = churn > 0

    def coefficients(self, t: Tensor, s: Tensor) -> Coefficients:
        h, grow, std = self._churned(t)
        (a_h, s_h), (a_s, s_s), (p_h, q_h), (p_s, q_s) = self.path(h), self.path(s), *map(self.path.velocity, (h, s))
        last, d = s_s == 0, s - h
        euler = torch.where(last, 0.0, 1 + d * p_h), torch.where(last, a_s, d * q_h)
        half = 0.5 * d
        heun = 1 + half * (p_h + p_s * euler[0]), half * (q_h + p_s * euler[1]), half * q_s
        return grow, std, a_h, s_h, a_s, s_s, *euler, *heun

    def _churned(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The time h after the churn, and x_h = grow x_t + std z."""
        if not self.churn:
            return t, torch.ones_like(t), torch.zeros_like(t)
        rho = self.path.ratio(t)
        inside = (self.churn_min <= rho) & (rho <= self.churn_max) & rho.isfinite()
        gamma = min(self.churn / self.steps, math.sqrt(2) - 1)
        h = torch.where(inside, torch.maximum(t, self.path.time_at((1 + gamma) * rho)), t)
        grow = torch.where(inside, self.path(h)[0] / self.path(t)[0], 1.0)
        fresh = (self.path.ratio(h) ** 2 - rho**2).clamp(min=0)
        std = torch.where(inside, self.churn_noise * self.path(h)[0] * torch.sqrt(fresh), 0.0)
        return h, grow, std

    def update(
        self, denoiser: Denoiser, x: Tensor, coefficients: Coefficients, z: Tensor | None, **condition: Tensor
    ) -> Tensor:
        last = coefficients[5] == 0
        if last.any() and not last.all():  # a batch of mixed times: rows that take their last step need one call
            out = torch.empty_like(x)
            for rows in (last.nonzero()[:, 0], (~last).nonzero()[:, 0]):
                part = tuple(c if c.ndim == 0 else c[rows] for c in coefficients)
                given = {name: value[rows] for name, value in condition.items()}
                out[rows] = self.update(denoiser, x[rows], part, None if z is None else z[rows], **given)
            return out
        grow, std, a_h, s_h, a_s, s_s, keep, pull, *heun = coefficients
        if z is not None:
            x = combine(grow, x, std, z)
        x0 = denoiser(x, a_h, s_h, **condition)
        y = combine(keep, x, pull, x0)
        if last.all():
            return y
        y0 = denoiser(y, a_s, s_s, **condition)
        return accumulate(combine(heun[0], x, heun[1], x0), heun[2], y0)
