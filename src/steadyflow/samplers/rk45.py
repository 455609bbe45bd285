"""The adaptive Runge-Kutta method of Dormand and Prince for the probability-flow ODE."""

from collections.abc import Callable

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath, combine, expand
from steadyflow.samplers.sampler import Progress, Sampler, noise_start

# Dormand & Prince 1980, Table 2: stage i stands at t + NODES[i] h; the last stage is the solution of order 5, and the
# next step's first. ERROR: the weights of order 5 minus those of order 4.
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)

Rate = Callable[[Tensor, Tensor, Tensor], Tensor]


class RK45(Sampler):
    """dx/dt = v(x, t) = alpha' D + sigma' (x - alpha D) / sigma from t = start to end by Dormand-Prince 5(4).

    With `zero`, the denoiser then takes the state to t = 0. Every sample chooses steps of its own, so it comes out the
    same in any batch, and leaves the batch when it has arrived; how many evaluations that takes is known after the
    call alone.

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
        def rate(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            (alpha, sigma), (p, q) = self.path(t), self.path.velocity(t)
            return combine(p, x, q, denoiser(x, alpha, sigma, **taken(condition, rows)))

        x = noise_start(self.path, torch.tensor(self.start, dtype=torch.float64), noise) if start is None else start
        x = dormand_prince(rate, x, self.start, self.end, self.rtol, self.atol, progress)
        return denoiser(x, *self.path(self.end), **condition) if self.zero else x


def dormand_prince(
    rate: Rate, x: Tensor, start: float, end: float, rtol: float, atol: float, progress: Progress | None = None
) -> Tensor:
    """The solution at t = end of dx/dt = rate(x, t), x(start) given, in either direction, row by row.

        h <- h min(m, max(1/5, 0.9 e^(-1/5))),  e = rms(h sum_j ERROR_j k_j / (atol + rtol max(|x|, |x'|)))

    with the k_j of all stages; a step is taken where e <= 1, else tried again with the smaller h; m = 10, but 1 right
    after a step that was refused. Each row has its own time, step and error, and leaves when it has arrived.
    Source: Hairer, Norsett & Wanner 1993, Section II.4, also for the first step.

    Args:
        rate: called as rate(x (b, *S), t (b,) float64 on the CPU, rows (b,)) for the rows that are still under way.
        x: (B, *S).

    Raises:
        FloatingPointError: the rate is not finite, or the step shrinks to nothing.
    """
    rows, out, span = torch.arange(len(x)), torch.empty_like(x), end - start
    t = torch.full((len(x),), start, dtype=torch.float64)
    k = x.new_empty(7, *x.shape)
    k[0] = rate(x, t, rows)
    h, calls = _first_step(rate, x, t, rows, k[0], span, rtol, atol), 2
    refused = torch.zeros(len(x), dtype=torch.bool)
    while len(rows):
        last = (h / (end - t)) >= 1 - 1e-12
        h = torch.where(last, end - t, h)
        y = x
        for i, (node, weights) in enumerate(zip(NODES, STAGES, strict=True), start=1):
            y = torch.addcmul(x, _weighted(weights, k), expand(h, x))
            k[i] = rate(y, torch.where(last & (node == 1), end, t + node * h), rows)
        calls += 6
        error = h.abs() * _rms(_weighted(ERROR, k) / torch.maximum(x.abs(), y.abs()).mul_(rtol).add_(atol))
        if not error.isfinite().all():
            i = next(i for i in range(7) if i == 6 or not k[i].sum(dtype=torch.float32).isfinite())
            raise FloatingPointError(
                f"the velocity is not finite at evaluation {calls - 6 + i} (t = {t.min():.4g}); "
                "the network returned NaN"
            )
        passed = error <= 1
        t = torch.where(passed, torch.where(last, end, t + h), t)
        h = h * (0.9 * error.clamp(min=1e-10) ** -0.2).clamp(0.2, 10).clamp(max=torch.where(refused, 1.0, 10.0))
        refused = ~passed
        if (h.abs() < 1e-13 * abs(span))[refused].any():
            raise FloatingPointError(f"the step shrinks to nothing at t = {t.min():.4g}; raise rtol and atol")
        if passed.all():
            x, k[0] = y, k[6]
        else:
            mask = expand(passed, x).bool()
            x, k[0] = torch.where(mask, y, x), torch.where(mask, k[6], k[0])
        under_way = t != end
        if not under_way.all():
            keep = under_way.nonzero()[:, 0]
            out[rows[~under_way].to(x.device)] = x[(~under_way).to(x.device)]
            on = keep.to(x.device)
            rows, t, h, refused, x, k = rows[keep], t[keep], h[keep], refused[keep], x[on], k[:, on]
        if progress is not None:
            done = len(out) - len(rows) + float(((t - start) / span).sum())
            progress(done / len(out))
    return out


def taken(condition: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The conditions of these rows; rows that are all there are in order, and need no copy."""
    return {k: v if len(rows) == len(v) else v[rows.to(v.device)] for k, v in condition.items()}


def _first_step(
    rate: Rate, x: Tensor, t: Tensor, rows: Tensor, k: Tensor, span: float, rtol: float, atol: float
) -> Tensor:
    """A first step h (B,), with the sign of `span`, from the sizes of x, x' and x''."""
    scale, sign = atol + rtol * x.abs(), 1.0 if span > 0 else -1.0
    size, slope = _rms(x / scale), _rms(k / scale)
    h = torch.where((size < 1e-5) | (slope < 1e-5), 1e-6, 0.01 * size / slope).clamp(max=abs(span))
    y = torch.addcmul(x, k, expand(sign * h, x))
    steepest = torch.maximum(slope, _rms((rate(y, t + sign * h, rows) - k) / scale) / h)
    second = torch.where(steepest <= 1e-15, (1e-3 * h).clamp(min=1e-6), (0.01 / steepest) ** 0.2)
    return sign * torch.minimum(100 * h, second).clamp(max=abs(span))


def _weighted(weights: tuple[float, ...], k: Tensor) -> Tensor:
    """sum_j weights_j k_j; not as a product of matrices, which autocast and TF32 would round."""
    out = weights[0] * k[0]
    for weight, k_j in zip(weights[1:], k[1:], strict=False):
        if weight:
            out.add_(k_j, alpha=weight)
    return out


def _rms(x: Tensor) -> Tensor:
    """The root mean square of each row, in float64 on the CPU."""
    x = x.flatten(1)
    return torch.linalg.vector_norm(x, dim=1).to("cpu", torch.float64) / x.shape[1] ** 0.5
