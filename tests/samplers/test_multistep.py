"""What every multistep sampler promises, whatever its coefficients."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from steadyflow.denoisers import CountedDenoiser, Denoiser, EpsDenoiser, GaussianMixture
from steadyflow.grids import Karras, LogSNR, Uniform
from steadyflow.noise import NoiseSource
from steadyflow.paths import (
    EDM,
    ConditionalOT,
    Cosine,
    DiscreteVariancePreserving,
    VarianceExploding,
    VariancePreserving,
)
from steadyflow.samplers import DEIS, ERSDE, IPNDM, DPMpp, SASolver, UniPC
from steadyflow.samplers.deis import AdamsBashforth

F64 = torch.float64
BUILDS = {
    "tab": lambda path, grid, steps: AdamsBashforth(path, grid, steps, "tab", 3),
    "rhoab": lambda path, grid, steps: AdamsBashforth(path, grid, steps, "rhoab", 2),
    "log_rhoab": lambda path, grid, steps: AdamsBashforth(path, grid, steps, "log_rhoab", 3),
    "ipndm": lambda path, grid, steps: IPNDM(path, grid, steps),
    "dpmpp": lambda path, grid, steps: DPMpp(path, grid, steps),
    "dpmpp sde": lambda path, grid, steps: DPMpp(path, grid, steps, eta=1.0),
    "unipc": lambda path, grid, steps: UniPC(path, grid, steps),
    "er_sde": lambda path, grid, steps: ERSDE(path, grid, steps),
    "sa_solver": lambda path, grid, steps: SASolver(path, grid, steps, tau_min=0.05, tau_max=5.0),
}
every_build = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())
every_path = pytest.mark.parametrize(
    "path",
    [VariancePreserving(), DiscreteVariancePreserving(), Cosine(), VarianceExploding(), EDM(), ConditionalOT()],
    ids=lambda path: type(path).__name__,
)
LABELLED = GaussianMixture([[-1.0, 0.0], [1.0, 0.5], [0.0, 1.0]], [0.1, 0.2, 0.05], labels=[0, 1, 2])


@every_build
@every_path
def test_a_batch_is_its_singles(build, path):
    """On a grid that begins at t = 1 and ends at t = 0, which alpha(1) = 0 and sigma(0) = 0 must survive."""
    sampler = build(path, Uniform(), 6)
    label = torch.tensor([0, 1, 2, 3, 1])
    whole = sampler(LABELLED, NoiseSource(5, range(5), (2,), dtype=F64), label=label)
    for i in range(5):
        single = sampler(LABELLED, NoiseSource(5, [i], (2,), dtype=F64), label=label[i : i + 1])
        torch.testing.assert_close(single, whole[i : i + 1], rtol=1e-10, atol=1e-10)


@every_build
def test_evaluations_progress_and_gradients(build):
    fractions, counted = [], CountedDenoiser(LABELLED)
    sampler = build(VariancePreserving(), Uniform(), 5)
    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    out = sampler(counted, NoiseSource(0, range(3), (2,)), start=start, progress=fractions.append)
    assert counted.rows / 3 == sampler.steps == 5
    assert fractions == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert not out.requires_grad
    assert out.dtype == torch.float32


@every_build
def test_the_coefficients_are_computed_once(build, monkeypatch):
    """A second batch asks the path for the two numbers of its times alone, the tables stand."""
    sampler = build(VariancePreserving(), LogSNR(), 8)
    table = sampler.table
    monkeypatch.setattr("steadyflow.samplers.adams.NODES", ())  # any quadrature would fail
    first, second = (sampler(LABELLED, NoiseSource(0, range(3), (2,))) for _ in range(2))
    assert sampler.table is table
    assert torch.equal(first, second)


@every_build
def test_a_float32_state_follows_the_float64_one(build):
    sampler = build(VariancePreserving(), Karras(), 12)
    coarse, fine = (sampler(LABELLED, NoiseSource(0, range(20), (2,), dtype=kind)) for kind in (torch.float32, F64))
    torch.testing.assert_close(coarse.double(), fine, rtol=0, atol=2e-4)


class Half(Denoiser):
    """The mixture as a network in half precision answers: its output rounded to bfloat16."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def forward(self, x, alpha, sigma, **condition):
        self.seen.add(x.dtype)
        return LABELLED(x, alpha, sigma).bfloat16().to(x.dtype)


@every_build
def test_state_and_history_stay_in_float32_around_a_half_precision_network(build):
    """Each entry differs by what the network rounded, 2^-9 of it, not by what the state would lose at every step."""
    sampler, half = build(VariancePreserving(), LogSNR(), 40), Half()
    noise = NoiseSource(0, range(50), (2,))
    start = sampler.path(sampler.times[0])[1].float() * noise(0)
    out = sampler(half, noise, start=start.half())
    assert half.seen == {torch.float32}
    assert out.dtype == torch.float32
    exact = sampler(LABELLED, noise, start=start.half().float())
    assert (out - exact).abs().median() < 4e-3


class BreaksAt(Denoiser):
    """The zero denoiser, but not a number in one entry at its k-th call."""

    def __init__(self, call):
        super().__init__()
        self.left = call

    def forward(self, x, alpha, sigma, **condition):
        self.left -= 1
        out = torch.zeros_like(x)
        out[1, 0] = float("nan") if self.left == 0 else 0.0
        return out


@every_build
def test_not_a_number_is_reported_with_its_step(build):
    sampler = build(VariancePreserving(), Uniform(), 6)
    t = sampler.times
    message = rf"not finite after step 3 of 6 \(t = {t[2]:.4g} -> {t[3]:.4g}\)"
    with pytest.raises(FloatingPointError, match=message):
        sampler(BreaksAt(3), NoiseSource(0, range(3), (2,)))


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[0.3, -0.1], [0.2, 0.4]]))

    def forward(self, x, t):
        return x @ self.weight + t[:, None]


class X0(Denoiser):
    """A network that predicts x_0 and takes sigma as its time: nothing around it that dynamo cannot trace."""

    def __init__(self):
        super().__init__()
        self.network = Linear()

    def forward(self, x, alpha, sigma, **condition):
        return self.network(x, sigma.to(x).expand(len(x)))


@every_build
def test_a_step_with_its_network_compiles_once(build):
    """fullgraph, one compilation for all steps of the grid, warm-up and last step included; the same samples."""
    torch._dynamo.reset()
    sampler, denoiser, counter = build(VariancePreserving(), Uniform(), 12), X0(), CompileCounter()
    step = torch.compile(sampler.step, fullgraph=True, backend=counter, dynamic=False)
    noise = NoiseSource(0, range(4), (2,))
    x = (sampler.path(sampler.times[0])[1] * noise(0)).float()
    past = sampler.past(x)
    with torch.no_grad():
        for k, row in enumerate(sampler.schedule(x)):
            x, past = step(denoiser, x, past, row, noise(k + 1) if sampler.stochastic else None)
    assert counter.frame_count == 1
    torch.testing.assert_close(x, sampler(denoiser, noise), rtol=1e-6, atol=1e-6)


@every_build
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_the_samples_are_those_of_the_cpu(build):
    sampler = build(VariancePreserving(), Uniform(), 12)
    cpu, cuda = (sampler(LABELLED.to(d), NoiseSource(0, range(8), (2,), d)).cpu() for d in ("cpu", "cuda"))
    LABELLED.to("cpu")
    torch.testing.assert_close(cuda, cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", ["tab", "rho_rk"])
def test_a_noise_predicting_network_starts_where_there_is_no_signal(variant):
    """On conditional OT, t = 1 has alpha = 0. The exact noise of one data point at 0 is x / t."""

    class Network(torch.nn.Module):
        def forward(self, x, t):
            return x / t[:, None]

    path = ConditionalOT()
    sampler = DEIS(path, Uniform(), 5, variant, 3 if variant == "tab" else "heun2")
    out = sampler(EpsDenoiser(Network(), path), NoiseSource(0, range(4), (2,), dtype=F64))
    torch.testing.assert_close(out, torch.zeros(4, 2, dtype=F64), rtol=0, atol=1e-4)  # the network's time is float32
