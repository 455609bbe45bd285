"""The problem every sampler is tested on: eight Gaussians on a ring, whose flow is known to 1e-11."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from steadyflow.denoisers import GaussianMixture
from steadyflow.grids import LogSNR
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath
from steadyflow.samplers import Sampler
from steadyflow.samplers.multistep import MultistepSampler

RADIUS, STD = 2.0, 0.3
ANGLES = 2 * np.pi * np.arange(8) / 8
MEANS = RADIUS * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)


def _eps(y: np.ndarray, rho: float) -> np.ndarray:
    """eps of the ring at y = x / alpha (B, 2), written out without the library."""
    d = y[:, None] - MEANS
    log = -(d**2).sum(2) / (2 * (STD**2 + rho**2))
    r = np.exp(log - log.max(1, keepdims=True))
    r /= r.sum(1, keepdims=True)
    return rho * (r[:, :, None] * d).sum(1) / (STD**2 + rho**2)


@pytest.fixture(scope="session")
def ring() -> GaussianMixture:
    return GaussianMixture(MEANS, np.full(8, STD**2))


@pytest.fixture(scope="session")
def exact_flow() -> Callable[[GaussianPath, Tensor, Tensor, Tensor], Tensor]:
    """The probability flow of the ring from x (B, 2) at time t to time s.

    dy/d log(rho) = rho eps(y, rho) for y = x / alpha, by DOP853 at tolerance 1e-12.
    """

    def flow(path: GaussianPath, t: Tensor, s: Tensor, x: Tensor) -> Tensor:
        (a_t, s_t), (a_s, s_s) = ((float(v) for v in path(u)) for u in (t, s))
        solution = solve_ivp(
            lambda log_rho, y: (math.exp(log_rho) * _eps(y.reshape(-1, 2), math.exp(log_rho))).ravel(),
            (math.log(s_t / a_t), math.log(s_s / a_s)),
            (x.numpy() / a_t).ravel(),
            method="DOP853",
            rtol=1e-12,
            atol=1e-12,
        )
        return a_s * torch.from_numpy(solution.y[:, -1].reshape(-1, 2))

    return flow


def _trajectory(path: GaussianPath, times: Tensor, x: Tensor) -> Tensor:
    """The probability flow of the ring from x (B, 2) at the first time, at all of them: (N + 1, B, 2)."""
    alpha, log_rho = path(times)[0], path.ratio(times).log().numpy()
    solution = solve_ivp(
        lambda at, y: (math.exp(at) * _eps(y.reshape(-1, 2), math.exp(at))).ravel(),
        (log_rho[0], log_rho[-1]),
        (x / alpha[0]).numpy().ravel(),
        method="DOP853",
        t_eval=log_rho,
        rtol=1e-13,
        atol=1e-13,
    )
    return alpha[:, None, None] * torch.from_numpy(solution.y.T.reshape(len(times), -1, 2).copy())


def _run(sampler: MultistepSampler, ring: GaussianMixture, start: Tensor) -> Tensor:
    """A multistep sampler whose first q values are exact, so that its history is exact and of full length."""
    schedule, past, x = sampler.schedule(start), sampler.past(start), start
    exact = _trajectory(sampler.path, sampler.times[: len(past) + 1], start) if past else [start]
    for k, step in enumerate(schedule):
        x, past = sampler.step(ring, exact[k].clone() if k < len(exact) else x, past, step)
    return x


Convergence = Callable[..., tuple[float, list[float], list[float]]]


@pytest.fixture(scope="session")
def convergence(ring: GaussianMixture) -> Convergence:
    """The fitted order of build(path, grid, steps) on the ring, on a log-SNR grid to t = 1e-2 with N = 160..1280.

    Returns the order and the errors of a start from exact values, and the errors of the sampler as it is.
    """

    def measure(
        build: Callable[[GaussianPath, LogSNR, int], Sampler],
        path: GaussianPath,
        end: float = 1e-2,
        counts: tuple[int, ...] = (160, 320, 640, 1280),
    ) -> tuple[float, list[float], list[float]]:
        grid, noise = LogSNR(end=end, zero=False), NoiseSource(0, range(12), (2,), dtype=torch.float64)
        times = grid(path, 1)
        start = path(times[0])[1] * noise(0)
        exact, error, shipped = _trajectory(path, times, start)[-1], [], []
        for n in counts:
            sampler = build(path, grid, n)
            x = sampler(ring, noise, start=start)
            shipped.append(float((x - exact).square().mean().sqrt()))
            if isinstance(sampler, MultistepSampler) and sampler.past(x):
                x = _run(sampler, ring, start)
            error.append(float((x - exact).square().mean().sqrt()))
        return float(-np.polyfit(np.log(counts), np.log(error), 1)[0]), error, shipped

    return measure
