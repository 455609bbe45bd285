"""Consistency sampling: with the exact function of a Gaussian every step keeps the law of the path."""

import pytest
import torch

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Karras
from steadyflow.noise import NoiseSource
from steadyflow.paths import EDM, VariancePreserving
from steadyflow.samplers import Consistency

F64 = torch.float64
M = 0.1


class EndOfTheFlow(Denoiser):
    """Of x_0 ~ N(0, c): y keeps its place in units of its standard deviation, sqrt(c + rho^2), down to rho = M."""

    def __init__(self, c):
        super().__init__()
        self.c = c

    def forward(self, x, alpha, sigma, **condition):
        return x / alpha * ((self.c + M**2) / (self.c + (sigma / alpha) ** 2)) ** 0.5


@pytest.mark.parametrize("path", [EDM(), VariancePreserving()], ids=["edm", "vp"])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_law_is_that_of_the_data_with_the_noise_that_f_leaves(path, steps):
    count, c = 20000, 0.3
    top = 80 if isinstance(path, EDM) else float(path.ratio(torch.tensor(1.0)))
    sampler = Consistency(path, Karras(sigma_min=M, sigma_max=top, zero=False), steps, sigma_min=M)
    found = sampler(EndOfTheFlow(c), NoiseSource(0, range(count), (1,), dtype=F64))
    alpha, _ = path(sampler.times[-1])
    variance = float(alpha**2) * (c + M**2)
    assert float(found.var()) == pytest.approx(variance, rel=4 * (2 / count) ** 0.5)
    assert abs(float(found.mean())) < 4 * (variance / count) ** 0.5


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="need sigma_min >= 0, got -1"):
        Consistency(EDM(), Karras(), 2, sigma_min=-1)
