"""Log-likelihood along the probability flow against the densities of Gaussian mixtures."""

import math

import pytest
import torch

from steadyflow.denoisers import Gaussian, GaussianMixture, MixtureNoise
from steadyflow.diffusions import BDM, CLD
from steadyflow.noise import NoiseSource
from steadyflow.paths import EDM, ConditionalOT, VariancePreserving
from steadyflow.samplers import Likelihood
from steadyflow.samplers.likelihood import bits_per_dimension

F64 = torch.float64
VP = VariancePreserving(0.1, 40.0)  # alpha(1) = 4e-5, so that N(0, sigma(1)^2) is the law at t = 1
POINTS = torch.tensor([[0.3, -0.8], [1.5, 0.2], [-1.0, 0.9]], dtype=F64)
NOISE = NoiseSource(0, range(3), (2,), dtype=F64)
MIXTURE = GaussianMixture([[-1.0, -0.5], [1.0, 0.5]], [0.3, 0.2], [0.3, 0.7])


@pytest.mark.parametrize(
    ("path", "end"), [(VP, 1e-6), (ConditionalOT(), 1e-4), (EDM(sigma_max=1e4), 1e-8)], ids=["vp", "ot", "edm"]
)
def test_a_mixture_to_four_digits(path, end):
    found = Likelihood(path, rtol=1e-6, atol=1e-6, end=end)(MIXTURE, POINTS, NOISE)
    exact = MIXTURE.log_prob(POINTS, torch.tensor(1.0), torch.tensor(0.0))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)
    single = Likelihood(path, rtol=1e-6, atol=1e-6, end=end)(MIXTURE, POINTS[1:2], NoiseSource(0, [1], (2,), dtype=F64))
    torch.testing.assert_close(found[1:2], single, rtol=1e-12, atol=1e-12)


def test_it_is_the_density_of_what_samplers_make_from_noise_without_mean():
    """alpha(1) = 0.0066 is forgotten at t = 1, by samplers too: of data N(m, c) the flow makes N(m', c'), where
    x_0 = m + sqrt(c) (u_1 - alpha_1 m) / s with s^2 = alpha_1^2 c + sigma_1^2, u_1 ~ N(0, sigma_1^2)."""
    path, m, c = VariancePreserving(), 1.5, 0.2
    alpha, sigma = (float(v) for v in path(1.0))
    s = math.sqrt(alpha**2 * c + sigma**2)
    law = torch.distributions.Normal(m - math.sqrt(c) * alpha * m / s, math.sqrt(c) * sigma / s)
    x = torch.tensor([[0.5], [2.5]], dtype=F64)
    found = Likelihood(path, rtol=1e-7, atol=1e-7, end=1e-7)(Gaussian([m], c), x, NoiseSource(0, range(2), (1,)))
    torch.testing.assert_close(found, law.log_prob(x[:, 0]), rtol=0, atol=1e-5)
    assert abs(found[0] - torch.distributions.Normal(m, math.sqrt(c)).log_prob(x[0, 0])) > 5e-3


def test_random_signs_are_unbiased():
    """Of a Gaussian with correlations: within four standard errors, which are not zero."""
    model, count = Gaussian([0.0, 0.0], [[0.5, 0.3], [0.3, 0.3]]), 200
    exact = Likelihood(VP)(model, POINTS[:1], NOISE)
    noise = NoiseSource(0, range(count), (2,), dtype=F64)
    found = Likelihood(VP, exact=1)(model, POINTS[:1].expand(count, 2), noise)
    assert found.std() > 1e-2
    assert abs(float(found.mean() - exact)) < 4 * float(found.std()) / count**0.5


def test_blurring_is_a_change_of_variables_too():
    bdm = BDM(VP, size=2, blur_max=1.0, floor=0.2)
    model = MixtureNoise(bdm, torch.tensor([[[[0.5, 0.0], [0.0, 0.0]]], [[[-0.5, 0.0], [0.2, 0.0]]]]), [0.4, 0.2])
    x = torch.tensor([[[[0.3, -0.5], [0.0, 1.0]]]], dtype=F64)
    found = Likelihood(bdm, rtol=1e-6, atol=1e-6)(model, x, NoiseSource(0, [0], (1, 2, 2)))
    torch.testing.assert_close(found, model.log_prob(x, torch.tensor(0.0, dtype=F64)), rtol=0, atol=1e-4)


def test_the_bound_of_cld_is_tight_for_the_exact_model():
    """p(x, v_0) = p(x) N(v_0; 0, gamma M), whatever v_0 is drawn."""
    model = MixtureNoise(CLD(), [[0.0, 0.0]], [0.4])
    found = Likelihood(CLD(), end=1e-7)(model, POINTS[:2], NoiseSource(0, range(2), (2,), dtype=F64))
    exact = -0.5 * (POINTS[:2] ** 2 / 0.4 + math.log(2 * math.pi * 0.4)).sum(1)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-3)


def test_bits_of_a_known_distribution():
    """Integers of a Gaussian many levels wide: entropy log2(std levels sqrt(2 pi e)), seen through dequantisation."""
    s, g, levels = 0.2, torch.Generator().manual_seed(0), 127.5
    x = s * torch.randn(20000, dtype=F64, generator=g)
    x = ((x * levels).round() + torch.rand(20000, dtype=F64, generator=g) - 0.5) / levels
    bits = bits_per_dimension(torch.distributions.Normal(0.0, s).log_prob(x), 1, levels)
    exact = math.log2(s * levels * math.sqrt(2 * math.pi * math.e))
    assert abs(float(bits.mean()) - exact) < 4 * float(bits.std()) / 20000**0.5


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="probes >= 1"):
        Likelihood(VP, probes=0)
