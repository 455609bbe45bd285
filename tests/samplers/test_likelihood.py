"""Log-likelihood along the probability flow against closed forms."""

import math

import pytest
import torch

from steadyflow.denoisers import Gaussian, GaussianMixture, MixtureNoise
from steadyflow.diffusions import BDM, CLD
from steadyflow.noise import NoiseSource
from steadyflow.paths import VariancePreserving
from steadyflow.samplers.likelihood import Likelihood, bits_per_dimension, dequantised

F64 = torch.float64
VP = VariancePreserving()
POINTS = torch.tensor([[0.3, -0.8], [1.5, 0.2]], dtype=F64)
NOISE = NoiseSource(0, range(2), (2,), dtype=F64)


def test_a_gaussian_to_four_digits():
    covariance = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
    model = Gaussian(torch.tensor([0.1, -0.2]), covariance)
    found = Likelihood(VP, probes=None, rtol=1e-7, atol=1e-7)(model, POINTS, NOISE)
    law = torch.distributions.MultivariateNormal(torch.tensor([0.1, -0.2], dtype=F64), covariance)
    # what is read as noiseless is data at t = 1e-5, and the start of the flow has forgotten the mean: 1e-4
    torch.testing.assert_close(found, law.log_prob(POINTS), rtol=0, atol=3e-4)


def test_a_mixture_where_the_trace_depends_on_the_place():
    model = GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3])
    found = Likelihood(VP, probes=None, rtol=1e-6, atol=1e-6)(model, POINTS, NOISE)
    exact = model.log_prob(POINTS, torch.tensor(1.0), torch.tensor(0.0))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-3)


def test_hutchinson_is_unbiased():
    """The estimates of many probes scatter around the exact trace's value, by less than four standard errors."""
    covariance = torch.tensor([[0.5, 0.3], [0.3, 0.3]], dtype=F64)
    model, count = Gaussian(torch.zeros(2), covariance), 64
    x = POINTS[:1].expand(count, 2)
    exact = Likelihood(VP, probes=None)(model, POINTS[:1], NOISE)
    found = Likelihood(VP, probes=1)(model, x, NoiseSource(0, range(count), (2,), dtype=F64))
    assert found.std() > 1e-2
    assert abs(float(found.mean() - exact)) < 4 * float(found.std()) / count**0.5 + 1e-3


def test_blurring_is_a_change_of_variables_too():
    bdm = BDM(VP, size=2, blur_max=1.0, floor=0.2)
    model = MixtureNoise(bdm, torch.full((1, 1, 2, 2), 0.1), [0.4])
    x = torch.tensor([[[[0.3, -0.5], [0.0, 1.0]]]], dtype=F64)
    found = Likelihood(bdm, probes=None, rtol=1e-7, atol=1e-7)(model, x, NoiseSource(0, [0], (1, 2, 2), dtype=F64))
    exact = -0.5 * ((x - 0.1) ** 2 / 0.4 + math.log(2 * math.pi * 0.4)).sum()
    torch.testing.assert_close(found, exact[None], rtol=0, atol=1e-3)


def test_the_bound_of_cld_is_tight_for_the_exact_model():
    """p(x, v_0) = p(x) N(v_0) for the exact model, whatever v_0 is drawn."""
    model = MixtureNoise(CLD(), [[0.1, 0.1]], [0.4])
    found = Likelihood(CLD(), probes=None, rtol=1e-7, atol=1e-7, end=1e-6)(model, POINTS, NOISE)
    exact = -0.5 * ((POINTS - 0.1) ** 2 / 0.4 + math.log(2 * math.pi * 0.4)).sum(1)
    torch.testing.assert_close(found, exact, rtol=0, atol=0.02)


def test_bits_of_a_known_distribution():
    """Pixels N(0, s) before rounding to 8 bits, s many levels wide: log2(s 127.5 sqrt(2 pi e)) bits."""
    s, g = 0.2, torch.Generator().manual_seed(0)
    x = s * torch.randn(20000, 1, 1, 1, dtype=F64, generator=g)
    images = ((x + 1) * 127.5).round().to(torch.uint8)
    y = dequantised(images, torch.rand(images.shape, dtype=F64, generator=g))
    assert (((y + 1) * 127.5).round() == images).double().mean() > 0.999
    log_prob = torch.distributions.Normal(0.0, s).log_prob(y).flatten()
    bits = bits_per_dimension(log_prob, 1)
    exact = math.log2(s * 127.5 * math.sqrt(2 * math.pi * math.e))
    assert abs(float(bits.mean()) - exact) < 4 * float(bits.std()) / 20000**0.5 + 1e-3


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="probes >= 1"):
        Likelihood(VP, probes=0)
