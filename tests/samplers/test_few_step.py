"""DPM-Solver++, UniPC, ER-SDE, SA-Solver and Restart: orders, exact laws, published updates, each other."""

import numpy as np
import pytest
import torch

from steadyflow.denoisers import CountedDenoiser, Gaussian, GaussianMixture
from steadyflow.grids import Karras, LogSNR, Quadratic, Uniform
from steadyflow.noise import NoiseSource
from steadyflow.paths import (
    EDM,
    ConditionalOT,
    Cosine,
    DiscreteVariancePreserving,
    VarianceExploding,
    VariancePreserving,
)
from steadyflow.samplers import DDIM, DDPM, DEIS, ERSDE, DPMpp, Heun, Restart, SASolver, UniPC
from steadyflow.samplers.multistep import corrected

F64 = torch.float64
VP = VariancePreserving()
PATHS = [VP, DiscreteVariancePreserving(), Cosine(), VarianceExploding(0.002, 80.0), EDM(), ConditionalOT()]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)


@pytest.mark.parametrize(
    ("build", "order"),
    [
        (lambda p, g, n: DPMpp(p, g, n, lower_final=False), 2),
        (lambda p, g, n: UniPC(p, g, n, 1, lower_final=False), 2),
        (lambda p, g, n: UniPC(p, g, n, 2, lower_final=False), 3),
        (lambda p, g, n: ERSDE(p, g, n, 3, "ode"), 3),
        (lambda p, g, n: SASolver(p, g, n, 3, 0, 0.0, lower_final=False), 3),
    ],
    ids=["dpmpp 2M", "unipc 1", "unipc 2", "er_sde 3 ode", "sa_solver 3 ode"],
)
def test_order_of_convergence(build, order, convergence):
    slope, error, warm = convergence(build, VP)
    print(f"\norder {slope:.2f}, errors {error}; with the warm-up as shipped {warm}")
    assert order - 0.15 <= slope <= order + 0.3, (slope, error)
    assert warm[-1] < 8 * error[-1]


def test_unipc_3_has_order_4(convergence):
    """Seen from N = 640 on."""
    slope, error, _ = convergence(lambda p, g, n: UniPC(p, g, n, 3, lower_final=False), VP, counts=(640, 1280, 2560))
    assert 3.85 <= slope <= 4.3, (slope, error)


def output_variance(sampler, v):
    """Of a multistep sampler on data N(0, v), started from the exact law: its covariance in closed form, and the law's.

    There D = k_n x, so a step is linear in (x, h_{n-1}, ..., h_{n-q}), whose covariance goes from step to step.
    """
    alpha, sigma = sampler.path(sampler.times)
    law = alpha**2 * v + sigma**2
    q = sampler.table.shape[1] - 3
    c = torch.zeros(q + 1, q + 1, dtype=F64)
    c[0, 0] = law[0]
    for row, k in zip(sampler.table, alpha * v / law, strict=False):
        m = torch.zeros_like(c)
        m[0] = torch.cat([row[:1] + row[1] * k, row[2:-1]])
        if q:
            m[1, 0] = k
            m[2:, 1:-1] = torch.eye(q - 1, dtype=F64)
        c = m @ c @ m.T
        c[0, 0] += row[-1] ** 2
    return float(c[0, 0]), float(law[-1])


STOCHASTIC = {
    "dpmpp SDE-2M": (lambda p, g, n: DPMpp(p, g, n, eta=1.0, lower_final=False), 2),
    "dpmpp eta 0.5": (lambda p, g, n: DPMpp(p, g, n, eta=0.5, lower_final=False), 2),
    "er_sde 1": (lambda p, g, n: ERSDE(p, g, n, 1), 1),
    "er_sde 2": (lambda p, g, n: ERSDE(p, g, n, 2), 2),
    "er_sde 3 sde": (lambda p, g, n: ERSDE(p, g, n, 3, "sde"), 2),
    "sa_solver 1": (lambda p, g, n: SASolver(p, g, n, 1, 0, lower_final=False), 1),
    "sa_solver 3": (lambda p, g, n: SASolver(p, g, n, 3, 0, lower_final=False), 2),
    "sa_solver 3, 3": (lambda p, g, n: SASolver(p, g, n, 3, 3, lower_final=False), 2),
    "sa_solver tau 0.6": (lambda p, g, n: SASolver(p, g, n, 2, 2, 0.6, 0.1, 5.0), 2),
}


@pytest.mark.parametrize(("build", "order"), STOCHASTIC.values(), ids=STOCHASTIC.keys())
@pytest.mark.parametrize("path", [VP, ConditionalOT(), EDM()], ids=lambda path: type(path).__name__)
def test_the_variance_on_a_gaussian_converges_weakly(build, order, path):
    """No random numbers: the covariance is propagated in closed form."""
    steps, errors = [80, 160, 320], []
    grid = LogSNR(end=float(path.time_at(0.05)), zero=False)
    for n in steps:
        sampler = build(path, grid, n)
        assert sampler.stochastic
        ours, law = output_variance(sampler, 0.25)
        errors.append(abs(ours / law - 1))
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert order - 0.15 <= slope <= order + 0.7, (slope, errors)  # those with a corrector come from above
    assert errors[-1] < {1: 0.03, 2: 1e-3}[order]


class Quick(NoiseSource):
    """Noise of a batch as a whole, for batches of thousands."""

    def __call__(self, step):
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        return torch.randn(len(self), *self.shape, generator=generator, dtype=self.dtype)


@pytest.mark.parametrize(("build", "order"), STOCHASTIC.values(), ids=STOCHASTIC.keys())
def test_moments_on_the_ring(build, order, ring):
    """80 steps and 2000 samples: mean, covariance and weights of the modes, within four errors."""
    count, end = 2000, 1e-2
    sampler = build(VP, LogSNR(end=end, zero=False), 80)
    x = sampler(ring, Quick(3, range(count), (2,), dtype=F64))
    alpha, sigma = (float(v) for v in VP(end))
    variance = alpha**2 * (2.0**2 / 2 + 0.3**2) + sigma**2
    bias = 0.02 * variance
    assert x.mean(0).abs().max() < 4 * np.sqrt(variance / count) + bias
    error = 4 * np.sqrt((float(x.pow(4).mean()) - variance**2) / count) + bias
    assert (torch.cov(x.T) - variance * torch.eye(2, dtype=F64)).abs().max() < error
    mode = torch.round(torch.atan2(x[:, 1], x[:, 0]) / (torch.pi / 4)).long() % 8
    assert (torch.bincount(mode, minlength=8) / count - 1 / 8).abs().max() < 4 * np.sqrt(7 / 64 / count) + 0.01


@every_path
def test_a_point_is_recovered_in_one_step_and_in_any(path):
    """D is constant; where noise is drawn its variance must be the path's."""
    point = torch.tensor([[0.7, -1.4, 2.0]], dtype=F64)
    dirac, noise = GaussianMixture(point, [0.0]), NoiseSource(0, range(5), (3,), dtype=F64)
    for times in ([1.0, 0.0], [1.0, 0.3], [0.9, 0.5, 0.2, 0.1, 0.03, 0.0]):
        (a, s), (a_end, s_end) = path(times[0]), path(times[-1])
        start = a * point + s * noise(0)
        for sampler in (DPMpp(path, times), UniPC(path, times), ERSDE(path, times, scale="ode")):
            out = sampler(dirac, noise, start=start)
            torch.testing.assert_close(out, a_end * point + s_end * noise(0), rtol=1e-6, atol=1e-6)
        for sampler in (DPMpp(path, times, eta=1.0), ERSDE(path, times), SASolver(path, times)):
            row, (a_n, s_n) = sampler.table, path(sampler.times)  # coefficient of eps and of z: variances add up
            eps = (row[:, 0] * s_n[:-1]) ** 2 + row[:, -1] ** 2
            torch.testing.assert_close(eps, s_n[1:] ** 2, rtol=1e-12, atol=1e-15)
            mean = row[:, 0] * a_n[:-1] + row[:, 1:-1].sum(1)
            torch.testing.assert_close(mean, a_n[1:], rtol=1e-9, atol=1e-12)


@every_path
def test_of_one_value_they_are_ddim_or_ddpm(path):
    grid = Uniform()
    for kept, one, other in (
        (True, ERSDE(path, grid, 6, 1, "ode"), SASolver(path, grid, 6, 1, 0, 0.0)),
        (False, ERSDE(path, grid, 6, 1, "sde"), SASolver(path, grid, 6, 1, 0, 1.0)),
    ):
        t, s = one.times[:-1], one.times[1:]
        if kept:
            _, _, keep, pull, std = DDIM(path, grid, 6).coefficients(t, s)
        else:
            _, _, keep, pull, std, _ = DDPM(path, grid, 6).coefficients(t, s)
        for table in (one.table, other.table):
            torch.testing.assert_close(table, torch.stack([keep, pull, std], 1), rtol=1e-12, atol=1e-13)


def test_the_corrector_folded_into_the_table_is_the_corrector(ring):
    """SA-Solver written out: predict, call, correct with the same noise, predict from there."""
    sampler = SASolver(VP, LogSNR(zero=False), 9, 3, 2, 0.8)
    plain = SASolver(VP, LogSNR(zero=False), 9, 3, 0, 0.8).table
    noise, (alpha, sigma) = NoiseSource(0, range(6), (2,), dtype=F64), VP(sampler.times)
    p = x = sigma[0] * noise(0)
    rho = VP.ratio(sampler.times)
    outputs: list = []
    for n in range(9):
        outputs.insert(0, ring(p, alpha[n], sigma[n]))
        if n:  # x_n from x_{n-1}, by D_n and two values before it where there are
            nodes = [n, n - 1, n - 2][: n + 1]
            last = torch.linspace(0, 1, 2001, dtype=F64)  # Simpson's rule in log rho, by itself
            log = (1 - last) * rho[n - 1].log() + last * rho[n].log()
            density = 1.64 * (rho[n] / log.exp()) ** 1.64
            weight = torch.ones_like(last)
            weight[1:-1:2], weight[2:-1:2] = 4, 2
            weight = weight * (rho[n - 1] / rho[n]).log() / 6000
            level = rho.log()
            drift = sum(
                (
                    weight
                    * density
                    * torch.stack([(log - level[k]) / (level[j] - level[k]) for k in nodes if k != j]).prod(0)
                ).sum()
                * outputs[n - j]
                for j in nodes
            )
            gain = (rho[n] / rho[n - 1]) ** 0.64
            x = gain * sigma[n] / sigma[n - 1] * x + alpha[n] * drift + sigma[n] * torch.sqrt(1 - gain**2) * noise(n)
        terms = zip(plain[n, 1:-1], outputs, strict=False)
        p = plain[n, 0] * x + sum(c * d for c, d in terms) + plain[n, -1] * noise(n + 1)
    torch.testing.assert_close(sampler(ring, noise), p, rtol=1e-6, atol=1e-6)


def test_no_corrector_is_the_predictor():
    keep, predict = torch.rand(4, dtype=F64), torch.rand(4, 2, dtype=F64)
    none = torch.cat([torch.zeros(4, 1, dtype=F64), predict], 1)
    rows = corrected(keep, predict, none)
    torch.testing.assert_close(rows, torch.cat([predict, torch.zeros(4, 1, dtype=F64)], 1), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "options", "build"),
    [
        ("DEISMultistep", {"solver_order": 2}, lambda t: DEIS(VP, t, None, "log_rhoab", 1, lower_final=True)),
        ("DEISMultistep", {"solver_order": 3}, lambda t: DEIS(VP, t, None, "log_rhoab", 2, lower_final=True)),
        ("DPMSolverMultistep", {"solver_order": 2}, lambda t: DPMpp(VP, t)),
        ("UniPCMultistep", {"solver_order": 2}, lambda t: UniPC(VP, t, order=2)),
        ("UniPCMultistep", {"solver_order": 3}, lambda t: UniPC(VP, t)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_on_its_times_diffusers_makes_the_same_samples(name, options, build, ring):
    """Below 15 steps, where it lowers the order at the end too."""
    diffusers = pytest.importorskip("diffusers")
    for grid in (Quadratic(end=0.01, zero=False), LogSNR(end=0.01, zero=False)):
        times = grid(VP, 12)
        noise = NoiseSource(0, range(16), (2,), dtype=F64)
        scheduler = getattr(diffusers, f"{name}Scheduler")(prediction_type="sample", **options)
        scheduler.set_timesteps(12)
        scheduler.sigmas, scheduler.timesteps, scheduler._step_index = VP.ratio(times), torch.arange(12), 0
        x = noise(0)
        for k, t in enumerate(times[:-1]):
            x = scheduler.step(ring(x, *VP(t)), k, x).prev_sample
        torch.testing.assert_close(build(times)(ring, noise, start=noise(0)), x, rtol=1e-5, atol=1e-5)


def test_restart_is_heun_between_restarts(ring):
    noise = NoiseSource(0, range(7), (2,), dtype=F64)
    plain = Heun(EDM(), Karras(), 18)(ring, noise)
    torch.testing.assert_close(Restart(EDM(), Karras(), 18, intervals=[])(ring, noise), plain, rtol=1e-12, atol=1e-12)
    sampler, counted = Restart(EDM(), Karras(), 18), CountedDenoiser(ring)
    again = sampler(counted, noise)
    assert counted.rows / 7 == sampler.nfe == 43  # Xu et al. 2023: CIFAR-10, 18 steps, N_restart 3, K 2
    assert (again - plain).abs().max() > 0.1


@pytest.mark.parametrize("path", [EDM(), VP, ConditionalOT()], ids=lambda path: type(path).__name__)
def test_restarts_keep_the_law_and_undo_errors(path):
    """On data N(0, v) each move is linear, so the variance is propagated: with fine steps it stays the path's, and a
    start of the wrong variance comes nearer to it than without restarts."""
    v, grid = 0.25, Karras(0.02, 40.0, zero=False)
    denoiser, errors = Gaussian([0.0], v), []
    for intervals in ([], [(30, 3, 0.1, 2.0)], [(30, 3, 0.1, 2.0), (30, 2, 1.0, 8.0)]):
        sampler = Restart(path, grid, 150, intervals)
        for wrong in (1.0, 1.5):
            (a, s) = path(sampler.stops[0])
            variance = wrong * (a**2 * v + s**2)
            for t, u in zip(sampler.stops[:-1], sampler.stops[1:], strict=True):
                if u > t:
                    alpha, ratio = path(torch.stack([t, u]))[0], path.ratio(torch.stack([t, u]))
                    variance = (alpha[1] / alpha[0]) ** 2 * variance + alpha[1] ** 2 * (ratio[1] ** 2 - ratio[0] ** 2)
                else:
                    variance = variance * sampler.heun.step(denoiser, torch.ones(1, 1, dtype=F64), t, u).item() ** 2
            a, s = path(sampler.stops[-1])
            errors.append(abs(float(variance / (a**2 * v + s**2)) - 1))
    assert max(errors[::2]) < 3e-3
    assert 0.4 < errors[1] < 0.6
    assert errors[3] < 0.1 * errors[1]
    assert errors[5] < errors[3]


def test_restart_noise_is_keyed_and_batches_are_their_singles(ring):
    sampler = Restart(VP, LogSNR(), 12, [(3, 2, 0.1, 1.0)])
    whole = sampler(ring, NoiseSource(5, range(4), (2,), dtype=F64))
    for i in range(4):
        single = sampler(ring, NoiseSource(5, [i], (2,), dtype=F64))
        torch.testing.assert_close(single, whole[i : i + 1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DPMpp(VP, Uniform(), 5, eta=-1.0), "need eta >= 0, got -1.0"),
        (lambda: UniPC(VP, Uniform(), 5, 4), "order must be 1, 2 or 3, got 4"),
        (lambda: ERSDE(VP, Uniform(), 5, 0), "order must be 1, 2 or 3, got 0"),
        (lambda: ERSDE(VP, Uniform(), 5, 1, "vp"), "scale must be er_sde_5, sde or ode, got vp"),
        (lambda: SASolver(VP, Uniform(), 5, 4), "need predictor 1, 2 or 3"),
        (lambda: SASolver(VP, Uniform(), 5, tau=-0.1), "need tau >= 0"),
        (lambda: Restart(VP, Uniform(), 5, [(0, 1, 0.1, 1.0)]), "need steps >= 1"),
        (lambda: Restart(VP, Uniform(), 5, [(2, 1, 0.1, 1e4)]), "the path's own"),
        (lambda: Restart(VP, [1.0, 0.0], None, [(2, 1, 0.1, 1.0)]), "no time near ratio_min = 0.1"),
    ],
)
def test_options_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
