"""Predictor-corrector: its published updates, its laws on a Gaussian in closed form, its batches."""

import numpy as np
import pytest
import torch

from steadyflow.denoisers import CountedDenoiser, Gaussian
from steadyflow.grids import LogSNR, Uniform
from steadyflow.noise import NoiseSource
from steadyflow.paths import ConditionalOT, DiscreteVariancePreserving, VarianceExploding, VariancePreserving
from steadyflow.samplers import PredictorCorrector
from steadyflow.samplers.predictor_corrector import langevin

F64 = torch.float64
VE = VarianceExploding(0.02, 100.0)
PREDICTORS = ["reverse_diffusion", "ancestral"]


def test_the_corrector_leaves_a_gaussian_of_high_dimension_with_its_variance_times_one_plus_r_squared():
    """The variance V goes to (1 - d sigma^2 / law)^2 V + 2 d sigma^2, d = 2 r^2 law^2 / (sigma^2 V); V = law (1 + r^2)
    is its fixed point, whatever the path and level."""
    r, v = 0.3, 0.25
    noise = NoiseSource(0, range(8), (8192,), dtype=F64)
    denoiser = Gaussian(torch.zeros(8192, dtype=F64), v)
    for alpha, sigma in ((1.0, 0.5), (0.3, 0.9)):
        at = torch.tensor([alpha, sigma], dtype=F64)
        law = alpha**2 * v + sigma**2
        x = law**0.5 * noise(0)
        for k in range(1, 40):
            x = langevin(x, denoiser(x, *at), noise(k), *at, torch.tensor(2 * r**2, dtype=F64))
        assert float(x.square().mean() / law) == pytest.approx(1 + r**2, abs=4 * (2 / x.numel()) ** 0.5)


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("path", [VariancePreserving(), VE, ConditionalOT()], ids=lambda path: type(path).__name__)
def test_the_predictor_s_variance_on_a_gaussian_converges_with_order_one(path, predictor):
    """No random numbers: D = k x, so a step is linear."""
    v, steps, errors = 0.25, [80, 160, 320], []
    for n in steps:
        grid = LogSNR(end=float(path.time_at(0.05)), zero=False)
        sampler = PredictorCorrector(path, grid, n, predictor, corrector_steps=0, denoise=False)
        alpha, sigma = path(sampler.times)
        law = alpha**2 * v + sigma**2
        variance = law[0]
        for (a, _, _, keep, pull, std), at in zip(sampler.table, law, strict=False):
            variance = (keep + pull * a * v / at) ** 2 * variance + std**2
        errors.append(abs(float(variance / law[-1]) - 1))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 0.9 <= slope <= 1.15, (slope, errors)
    assert errors[-1] < 0.03


@pytest.mark.parametrize("path", [VE, DiscreteVariancePreserving()], ids=lambda path: type(path).__name__)
def test_a_step_is_that_of_the_published_algorithms(path, ring):
    """Algorithms 2 and 4 with sigma_i, 3 and 5 with beta_i, written with the score."""
    r, times = 0.16, torch.tensor([0.61, 0.609, 0.608], dtype=F64)
    noise = NoiseSource(0, range(3), (2,), dtype=F64)
    alpha, sigma = path(times)
    beta = 1 - (alpha[:-1] / alpha[1:]) ** 2

    def score(x, k):
        return (alpha[k] * ring(x, alpha[k], sigma[k]) - x) / sigma[k] ** 2

    x = sigma[0] * noise(0)
    for k in range(2):
        z, s = noise(2 * k + 1), score(x, k)
        epsilon = 2 * (1 - beta[k]) * (r * z.norm(dim=1, keepdim=True) / s.norm(dim=1, keepdim=True)) ** 2
        x = x + epsilon * s + torch.sqrt(2 * epsilon) * z
        if path is VE:
            g2 = sigma[k] ** 2 - sigma[k + 1] ** 2
            x = x + g2 * score(x, k) + torch.sqrt(g2) * noise(2 * k + 2)
        else:
            x = (2 - torch.sqrt(1 - beta[k])) * x + beta[k] * score(x, k) + torch.sqrt(beta[k]) * noise(2 * k + 2)
    out = PredictorCorrector(path, times, snr=r, denoise=False)(ring, noise)
    torch.testing.assert_close(out, x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_batches_evaluations_and_the_last_step(predictor, ring):
    sampler = PredictorCorrector(VE, Uniform(), 9, predictor, corrector_steps=2)
    counted, fractions = CountedDenoiser(ring), []
    start = NoiseSource(1, range(4), (2,), dtype=F64)(0)
    kept = start.clone()
    whole = sampler(counted, NoiseSource(5, range(4), (2,), dtype=F64), start=start, progress=fractions.append)
    assert counted.rows / 4 == sampler.nfe == 27
    assert fractions == pytest.approx([(k + 1) / 9 for k in range(9)])
    assert torch.equal(start, kept)
    for i in range(4):
        single = sampler(ring, NoiseSource(5, [i], (2,), dtype=F64), start=start[i : i + 1])
        torch.testing.assert_close(single, whole[i : i + 1], rtol=1e-10, atol=1e-10)
    near = torch.cdist(whole, ring.means.reshape(-1, 2)).min(1).values  # a denoiser's value: without the noise
    assert near.max() < 1.2


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        (VE, {"predictor": "euler"}, "predictor must be reverse_diffusion or ancestral, got euler"),
        (VE, {"snr": 0.0}, "need corrector_steps >= 0 and snr > 0"),
        (VE, {"corrector_steps": -1}, "need corrector_steps >= 0 and snr > 0"),
        (ConditionalOT(), {}, "no signal at t = 1, and the reverse diffusion no drift there; choose predictor=anc"),
    ],
)
def test_what_it_refuses(path, options, message):
    with pytest.raises(ValueError, match=message):
        PredictorCorrector(path, Uniform(), 5, **options)
