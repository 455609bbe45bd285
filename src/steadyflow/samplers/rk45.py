"""The adaptive Runge-Kutta method of Dormand and Prince for the probability-flow ODE."""

import torch
from torch import Tensor
from torchdiffeq import odeint

from steadyflow.denoisers import Denoiser
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath, combine
from steadyflow.samplers.sampler import Progress, Sampler, noise_start


class RK45(Sampler):
    """dx/dt = v(x, t) = alpha' D + sigma' (x - alpha D) / sigma from t = start to end by Dormand-Prince 5(4).

    With `zero`, the denoiser then takes the state to t = 0. The steps are chosen so that the local error, the root mean
    square over the whole batch, stays below atol + rtol |x|. So they depend on the batch: unlike the other samplers,
    the same sample comes out the same only to that tolerance in another batch, and the number of evaluations is known
    after the call alone.

    It integrates in the path's own time; conditional OT, where v is bounded at both ends, takes the fewest evaluations.
    Source: Dormand & Prince 1980; Song et al. 2021 (score SDE), Section 4.3.

    Args:
        path: the Gaussian path to sample along.
        start, end: 1 >= start > end > 0 (units of path time).
        zero: go on to t = 0 with one call of the denoiser; else the sample is left at `end`.
        rtol, atol: the tolerances; below about 1e-6 they need a float64 state.

    Raises:
        ValueError: times out of order, tolerances not positive.
    """

    def __init__(
        self,
        path: GaussianPath,
        start: float = 1.0,
        end: float = 1e-3,
        zero: bool = True,
        rtol: float = 1e-3,
        atol: float = 1e-3,
    ):
        if not 1 >= start > end > 0:
            raise ValueError(f"need 1 >= start > end > 0, got start {start} and end {end}")
        if not (rtol > 0 and atol > 0):
            raise ValueError(f"need rtol > 0 and atol > 0, got {rtol} and {atol}")
        self.path, self.start, self.end, self.zero = path, float(start), float(end), zero
        self.rtol, self.atol = float(rtol), float(atol)

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        noise: NoiseSource,
        *,
        start: Tensor | None = None,
        progress: Progress | None = None,
        **condition: Tensor,
    ) -> Tensor:
        span, calls = self.start - self.end, 0

        def rate(u: Tensor, x: Tensor) -> Tensor:  # dx/du with u = start - t, so that time rises
            nonlocal calls
            t = (self.start - u.cpu()).clamp(self.end, self.start)
            (alpha, sigma), (p, q) = self.path(t), self.path.velocity(t)
            v = combine(-p, x, -q, denoiser(x, alpha, sigma, **condition))
            calls += 1
            if not v.sum(dtype=torch.float32).isfinite():
                raise FloatingPointError(
                    f"the velocity is not finite at evaluation {calls} (t = {t:.4g}); the network returned NaN"
                )
            return v

        def accepted(u: Tensor, x: Tensor, du: Tensor) -> None:
            if progress is not None:
                progress(min(float(u + du) / span, 1.0))

        rate.callback_accept_step = accepted  # type: ignore[attr-defined]
        x = noise_start(self.path, torch.tensor(self.start, dtype=torch.float64), noise) if start is None else start
        times = torch.tensor([0.0, span], dtype=torch.float64, device=x.device)
        x = odeint(
            rate,
            x,
            times,
            rtol=self.rtol,
            atol=self.atol,
            method="dopri5",
            options={"step_t": times[1:]},  # the last step ends at `end`, never beyond it
        )[-1]
        return denoiser(x, *self.path(self.end), **condition) if self.zero else x
