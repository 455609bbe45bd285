"""RK45: its error follows its tolerance, whatever the path; its evaluations are counted."""

from itertools import pairwise

import pytest
import torch

from steadyflow.denoisers import CountedDenoiser, Denoiser
from steadyflow.noise import NoiseSource
from steadyflow.paths import EDM, ConditionalOT, VariancePreserving
from steadyflow.samplers import RK45

F64 = torch.float64


@pytest.mark.parametrize(("path", "end"), [(VariancePreserving(), 1e-2), (ConditionalOT(), 1e-2), (EDM(), 1e-3)])
def test_error_follows_the_tolerance(path, end, ring, exact_flow):
    noise = NoiseSource(0, range(16), (2,), dtype=F64)
    start = path(0.97)[1] * noise(0)
    exact = exact_flow(path, 0.97, end, start)
    errors, evaluations = [], []
    for tolerance in (1e-3, 1e-5, 1e-7, 1e-9):
        counted = CountedDenoiser(ring)
        out = RK45(path, start=0.97, end=end, zero=False, rtol=tolerance, atol=tolerance)(counted, noise, start=start)
        errors.append(float((out - exact).square().mean().sqrt()))
        evaluations.append(counted.rows / 16)
        assert errors[-1] < 300 * tolerance
    assert all(b < a / 5 for a, b in pairwise(errors))
    assert all(b > a for a, b in pairwise(evaluations))


def test_the_last_call_is_the_denoiser_and_no_time_is_beyond_the_end(ring):
    class Recorder(Denoiser):
        ratios = ()

        def forward(self, x, alpha, sigma, **condition):
            self.ratios = (*self.ratios, float(sigma / alpha))
            return ring(x, alpha, sigma)

    path, noise = VariancePreserving(), NoiseSource(0, range(4), (2,), dtype=F64)
    recorder, fractions = Recorder(), []
    left = RK45(path, end=0.02, zero=False)(ring, noise)
    out = RK45(path, end=0.02)(recorder, noise, progress=fractions.append)
    torch.testing.assert_close(out, ring(left, *path(0.02)), rtol=1e-12, atol=1e-12)
    assert min(recorder.ratios) == pytest.approx(float(path.ratio(0.02)), rel=1e-12)
    assert max(recorder.ratios) == pytest.approx(float(path.ratio(1.0)), rel=1e-12)
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1)


def test_not_a_number_is_reported_with_its_time():
    class Broken(Denoiser):
        def forward(self, x, alpha, sigma, **condition):
            return x / x.new_tensor(0.0) if sigma < 0.5 else 0 * x

    with pytest.raises(FloatingPointError, match=r"not finite at evaluation \d+ \(t = 0\.\d+\)"):
        RK45(ConditionalOT())(Broken(), NoiseSource(0, range(2), (3,)))


@pytest.mark.parametrize("options", [{"end": 0.0}, {"start": 0.1, "end": 0.2}, {"rtol": 0.0}, {"atol": -1.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="need"):
        RK45(EDM(), **options)
