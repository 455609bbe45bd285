"""The chain is the sampler, step by step."""

import pytest
import torch

from steadyflow.grids import Quadratic
from steadyflow.inversion.chain import Chain, squared_distance
from steadyflow.paths import ConditionalOT, VariancePreserving
from steadyflow.samplers import DDIM, Heun

CHAINS = {
    "ddim": DDIM(VariancePreserving(), Quadratic(), 7),
    "sddim": DDIM(VariancePreserving(), Quadratic(), 7, eta=0.6),
    "ot": DDIM(ConditionalOT(), Quadratic(), 7),
    "heun": Heun(VariancePreserving(), Quadratic(), 5),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_chain_is_the_sampler(name, mixture, noise):
    sampler = CHAINS[name]
    x = sampler.path(sampler.times[0])[1].item() * noise(0)
    chain = Chain(mixture, sampler, sampler.noises(noise), {})
    states = chain.states(x)
    torch.testing.assert_close(states[:, -1], sampler(mixture, noise), rtol=1e-13, atol=1e-13)
    keep = torch.tensor([2, 0])
    torch.testing.assert_close(chain.rows(keep).states(x[keep]), states[keep], rtol=1e-12, atol=1e-12)


def test_squared_distance_is_the_squared_frobenius_norm():
    x, y = torch.randn(2, 3, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = [float(torch.linalg.norm((a.double() - b.double())[0])) ** 2 for a, b in zip(x, y, strict=True)]
    assert squared_distance(x, y).tolist() == pytest.approx(expected, rel=1e-12)
