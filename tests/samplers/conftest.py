"""The problem every sampler is tested on: eight Gaussians on a ring, whose flow is known to 1e-11."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from steadyflow.denoisers import GaussianMixture
from steadyflow.paths import GaussianPath

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
