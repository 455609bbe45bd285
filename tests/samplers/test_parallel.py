"""Parallel sampling: its fixed point is the sequential chain for every map, mixing and window; what it promises."""

import math
import warnings
from itertools import product

import pytest
import torch

from steadyflow.denoisers import CountedDenoiser, Denoiser, GaussianMixture
from steadyflow.equilibrium import Anderson, Picard
from steadyflow.grids import Karras, LogSNR, Quadratic, Uniform
from steadyflow.noise import NoiseSource
from steadyflow.paths import EDM, ConditionalOT, Cosine, VarianceExploding, VariancePreserving
from steadyflow.samplers import DDIM, DDPM, Euler, Heun, Parallel, Parareal, Transport, in_parallel

F64 = torch.float64
VP = VariancePreserving()
LABELLED = GaussianMixture([[-1.0, 0.0], [1.0, 0.5], [0.0, 1.0]], [0.1, 0.2, 0.05], labels=[0, 1, 2])
PATHS = [VP, VarianceExploding(0.01, 20.0), EDM(20.0), Cosine(), ConditionalOT()]
MAPS = ["thesis", "increments", "gaussian"]
MIXINGS = ["none", "state", "item", "causal"]


def noises(count=4, dtype=F64):
    return NoiseSource(0, range(count), (2,), dtype=dtype)


def chain(sampler, denoiser, noise, **condition):
    """All states x_1..x_N of the sequential sampler, (B, N, *S)."""
    x, states = sampler.path(sampler.times[0])[1] * noise(0), []
    for k in range(sampler.steps):
        z = noise(k + 1) if sampler.stochastic else None
        x = sampler.step(denoiser, x, sampler.times[k], sampler.times[k + 1], z, **condition)
        states.append(x)
    return torch.stack(states, 1)


class MadeUp(Denoiser):
    """A noise prediction of no distribution, far from what the maps suppose: x_0 = (x - sigma eps) / alpha."""

    def eps(self, x, alpha):
        return torch.tanh(2 * x) + 0.3 * alpha * x.flip(1)

    def forward(self, x, alpha, sigma):
        alpha, sigma = (torch.as_tensor(v).reshape(-1, 1) for v in (alpha, sigma))
        return (x - sigma * self.eps(x, alpha)) / alpha


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_the_thesis_map_is_the_published_sum(eta):
    """Pokle 2025, Eq. 3.6 and 3.11, written out as the double sum over t it is printed as (alpha is alpha_bar)."""
    sampler, noise, denoiser = DDIM(VP, Uniform(zero=False), 6, eta), noises(), MadeUp()
    bars = VP(sampler.times)[0].square().tolist()
    g = torch.Generator().manual_seed(0)
    start, z = noise(0), torch.randn(4, 6, 2, generator=g, dtype=F64)
    fresh = torch.stack([noise(k + 1) for k in range(6)], 1)
    x = torch.cat([start.unsqueeze(1), z], 1)
    for k in range(1, 7):
        expected = math.sqrt(bars[k] / bars[0]) * start
        for j in range(k):  # t + 1 of the source is state j here, t is state j + 1
            a, b = bars[j], bars[j + 1]
            std = eta * math.sqrt((1 - b) / (1 - a)) * math.sqrt(1 - a / b)
            c1 = math.sqrt(1 - b - std**2) - math.sqrt(b * (1 - a) / a)
            eps = denoiser.eps(x[:, j], math.sqrt(a))
            expected = expected + math.sqrt(bars[k] / b) * (c1 * eps + std * fresh[:, j])
        got = Transport(sampler, math.inf).sweep(denoiser, z, start, fresh if eta else None)[:, k - 1]
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_variance_zero_is_the_sum_of_the_denoisers_and_none_that_of_the_increments():
    """x_s / sigma_s = x_t / sigma_t + (alpha_s / sigma_s - alpha_t / sigma_t) D, and x_{i+1} = x_0 + sum (step - x)."""
    sampler, noise = DDIM(ConditionalOT(), Uniform(zero=False), 6), noises()
    start, z = noise(0), torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    x = torch.cat([start.unsqueeze(1), z], 1)[:, :-1]
    (a, s), d = sampler.path(sampler.times), []
    for k in range(6):
        d.append(LABELLED(x[:, k], a[k], s[k]) * (a[k + 1] / s[k + 1] - a[k] / s[k]))
    expected = (start / s[0]).unsqueeze(1) + torch.stack(d, 1).cumsum(1)
    for variance in (0.0, math.inf):  # no alpha to divide by at t = 1: the thesis' map takes this frame
        got = Transport(sampler, variance).sweep(LABELLED, z, start) / s[1:, None]
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    steps = [sampler.step(LABELLED, x[:, k], sampler.times[k], sampler.times[k + 1]) - x[:, k] for k in range(6)]
    expected = start.unsqueeze(1) + torch.stack(steps, 1).cumsum(1)
    torch.testing.assert_close(Transport(sampler, None).sweep(LABELLED, z, start), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "method", [DDIM, Euler, Heun, lambda *a: DDIM(*a, eta=1.0)], ids=["ddim", "euler", "heun", "eta"]
)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_one_sweep_is_exact_on_a_gaussian_of_the_variance_supposed(method, path):
    sampler, noise = method(path, Uniform(), 20), noises()
    gaussian = GaussianMixture([[0.0, 0.0]], [0.3])
    start, z = path(sampler.times[0])[1] * noise(0), torch.zeros(4, 20, 2, dtype=F64)
    fresh = torch.stack([noise(k + 1) for k in range(20)], 1) if sampler.stochastic else None
    swept = Transport(sampler, 0.3).sweep(gaussian, z, start, fresh)
    torch.testing.assert_close(swept, chain(sampler, gaussian, noise), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize(("map", "mixing", "window"), list(product(MAPS, MIXINGS, [None, 7])))
def test_the_fixed_point_is_the_sequential_sample(map, mixing, window, steps, eta, ring):
    sequential = DDIM(VP, Quadratic(), steps, eta)(ring, noises())
    sampler = in_parallel(
        VP, Quadratic(), steps, eta, map=map, mixing=mixing, window=window, tolerance=1e-9, max_iterations=4 * steps
    )
    torch.testing.assert_close(sampler(ring, noises()), sequential, rtol=0, atol=2e-7)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("map", "window"), [("gaussian", None), ("thesis", None), ("increments", 40), ("parareal", None)]
)
def test_the_fixed_point_is_the_sequential_sample_of_200_steps(map, window, eta, ring):
    sequential = DDIM(VP, Quadratic(), 200, eta)(ring, noises())
    mixing = "causal" if window else "none"
    sampler = in_parallel(VP, Quadratic(), 200, eta, map=map, mixing=mixing, window=window, tolerance=1e-8)
    torch.testing.assert_close(sampler(ring, noises()), sequential, rtol=0, atol=2e-6)
    assert (sampler.iterations < 100).all()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("grid", [Karras(0.01, 15.0), LogSNR(), Uniform()], ids=lambda grid: type(grid).__name__)
def test_any_path_and_grid(path, grid, ring):
    for map in (*MAPS, "parareal"):
        for method, eta in ((DDIM, 0.3), (Euler, None), (Heun, None), (DDPM, None)):
            sampler = in_parallel(path, grid, 12, eta, method=method, map=map, tolerance=1e-10)
            expected = sampler.trajectory.sampler(ring, noises())
            torch.testing.assert_close(sampler(ring, noises()), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("variance", [math.inf, None, 0.25, 0.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_after_k_sweeps_the_first_k_states_are_exact(variance, eta, ring):
    sampler, noise = DDIM(VP, Uniform(), 15, eta), noises()
    exact, start, trajectory = (
        chain(sampler, ring, noise),
        VP(sampler.times[0])[1] * noise(0),
        Transport(sampler, variance),
    )
    fresh = torch.stack([noise(k + 1) for k in range(15)], 1) if eta else None
    z = trajectory.initial(ring, start)
    errors = []
    for k in range(1, 16):
        z = trajectory.sweep(ring, z, start, fresh)
        errors.append((z - exact).abs().amax((0, 2)))
        assert errors[-1][:k].max() < 1e-10
    assert min(float(error[-1]) for error in errors[:3]) > 1e-5  # and the last one is not yet


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_parareal_is_exact_after_as_many_sweeps_as_blocks(eta, ring):
    sampler, noise = DDIM(VP, Uniform(), 17, eta), noises()
    trajectory = Parareal(sampler, 5)
    assert trajectory.states.tolist() == [4, 8, 11, 14, 17]
    exact, start = chain(sampler, ring, noise)[:, trajectory.states - 1], VP(sampler.times[0])[1] * noise(0)
    fresh = torch.stack([noise(k + 1) for k in range(17)], 1) if eta else None
    z = trajectory.initial(ring, start)
    for k in range(1, 6):
        z = trajectory.sweep(ring, z, start, fresh)
        torch.testing.assert_close(z[:, :k], exact[:, :k], rtol=1e-10, atol=1e-10)
        assert k > 3 or (z - exact)[:, k:].abs().max() > 1e-6


@pytest.mark.parametrize(("mixing", "window"), list(product(["none", "causal", "state"], [None, 6])))
def test_a_batch_is_its_singles(mixing, window):
    """Each with its own label, its own front and its own number of sweeps."""
    sampler = in_parallel(VP, Uniform(), 20, 0.4, mixing=mixing, window=window, tolerance=1e-5, max_iterations=40)
    label = torch.tensor([0, 1, 2, 3, 1])
    whole, sweeps = sampler(LABELLED, noises(5), label=label), sampler.iterations.tolist()
    assert len(set(sweeps)) > 1
    for i in range(5):
        single = sampler(LABELLED, NoiseSource(0, [i], (2,), dtype=F64), label=label[i : i + 1])
        torch.testing.assert_close(single, whole[i : i + 1], rtol=1e-8, atol=1e-8)
        assert sampler.iterations.tolist() == [sweeps[i]]
    expected = DDIM(VP, Uniform(), 20, 0.4)(LABELLED, noises(5), label=label)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("map", "window"), [("gaussian", None), ("gaussian", 6), ("parareal", None)])
@pytest.mark.parametrize("max_batch", [1, 7, 1000])
def test_chunks_change_nothing(map, window, max_batch):
    label = torch.tensor([0, 1, 2])
    options = {"map": map, "window": window, "tolerance": 1e-6}
    whole = in_parallel(VP, Uniform(), 9, 0.4, **options)(LABELLED, noises(3), label=label)

    class AtMost(CountedDenoiser):
        def forward(self, x, *rest, **condition):
            assert len(x) <= max_batch
            return super().forward(x, *rest, **condition)

    chunked = in_parallel(VP, Uniform(), 9, 0.4, max_batch=max_batch, **options)
    torch.testing.assert_close(chunked(AtMost(LABELLED), noises(3), label=label), whole, rtol=1e-11, atol=1e-11)


def test_a_window_evaluates_less_and_every_state_once_at_least(ring):
    rows, sweeps = {}, {}
    for window in (None, 40, 10, 1):
        sampler, counted = in_parallel(VP, Uniform(), 40, window=window, tolerance=1e-4), CountedDenoiser(ring)
        sampler(counted, noises())
        rows[window], sweeps[window] = counted.rows, sampler.iterations
    assert (sweeps[1] == 40).all()
    assert rows[1] == 4 * 40
    assert rows[1] < rows[10] < rows[40] < rows[None]
    assert (sweeps[40] <= sweeps[10]).all()


def test_the_slowest_sample_does_not_hold_the_others(ring):
    """One that has converged is no longer evaluated, and one's window moves whatever the others' do."""
    sampler = in_parallel(VP, Uniform(), 40, window=10, tolerance=1e-4)
    counted = CountedDenoiser(ring)
    sampler(counted, noises(16))
    assert counted.rows <= 10 * sampler.iterations.sum()
    assert sampler.iterations.unique().numel() > 1


def test_stopping_on_the_last_state_and_starting_from_zeros(ring):
    expected = DDIM(VP, Uniform(), 40)(ring, noises(16))
    sweeps = {}
    for stop, window, init in product(["all", "last"], [None, 40], ["start", "zeros"]):
        sampler = in_parallel(VP, Uniform(), 40, stop=stop, window=window, init=init, tolerance=1e-4)
        error = (sampler(ring, noises(16)) - expected).norm(dim=1) / expected.norm(dim=1)
        assert error.max() < 1e-3, (stop, window, init)
        sweeps[stop, window, init] = sampler.iterations.sum()
    assert sweeps["last", 40, "start"] <= sweeps["all", 40, "start"]
    assert sweeps["all", None, "start"] != sweeps["all", None, "zeros"]


@pytest.mark.parametrize(("mixing", "window"), [("none", None), ("causal", None), ("none", 10), ("causal", 10)])
def test_samples_that_have_not_converged_are_said_and_returned(mixing, window, ring):
    """The best there is: far nearer to the sample than noise is, though the window is nowhere near the end."""
    sampler = in_parallel(VP, Uniform(), 40, mixing=mixing, window=window, tolerance=1e-6, max_iterations=3)
    expected = DDIM(VP, Uniform(), 40)(ring, noises())
    message = (
        r"4 of 4 samples have not converged after 3 parallel iterations: relative residual up to .*, tolerance 1e-06"
    )
    with pytest.warns(UserWarning, match=message):
        x = sampler(ring, noises())
    assert (x - expected).norm() < 0.7 * expected.norm()
    assert sampler.iterations.tolist() == [3, 3, 3, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        in_parallel(VP, Uniform(), 40, mixing=mixing, window=window, tolerance=1e-6)(ring, noises())


class BreaksAt(Denoiser):
    """Zero, but not a number for the times about t = 0.5."""

    def forward(self, x, alpha, sigma):
        t = VP.time_at(sigma / alpha)
        return torch.where((t.reshape(-1, 1) - 0.5).abs() < 0.01, torch.nan, 0 * x)


@pytest.mark.parametrize("window", [None, 4])
def test_not_a_number_is_reported_with_its_step(window):
    times = torch.linspace(1, 0, 11, dtype=F64)
    with pytest.raises(
        FloatingPointError, match=r"not finite after step 6 of 10 \(t = 0.5 -> 0.4\) of a parallel sweep"
    ):
        in_parallel(VP, times, window=window)(BreaksAt(), noises())


def test_evaluations_progress_and_precision(ring):
    for options in ({}, {"window": 5}, {"map": "parareal"}, {"mixing": "causal"}):
        counted, fractions = CountedDenoiser(ring), []
        sampler = in_parallel(VP, Uniform(), 20, tolerance=1e-4, max_iterations=30, **options)
        start = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
        out = sampler(counted, noises(3, torch.float32), start=start, progress=fractions.append)
        assert fractions == sorted(fractions)
        assert fractions[-1] == 1
        assert out.dtype == torch.float32
        assert not out.requires_grad
        expected = DDIM(VP, Uniform(), 20)(ring, noises(3, torch.float32), start=start)
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-3)
        if not options:
            assert counted.rows == 20 * sampler.iterations.sum()


def test_a_sweep_is_differentiable(ring):
    """Inversion and the gradients through the fixed point differentiate through it."""
    trajectory = Transport(DDIM(VP, [0.9, 0.6, 0.3, 0.0], eta=0.5))
    g = torch.Generator().manual_seed(0)
    z, fresh = torch.randn(2, 2, 3, 2, generator=g, dtype=F64)
    start = torch.randn(2, 2, generator=g, dtype=F64)
    inputs = [v.requires_grad_() for v in (z, start, fresh)]
    assert torch.autograd.gradcheck(lambda *v: trajectory.sweep(ring, *v), inputs)


def test_options_out_of_range_are_refused():
    for options, message in [
        ({"map": "picard"}, "map must be thesis, increments, gaussian or parareal, got 'picard'"),
        ({"mixing": "anderson"}, "mixing must be none, state, item or causal, got 'anderson'"),
        ({"stop": "first"}, "stop must be all or last"),
        ({"init": "noise"}, "init must be start or zeros"),
        ({"window": 0}, "window must be at least 1"),
        ({"max_batch": 0}, "max_batch must be at least 1"),
        ({"variance": -1.0}, "need variance >= 0"),
        ({"map": "parareal", "blocks": 9}, r"blocks must lie in 1\.\.5"),
        ({"map": "parareal", "window": 2}, "a window needs the map Transport"),
    ]:
        with pytest.raises(ValueError, match=message):
            in_parallel(VP, Uniform(), 5, **options)
    with pytest.raises(TypeError, match="eta"):
        in_parallel(VP, Uniform(), 5, 0.5, method=Euler)
    assert isinstance(in_parallel(VP, Uniform(), 5, mixing="state").solver, Anderson)
    assert isinstance(Parallel(Transport(DDIM(VP, Uniform(), 5)), Picard()), Parallel)
