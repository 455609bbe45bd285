"""RK45: its error follows its tolerance, whatever the path; every sample steps as it would alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from steadyflow.denoisers import CountedDenoiser, Denoiser
from steadyflow.noise import NoiseSource
from steadyflow.paths import EDM, ConditionalOT, VariancePreserving
from steadyflow.samplers import RK45
from steadyflow.samplers.rk45 import dormand_prince

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
            self.ratios = (*self.ratios, *(sigma / alpha).reshape(-1).tolist())
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


@pytest.mark.parametrize(("start", "end"), [(0.0, 8.0), (3.0, -1.0)])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-7])
def test_each_row_takes_the_steps_of_scipy(start, end, tolerance):
    """Van der Pol's oscillator, stiffer from row to row: same solutions, same number of evaluations."""
    stiffness, x = torch.tensor([0.5, 2.0, 5.0, 9.0], dtype=F64), torch.tensor([[2.0, 0.0]] * 4, dtype=F64)
    evaluations = torch.zeros(4, dtype=torch.int64)

    def rate(x, t, rows):
        evaluations[rows] += 1
        return torch.stack([x[:, 1], stiffness[rows] * (1 - x[:, 0] ** 2) * x[:, 1] - x[:, 0] + torch.sin(t)], 1)

    out = dormand_prince(rate, x, start, end, tolerance, tolerance)
    for row, mu in enumerate(stiffness.tolist()):

        def field(t, y, mu=mu):
            return [y[1], mu * (1 - y[0] ** 2) * y[1] - y[0] + np.sin(t)]

        peer = solve_ivp(field, (start, end), x[row].numpy(), method="RK45", rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(out[row], peer.y[:, -1], rtol=1e-7, atol=1e-7)
        assert evaluations[row] == peer.nfev
    assert len(evaluations.unique()) > 1


def test_a_sample_does_not_depend_on_its_batch(ring):
    sampler, counted = RK45(ConditionalOT(), rtol=1e-4, atol=1e-4), CountedDenoiser(ring)
    whole = sampler(counted, NoiseSource(0, range(12), (2,), dtype=F64))
    rows = counted.rows
    singles = [sampler(counted, NoiseSource(0, [i], (2,), dtype=F64)) for i in range(12)]
    torch.testing.assert_close(whole, torch.cat(singles), rtol=1e-11, atol=1e-11)
    assert counted.rows == 2 * rows


def test_the_state_keeps_its_precision_under_autocast(ring):
    sampler, noise = RK45(ConditionalOT()), NoiseSource(0, range(3), (2,))
    with torch.autocast("cpu", torch.bfloat16):
        x = sampler(ring, noise)
    assert torch.equal(x, sampler(ring, noise))


def test_not_a_number_is_reported_with_its_time():
    class Broken(Denoiser):
        def forward(self, x, alpha, sigma, **condition):
            return x / x.new_tensor(0.0) if (sigma < 0.5).any() else 0 * x

    with pytest.raises(FloatingPointError, match=r"not finite at evaluation \d+ \(t = 0\.\d+\)"):
        RK45(ConditionalOT())(Broken(), NoiseSource(0, range(2), (3,)))


@pytest.mark.parametrize("options", [{"end": 0.0}, {"start": 0.1, "end": 0.2}, {"rtol": 0.0}, {"atol": -1.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="need"):
        RK45(EDM(), **options)
