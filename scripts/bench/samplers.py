"""What a sampling step costs outside the network, beside diffusers' schedulers and torchdiffeq in the same process.

    python scripts/bench/samplers.py [--threads 1] [--batch 64] [--steps 50] [--repeat 15] [--device cpu]

The network is one that answers at once with a fixed tensor, so all that is left is the sampler: its coefficients, its
arithmetic, its check for NaN and, where it draws noise, the noise. Median over the repeats, which take turns. `wrapped`
adds what turns the network's noise prediction into E[x_0 | x]; diffusers' step does that as well.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from steadyflow.denoisers import Denoiser, EpsDenoiser
from steadyflow.grids import Indices, Karras
from steadyflow.noise import NoiseSource
from steadyflow.paths import EDM, ConditionalOT, DiscreteVariancePreserving, combine
from steadyflow.samplers import DDIM, DDPM, DEIS, RK45, DPMpp, Euler, Heun, Sampler, UniPC


class FixedNetwork(nn.Module):
    """Answers with the same tensor, whatever it is given."""

    def __init__(self, answer: Tensor):
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.answer


class FixedDenoiser(Denoiser):
    """Answers with the same tensor, and counts how often."""

    def __init__(self, answer: Tensor):
        super().__init__()
        self.answer, self.calls = answer, 0

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        self.calls += 1
        return self.answer


class NoNoise(NoiseSource):
    """The noise of step 0, at every step: what is left of a sampler without its random numbers."""

    def __call__(self, step: int) -> Tensor:
        if not hasattr(self, "first"):
            self.first = super().__call__(0)
        return self.first


def diffusers_ddim(answer: Tensor, start: Tensor, steps: int, eta: float) -> Callable[[], float]:
    """Milliseconds per step of diffusers' DDIM loop."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    generator = torch.Generator(start.device).manual_seed(0)

    def run() -> float:
        x, begin = start, time.perf_counter()
        for t in scheduler.timesteps:
            x = scheduler.step(answer, t, x, eta=eta, generator=generator).prev_sample
        synchronise(x)
        return 1e3 * (time.perf_counter() - begin) / steps

    return run


def diffusers_deis(answer: Tensor, start: Tensor, steps: int) -> Callable[[], float]:
    """Milliseconds per step of diffusers' DEIS of three values (degree 2)."""
    from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler

    scheduler = DEISMultistepScheduler(solver_order=3)

    def run() -> float:
        scheduler.set_timesteps(steps)
        x, begin = start, time.perf_counter()
        for t in scheduler.timesteps:
            x = scheduler.step(answer, t, x).prev_sample
        synchronise(x)
        return 1e3 * (time.perf_counter() - begin) / steps

    return run


def torchdiffeq_dopri5(denoiser: FixedDenoiser, start: Tensor, sampler: RK45) -> Callable[[], float]:
    """Milliseconds per evaluation of torchdiffeq's dopri5 on the same equation, the whole batch sharing its steps."""
    from torchdiffeq import odeint

    times = torch.tensor([sampler.start, sampler.end], dtype=torch.float64)

    def rate(t: Tensor, x: Tensor) -> Tensor:
        (alpha, sigma), (p, q) = sampler.path(t), sampler.path.velocity(t)
        return combine(p, x, q, denoiser(x, alpha, sigma))

    @torch.no_grad()
    def run() -> float:
        before, begin = denoiser.calls, time.perf_counter()
        synchronise(odeint(rate, start, times, rtol=sampler.rtol, atol=sampler.atol, method="dopri5")[-1])
        return 1e3 * (time.perf_counter() - begin) / (denoiser.calls - before)

    return run


def adams_bashforth(answers: list[Tensor], start: Tensor, steps: int) -> Callable[[], float]:
    """Milliseconds per step of x' = a x + sum of four c_j eps_j with the numbers given: the least a step can be."""
    table = torch.rand(steps, 5, generator=torch.Generator().manual_seed(0)).tolist()

    def run() -> float:
        x, begin = start, time.perf_counter()
        for keep, *past in table:
            x = keep * x
            for c, eps in zip(past, answers, strict=True):
                x.add_(eps, alpha=0.1 * c)
        synchronise(x)
        return 1e3 * (time.perf_counter() - begin) / steps

    return run


def ours(sampler: Sampler, denoiser: Denoiser, noise: NoiseSource, start: Tensor) -> Callable[[], float]:
    """Milliseconds per step of a sampler, per evaluation where the steps are its own choice."""

    def run() -> float:
        before, begin = getattr(denoiser, "calls", 0), time.perf_counter()
        synchronise(sampler(denoiser, noise, start=start))
        count = getattr(sampler, "steps", None) or denoiser.calls - before
        return 1e3 * (time.perf_counter() - begin) / count

    return run


def synchronise(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    batch, steps, device = arguments.batch, arguments.steps, arguments.device
    shape, index = (3, 32, 32), range(batch)
    answer = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    noise, quiet = NoiseSource(0, index, shape, device), NoNoise(0, index, shape, device)
    start = noise(0)
    path, grid = DiscreteVariancePreserving(), Indices()
    fixed, wrapped = FixedDenoiser(answer), EpsDenoiser(FixedNetwork(answer), path)

    def row(sampler: Sampler, denoiser: Denoiser = fixed, source: NoiseSource = noise) -> Callable[[], float]:
        return ours(sampler, denoiser, source, start)

    runs: dict[str, Callable[[], float]] = {
        "diffusers DDIM": diffusers_ddim(answer, start, steps, 0.0),
        "ddim, wrapped": row(DDIM(path, grid, steps), wrapped),
        "ddim": row(DDIM(path, grid, steps)),
        "euler": row(Euler(ConditionalOT(), Karras(), steps)),
        "heun (2 evaluations)": row(Heun(EDM(), Karras(), steps)),
        "torchdiffeq dopri5 (per evaluation)": torchdiffeq_dopri5(fixed, start, RK45(ConditionalOT())),
        "rk45 (per evaluation)": row(RK45(ConditionalOT())),
        "diffusers DDIM, eta 1": diffusers_ddim(answer, start, steps, 1.0),
        "ddim, eta 1, wrapped": row(DDIM(path, grid, steps, eta=1.0), wrapped),
        "ddpm": row(DDPM(path, grid, steps)),
        "ddpm, noise given": row(DDPM(path, grid, steps), fixed, quiet),
        "heun, churn, noise given": row(Heun(EDM(), Karras(), steps, churn=5.0), fixed, quiet),
        "diffusers DEIS-3": diffusers_deis(answer, start, steps),
        "Adams-Bashforth floor": adams_bashforth([answer + k for k in range(4)], start, steps),
        "deis, order 3": row(DEIS(path, grid, steps)),
        "dpmpp 2M": row(DPMpp(path, grid, steps)),
        "unipc 3": row(UniPC(path, grid, steps)),
    }
    times: dict[str, list[float]] = {name: [run()][:0] for name, run in runs.items()}  # once to warm up
    for _ in range(arguments.repeat):
        for name, run in runs.items():
            times[name].append(run())

    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{batch}x3x32x32 float32, {steps} steps, {device}, {arguments.threads} thread(s), torch {torch.__version__}")
    print(f"{'sampler':36}{'ms per step':>12}{'fastest':>10}{'of its peer':>14}")
    for name, value in medians.items():
        peer = "diffusers DDIM, eta 1" if "eta 1" in name or "ddpm" in name else "diffusers DDIM"
        reference = medians["torchdiffeq dopri5 (per evaluation)" if "evaluation)" in name else peer]
        print(f"{name:36}{value:12.3f}{min(times[name]):10.3f}{value / reference:14.2f}")
    deis, least = medians["deis, order 3"], medians["Adams-Bashforth floor"]
    print(
        f"deis, order 3: {deis / medians['diffusers DEIS-3']:.2f} of diffusers DEIS-3, {deis / least:.2f} of the floor"
    )


if __name__ == "__main__":
    main()
