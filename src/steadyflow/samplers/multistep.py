"""Samplers that remember: one denoiser call a step, and the outputs of the last few steps."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath
from steadyflow.samplers.sampler import Progress, Sampler, Watch, noise_start, time_grid


class Step(NamedTuple):
    """What a step takes of the grid. alpha, sigma: of its time, (), float64. keep, pull, past, std: the coefficients of
    x, D, the q outputs before, and z, (), in the state's dtype and on its device."""

    alpha: Tensor
    sigma: Tensor
    level: Tensor  # alpha again, beside the other coefficients
    keep: Tensor
    pull: Tensor
    past: tuple[Tensor, ...]
    std: Tensor


class MultistepSampler(Sampler):
    """x' = A_n x + B_n D + sum_{j=1..q} C_nj h_{n-j} + std_n z_n,   D = D(x, t_n), one denoiser call a step

    with the outputs h = D of the last q steps or, where `keeps_noise`, h = x - alpha D = sigma eps of them. A, B, C and
    std are functions of the path and the grid alone: a table (N, q + 3), computed once and used for every batch. A
    predictor with a corrector that spends no call of its own is such a method too (see `corrected`). A method is an
    __init__ that makes its table.

    The first steps have no past: their C are 0, which is the method of lower order. The state and the history are
    float32 or float64, whatever the precision of the network.

    Args:
        path, grid, steps: see OneStepSampler.

    Raises:
        ValueError: from the grid.
    """

    keeps_noise = False  # whether the history is of sigma eps instead of D
    stochastic = False
    table: Tensor  # (A, B, C_1, ..., C_q, std) of each step, float64

    def __init__(self, path: GaussianPath, grid: Grid | Tensor | Sequence[float], steps: int | None = None):
        self.path = path
        self.times = time_grid(path, grid, steps)
        self._schedules: dict[tuple[torch.device, torch.dtype], list[Step]] = {}

    @property
    def steps(self) -> int:
        """N, the number of denoiser calls as well."""
        return len(self.times) - 1

    def schedule(self, x: Tensor) -> list[Step]:
        """The steps of the grid, their coefficients beside a state x; kept for the next batch."""
        place = (x.device, x.dtype)
        if place not in self._schedules:
            alpha, sigma = (v[:-1] for v in self.path(self.times))
            rows = torch.cat([alpha.unsqueeze(1), self.table], 1).to(x.device, x.dtype)
            self._schedules[place] = [
                Step(a, s, row[0], row[1], row[2], row[3:-1], row[-1])
                for a, s, row in zip(alpha.unbind(), sigma.unbind(), [r.unbind() for r in rows.unbind()], strict=True)
            ]
        return self._schedules[place]

    def past(self, x: Tensor) -> tuple[Tensor, ...]:
        """The history (h_{n-1}, ..., h_{n-q}) before the first step: nothing."""
        return tuple(torch.zeros_like(x) for _ in range(self.table.shape[1] - 3))

    def step(
        self,
        denoiser: Denoiser,
        x: Tensor,
        past: tuple[Tensor, ...],
        step: Step,
        z: Tensor | None = None,
        **condition: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The next state and history. It compiles once: what changes from step to step is in tensors.

        Without gradients the memory of x is used again, for the history.
        """
        x0 = denoiser(x, step.alpha, step.sigma, **condition)
        out = (x * step.keep).addcmul_(x0, step.pull)
        for h, c in zip(past, step.past, strict=True):
            out = out.addcmul_(h, c)
        if z is not None:
            out = out.addcmul_(z, step.std)
        if not past:
            return out, past
        if self.keeps_noise:
            x0 = (torch.addcmul if torch.is_grad_enabled() else Tensor.addcmul_)(x, x0, -step.level)
        return out, (x0, *past[:-1])

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
        x = noise_start(self.path, self.times[0], noise) if start is None else start.detach().clone()
        x = x if x.dtype == torch.float64 else x.float()
        past, watch = self.past(x), Watch(self.times, progress)
        for k, step in enumerate(self.schedule(x)):
            z = noise(k + 1) if self.stochastic else None
            x, past = self.step(denoiser, x, past, step, z, **condition)
            watch(x)
        watch.check()
        return x


class NoiseMultistep(MultistepSampler):
    """x_{n+1} = alpha_{n+1} D_n + sigma_{n+1} eps_n + alpha_{n+1} sum_{j>=1} W_nj (eps_{n-j} - eps_n)

    DDIM, and what past values of eps say of its change, by weights W in units of rho. In this form, the first line of
    DEIS with its first two terms gathered, nothing is infinite at alpha = 0 or sigma = 0.

    Args:
        path, grid, steps: see OneStepSampler.
    """

    keeps_noise = True

    @property
    def nfe(self) -> int:
        return self.steps

    def rows(self, weights: Tensor) -> Tensor:
        """The table (N, q + 3) of the weights W (N, q)."""
        alpha, sigma = self.path(self.times)
        keep = (sigma[1:] - alpha[1:] * weights.sum(1)) / sigma[:-1]
        ago = (torch.arange(self.steps).unsqueeze(1) - torch.arange(1, weights.shape[1] + 1)).clamp(min=0)
        past = alpha[1:, None] * weights / sigma[ago]  # of x - alpha D = sigma eps
        pull = alpha[1:] - keep * alpha[:-1]
        return torch.cat([keep.unsqueeze(1), pull.unsqueeze(1), past, torch.zeros_like(keep).unsqueeze(1)], 1)


class DataMultistep(MultistepSampler):
    """x_{n+1} = A x_n + (alpha_{n+1} - A alpha_n) D_n + alpha_{n+1} sum_{j>=1} W_nj (D_{n-j} - D_n) + std z_n,

        A = g sigma_{n+1} / sigma_n,   std = sigma_{n+1} sqrt(1 - g^2),   0 <= g <= 1

    the exact solution for constant D, and what past values of D say of its change. g = 1 is the probability flow, g = 0
    puts all noise afresh; g = psi(rho_{n+1}) / psi(rho_n), rho = sigma / alpha, follows the reverse diffusion

        d(x / alpha) = (phi' / phi) (x / alpha - D) d rho + noise,   phi = rho psi(rho)

    whose marginals are the path's for any rising psi. Nothing here is infinite at alpha = 0 or sigma = 0.
    """

    def rows(self, gain: Tensor, predict: Tensor, correct: Tensor | None = None) -> Tensor:
        """The table (N, q + 3).

        Args:
            gain: g (N,).
            predict: W (N, p).
            correct: W (N, c) of a corrector that spends no call (`corrected`): first of D_{n+1}, then as predict.
        """
        (alpha, alpha_next), (sigma, sigma_next) = ((v[:-1], v[1:]) for v in self.path(self.times))
        keep, std = gain * sigma_next / sigma, sigma_next * torch.sqrt(1 - gain**2)
        pull = (alpha_next - keep * alpha).unsqueeze(1)

        def of_outputs(weights: Tensor) -> Tensor:  # from differences to outputs: (of D_n, of the others)
            weights = alpha_next.unsqueeze(1) * weights
            return torch.cat([pull - weights.sum(1, keepdim=True), weights], 1)

        outputs = of_outputs(predict)
        if correct is not None:
            ahead = of_outputs(correct)[:, [1, 0, *range(2, correct.shape[1] + 1)]]
            width = max(outputs.shape[1], ahead.shape[1] - 1)
            outputs, ahead = (pad(v, (0, w - v.shape[1])) for v, w in ((outputs, width), (ahead, width + 1)))
            none = (correct == 0).all(1, keepdim=True)  # the step to sigma = 0 has no corrector
            ahead = torch.where(none, pad(outputs, (1, 0)), ahead)
            outputs = corrected(keep, outputs, ahead)
        return torch.cat([keep.unsqueeze(1), outputs, std.unsqueeze(1)], 1)


def corrected(keep: Tensor, predict: Tensor, correct: Tensor) -> Tensor:
    """The rows (B, C_1, ..., C_q) (N, q + 1) of a predictor-corrector method that spends one call a step.

        predict:  p_{n+1} = A_n x_n + sum_{j=0..q-1} P_nj D_{n-j} + std_n z_n,   D_n = D(p_n, t_n)
        correct:  x_{n+1} = A_n x_n + sum_{j=-1..q-1} K_nj D_{n-j} + std_n z_n

    Since x_{n+1} - p_{n+1} is linear in the D alone, eliminating x leaves an explicit method in p,

        p_{n+1} = A_n p_n + sum_{j=0..q} [P_nj + A_n (K - P)_{n-1,j-1}] D_{n-j} + std_n z_n      (P_nq = P_n,-1 = 0)

    so the corrector costs one more term of history, and the last state is a predicted one.

    Args:
        keep: A (N,).
        predict: P (N, q), newest first.
        correct: K (N, q + 1), newest first: of D_{n+1}, D_n, ...; a step without a corrector has 0 and then P.
    """
    none = torch.zeros_like(predict[:, :1])
    change = correct - torch.cat([none, predict], 1)  # of the step n; felt by the step n + 1
    return torch.cat([predict, none], 1) + keep.unsqueeze(1) * torch.cat([torch.zeros_like(change[:1]), change[:-1]])
