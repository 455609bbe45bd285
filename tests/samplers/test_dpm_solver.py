"""DPM-Solver: order 1 is DDIM, 2 and 3 are those of another implementation; a budget is spent to the last call."""

import pytest
import torch

from steadyflow.denoisers import CountedDenoiser
from steadyflow.grids import LogSNR, Quadratic
from steadyflow.noise import NoiseSource
from steadyflow.paths import ConditionalOT, VariancePreserving
from steadyflow.samplers import DDIM, DPMSolver
from steadyflow.samplers.deis import RungeKutta
from steadyflow.samplers.dpm_solver import spent

F64 = torch.float64
VP = VariancePreserving()


def test_order_1_is_ddim(ring):
    noise = NoiseSource(0, range(5), (2,), dtype=F64)
    one, other = (method(VP, Quadratic(), 7) for method in (DDIM, lambda *a: DPMSolver(*a, order=1)))
    assert torch.equal(one(ring, noise), other(ring, noise))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("order", [2, 3])
def test_diffusers_makes_the_same_samples(order, ring):
    """Its grid holds the nodes too. Of order 3, the published second stage is its `heun`, the last its `midpoint`."""
    diffusers = pytest.importorskip("diffusers")
    times, noise = LogSNR(end=0.01, zero=False)(VP, 12), NoiseSource(0, range(16), (2,), dtype=F64)
    options = {"solver_order": order, "lower_order_final": False, "final_sigmas_type": "sigma_min"}
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        prediction_type="sample", algorithm_type="dpmsolver", solver_type="midpoint", **options
    )
    scheduler.set_timesteps(12)
    scheduler.sigmas, scheduler.timesteps, scheduler._step_index = VP.ratio(times), torch.arange(12), 0
    x = noise(0)
    for k, t in enumerate(times[:-1]):
        scheduler.register_to_config(solver_type="heun" if order == 3 and k % 3 == 1 else "midpoint")
        x = scheduler.step(ring(x, *VP(t)), k, x).prev_sample
    ours = DPMSolver(VP, times[::order], order=order)(ring, noise, start=noise(0))
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)


def test_the_fast_schedule_spends_every_budget_exactly(ring):
    assert [spent(n, 3) for n in (1, 2, 3, 10, 11, 12)] == [
        [1],
        [2],
        [2, 1],
        [3, 3, 3, 1],
        [3, 3, 3, 2],
        [3, 3, 3, 2, 1],
    ]
    for order in (1, 2, 3):
        for zero in (False, True):
            for nfe in range(1 + zero, 14):
                sampler, counted = DPMSolver(VP, LogSNR(zero=zero), order=order, nfe=nfe), CountedDenoiser(ring)
                sampler(counted, NoiseSource(0, range(2), (2,)))
                assert counted.rows / 2 == sampler.nfe == nfe


def test_batches_progress_and_the_start(ring):
    sampler, fractions = DPMSolver(VP, LogSNR(), nfe=9), []
    noise, start = NoiseSource(5, range(4), (2,), dtype=F64), NoiseSource(1, range(4), (2,), dtype=F64)(0)
    kept = start.clone()
    whole = sampler(ring, noise, start=start, progress=fractions.append)
    assert torch.equal(start, kept)
    assert fractions == pytest.approx([(k + 1) / sampler.steps for k in range(sampler.steps)])
    for i in range(4):
        single = sampler(ring, NoiseSource(5, [i], (2,), dtype=F64), start=start[i : i + 1])
        torch.testing.assert_close(single, whole[i : i + 1], rtol=1e-10, atol=1e-10)


def test_mixed_times_in_one_batch_are_separate_steps(ring):
    t, s = torch.tensor([[1.0, 0.9, 0.5, 0.04], [0.8, 0.3, 0.4, 0.0]], dtype=F64)  # of OT: the first and last one call
    x = NoiseSource(0, range(4), (2,), dtype=F64)(0)
    for order in ("dpm2", "dpm3", "kutta3"):
        sampler = RungeKutta(ConditionalOT(), [1.0, 0.0], order=order)
        mixed = sampler.step(ring, x, t, s)
        for i in range(4):
            alone = sampler.step(ring, x[i : i + 1], t[i], s[i])
            torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        (LogSNR(), {"order": 4, "nfe": 10}, "order must be 1, 2 or 3, got 4"),
        (LogSNR(), {"nfe": 0}, "nfe must be a positive number of calls"),
        ([1.0, 0.0], {"nfe": 5}, "a grid that is a rule"),
        (LogSNR(), {"steps": 5, "nfe": 10}, "steps = 5 and nfe = 10: choose one; .* set nfe=null"),
        (LogSNR(), {}, "steps must be a positive integer, got None"),
    ],
)
def test_options_out_of_range_are_refused(grid, options, message):
    with pytest.raises(ValueError, match=message):
        DPMSolver(VP, grid, **options)
