"""Each deterministic sampler reaches the exact probability-flow solution with the order its method promises."""

import numpy as np
import pytest
import torch

from steadyflow.grids import LogSNR
from steadyflow.noise import NoiseSource
from steadyflow.paths import EDM, ConditionalOT, Cosine, VarianceExploding, VariancePreserving
from steadyflow.samplers import DDIM, Euler, Heun

STEPS = [160, 320, 640, 1280]


def errors(build, path, end, ring, exact_flow):
    noise = NoiseSource(0, range(24), (2,), dtype=torch.float64)
    times = LogSNR(end=end, zero=False)(path, 1)
    start = path(times[0])[1] * noise(0)
    exact = exact_flow(path, times[0], times[-1], start)
    samplers = [build(path, LogSNR(end=end, zero=False), steps=n) for n in STEPS]
    return [float((sampler(ring, noise, start=start) - exact).square().mean().sqrt()) for sampler in samplers]


@pytest.mark.parametrize(
    ("build", "order", "path", "end"),
    [
        (DDIM, 1, VariancePreserving(), 1e-2),
        (Euler, 1, VariancePreserving(), 1e-2),
        (Heun, 2, VariancePreserving(), 1e-2),
        (DDIM, 1, ConditionalOT(), 1e-2),
        (Heun, 2, ConditionalOT(), 1e-2),
        (Euler, 1, Cosine(), 1e-2),
        (Heun, 2, EDM(80.0), 1e-3),
        (Euler, 1, VarianceExploding(), 0.25),
    ],
    ids=lambda v: getattr(v, "__name__", type(v).__name__ if hasattr(v, "time_at") else str(v)),
)
def test_order_of_convergence(build, order, path, end, ring, exact_flow):
    error = errors(build, path, end, ring, exact_flow)
    slope = -np.polyfit(np.log(STEPS), np.log(error), 1)[0]
    assert order - 0.15 <= slope <= order + 0.3, (slope, error)
    assert error[-1] < {1: 0.02, 2: 1e-5}[order], error
