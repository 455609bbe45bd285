"""Samplers of linear diffusions: the loop they share, Euler-Maruyama, and the probability flow by Runge-Kutta."""

from abc import abstractmethod
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from steadyflow.denoisers import DenoiserNoise
from steadyflow.diffusions import Isotropic, LinearDiffusion
from steadyflow.grids import Grid
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath, Time
from steadyflow.samplers.rk45 import dormand_prince, taken
from steadyflow.samplers.sampler import Progress, Sampler, Watch, time_grid


class Row(NamedTuple):
    """The blocks (*F, k, k) of one step t -> s:  u_s = keep u_t + sum_j pulls_j eps_j + std z.

    eps_j is the noise at the j-th node back, eps_0 that at t. With `corrections`, u_s is then taken once more with
    these in place of the pulls and the noise at (u_s, s) before all others.
    """

    keep: Tensor
    pulls: tuple[Tensor, ...]
    std: Tensor | None = None
    corrections: tuple[Tensor, ...] | None = None


class LinearSampler(Sampler):
    """A sampler of u with du = F u dt + G dw, given as one Row of blocks a step. Owns the loop.

        u = R_t0 z,  then u_s = keep u_t + sum_j pulls_j eps_j + std z  step by step;  the sample is u's data part

    A Gaussian path is a linear diffusion too, and any denoiser a noise model on it: so these samplers take every
    checkpoint. The blocks are float64 and made once a sampler; the state is float64 too, for a step back in time
    multiplies differences that must cancel (on CLD from t = 1 to 0.02 by 4e4). The network has its own precision.

    Variable j of the k of a state takes the noise z(k step + j): for k = 1 the noise of every other sampler.

    Args:
        path: the linear diffusion or Gaussian path.
        grid: the times t_0 > ... > t_N: a rule (`Grid`) or the N + 1 times themselves. A linear diffusion takes rules
            in t only.
        steps: N, for a rule; a list of times brings its own.

    Raises:
        ValueError: as time_grid; a Gaussian path that starts at alpha = 0.
    """

    def __init__(
        self,
        path: GaussianPath | LinearDiffusion,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
    ):
        self.path = path
        self.times = time_grid(path, grid, steps, linear=True)
        self.diffusion = linear_diffusion(path, self.times[0])

    @property
    def steps(self) -> int:
        """N."""
        return len(self.times) - 1

    @abstractmethod
    def row(self, n: int) -> Row:
        """The blocks of step n, from times[n] to times[n + 1]."""

    @cached_property
    def rows(self) -> list[Row]:
        """The blocks of all steps."""
        return [self.row(n) for n in range(self.steps)]

    def denoised(self, t: Tensor, s: Tensor) -> Row:
        """The step whose data part at s = 0 is the denoiser's: eps kept constant."""
        keep = self.diffusion.transition(s, t)
        return Row(keep, (self.diffusion.root(s) - keep @ self.diffusion.root(t),))

    @torch.no_grad()
    def __call__(
        self,
        denoiser: nn.Module,
        noise: NoiseSource,
        *,
        start: Tensor | None = None,
        progress: Progress | None = None,
        **condition: Tensor,
    ) -> Tensor:
        """Samples (B, *S); see Sampler. `denoiser` is a NoiseModel, or on a Gaussian path a Denoiser."""
        u = self.solve(denoiser, noise, start=start, progress=progress, **condition)
        return self.diffusion.data(u).to(noise.dtype)

    @torch.no_grad()
    def solve(
        self,
        denoiser: nn.Module,
        noise: NoiseSource,
        *,
        start: Tensor | None = None,
        progress: Progress | None = None,
        **condition: Tensor,
    ) -> Tensor:
        """The whole state (B, k C, *rest) at the last time, float64."""
        d, model = self.diffusion, noise_model(denoiser, self.path)
        y = first_state(d, self.times[0], noise, start)

        def eps(y: Tensor, t: Tensor) -> Tensor:
            return d.to_basis(model(d.from_basis(y).to(noise.dtype), t, **condition).double())

        past: deque[Tensor] = deque(maxlen=max(len(row.pulls) for row in self.rows))
        watch = Watch(self.times, progress)
        for n, row in enumerate(self.rows):
            past.appendleft(eps(y, self.times[n]))
            kept = d.apply(row.keep, y)
            y = _sum(d, kept, row.pulls, past)
            if row.corrections is not None:
                y = _sum(d, kept, row.corrections, [eps(y, self.times[n + 1]), *past])
            if row.std is not None:
                y = y + d.apply(row.std, d.to_basis(state_noise(d.variables, noise, n + 1).double()))
            watch(y)
        watch.check()
        return d.from_basis(y)


class EulerMaruyama(LinearSampler):
    """u_s = u_t + (s - t) [F u_t + (1 + lambda^2) B eps] + lambda sqrt(t - s) G z,  B = 1/2 G G^T R^-T

    lambda = 0 is Euler's method for the probability flow, 1 the reverse-time SDE; of (weak) order 1. The step to t = 0
    is the denoiser's. Source: thesis Eq. 7.6; Song et al. 2021 (score SDE), App. D.

    Args:
        path, grid, steps: see LinearSampler. One call a step.
        lambda_: lambda >= 0.
    """

    def __init__(
        self,
        path: GaussianPath | LinearDiffusion,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        lambda_: float = 1.0,
    ):
        super().__init__(path, grid, steps)
        if not lambda_ >= 0:
            raise ValueError(f"need lambda_ >= 0, got {lambda_}")
        self.lambda_ = float(lambda_)

    def row(self, n: int) -> Row:
        d, t, s = self.diffusion, self.times[n], self.times[n + 1]
        if s == 0:
            return self.denoised(t, s)
        h, drift = s - t, d.drift(t)
        keep = torch.eye(d.variables, dtype=torch.float64) + h * drift
        std = self.lambda_ * torch.sqrt(-h) * d.noise(t) if self.lambda_ else None
        return Row(keep, (h * (1 + self.lambda_**2) * d.rate(t),), std)


class LinearRK45(Sampler):
    """du/dt = F u + B eps(u, t) from t = start to end by Dormand-Prince 5(4), then the denoiser's step to t = 0.

    Every sample chooses steps of its own, as in `RK45`. Source: Dormand & Prince 1980; Song et al. 2021 (score SDE),
    Section 4.3.

    Args:
        path: the linear diffusion or Gaussian path.
        start, end: 1 >= start > end > 0. rtol, atol: the tolerances.

    Raises:
        ValueError: times out of order, tolerances not positive.
    """

    def __init__(
        self,
        path: GaussianPath | LinearDiffusion,
        start: float = 1.0,
        end: float = 1e-3,
        rtol: float = 1e-3,
        atol: float = 1e-3,
    ):
        if not 1 >= start > end > 0:
            raise ValueError(f"need 1 >= start > end > 0, got start {start} and end {end}")
        if not (rtol > 0 and atol > 0):
            raise ValueError(f"need rtol > 0 and atol > 0, got {rtol} and {atol}")
        self.path, self.start, self.end, self.rtol, self.atol = path, float(start), float(end), float(rtol), float(atol)
        self.diffusion = linear_diffusion(path, self.start)

    @torch.no_grad()
    def __call__(
        self,
        denoiser: nn.Module,
        noise: NoiseSource,
        *,
        start: Tensor | None = None,
        progress: Progress | None = None,
        **condition: Tensor,
    ) -> Tensor:
        d, model = self.diffusion, noise_model(denoiser, self.path)

        def eps(y: Tensor, t: Tensor, given: dict[str, Tensor]) -> Tensor:
            return d.to_basis(model(d.from_basis(y).to(noise.dtype), t, **given).double())

        def rate(y: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            return d.apply(d.drift(t), y) + d.apply(d.rate(t), eps(y, t, taken(condition, rows)))

        y = first_state(d, torch.tensor(self.start, dtype=torch.float64), noise, start)
        y = dormand_prince(rate, y, self.start, self.end, self.rtol, self.atol, progress)
        t, s = torch.tensor([self.end, 0.0], dtype=torch.float64)
        keep = d.transition(s, t)
        y = d.apply(keep, y) + d.apply(d.root(s) - keep @ d.root(t), eps(y, t, condition))
        return d.data(d.from_basis(y)).to(noise.dtype)


def linear_diffusion(path: GaussianPath | LinearDiffusion, start: Time) -> LinearDiffusion:
    """The path as a linear diffusion, or a ValueError where it starts without signal, by which one divides."""
    if not isinstance(path, GaussianPath):
        return path
    if path(start)[0] == 0:
        raise ValueError(
            f"a {type(path).__name__} path has no signal at t = {float(start):g}, and as a linear diffusion it needs "
            "some; start a little later (sampler/grid=log_snr, or start=0.99)"
        )
    return Isotropic(path)


def noise_model(model: nn.Module, path: GaussianPath | LinearDiffusion) -> nn.Module:
    """A model of (u, t): of a linear diffusion as it is, on a Gaussian path a denoiser wrapped."""
    return DenoiserNoise(model, path) if isinstance(path, GaussianPath) else model  # type: ignore[arg-type]


def state_noise(k: int, noise: NoiseSource, step: int) -> Tensor:
    """z (B, k C, *rest) of a state of k variables: variable j takes noise(k step + j)."""
    return torch.cat([noise(k * step + j) for j in range(k)], 1)


def first_state(diffusion: LinearDiffusion, t: Tensor, noise: NoiseSource, start: Tensor | None) -> Tensor:
    """R_t z, or the state given, in the basis in float64."""
    if start is not None:
        return diffusion.to_basis(start.double())
    return diffusion.apply(diffusion.root(t), diffusion.to_basis(state_noise(diffusion.variables, noise, 0).double()))


def _sum(
    diffusion: LinearDiffusion, kept: Tensor, blocks: Sequence[Tensor], eps: Sequence[Tensor] | deque[Tensor]
) -> Tensor:
    for block, e in zip(blocks, eps, strict=False):  # early steps look back less far
        kept = kept + diffusion.apply(block, e)
    return kept
