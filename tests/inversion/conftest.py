"""The problem every method is tested on: three Gaussians in the plane, whose denoiser is exact."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from steadyflow.denoisers import GaussianMixture
from steadyflow.grids import Quadratic
from steadyflow.noise import NoiseSource
from steadyflow.paths import VariancePreserving
from steadyflow.samplers import DDIM

F64 = torch.float64


@pytest.fixture(scope="session")
def mixture() -> GaussianMixture:
    covariances = [[[0.3, 0.1], [0.1, 0.2]], [[0.2, 0.0], [0.0, 0.4]], [[0.25, -0.1], [-0.1, 0.3]]]
    return GaussianMixture([[1.0, 0.5], [-1.0, 0.2], [0.0, -1.0]], covariances, [0.5, 0.3, 0.2])


@pytest.fixture(scope="session")
def ddim() -> Callable[..., DDIM]:
    return lambda steps=10, eta=0.0: DDIM(VariancePreserving(), Quadratic(), steps, eta)


@pytest.fixture(scope="session")
def noise() -> NoiseSource:
    return NoiseSource(0, range(4), (2,), dtype=F64)


@pytest.fixture(scope="session")
def target() -> Tensor:
    return torch.tensor([[0.6, 0.4], [-0.9, -0.1], [0.2, -0.7], [-0.1, 0.3]], dtype=F64)
