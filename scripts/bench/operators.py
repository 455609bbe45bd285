"""Time and memory of the operators at B x 3 x 256 x 256, beside deepinv's in the same process.

    python scripts/bench/operators.py [--threads 1] [--batch 4] [--repeat 9] [--device cpu] [--only NAME ...]
                                      [--slow] [--dense-blur]

A, A^T, A^+ and the regularised solve x = A^T (A A^T + v I)^-1 y, v = noise2 / r2 = 0.005, which is deepinv's
prox_l2(0, y, 1 / v). Calls take turns; one that takes over a second is not repeated. Printed are the median (CPU
milliseconds of the process on a CPU, which a busy machine does not change; wall-clock on a GPU), the peak of what torch
allocates during a call, its result included, and |ours - theirs| / |theirs|. deepinv inverts by conjugate gradients
where it has no decomposition, to a tolerance of its own; --slow adds those whose A alone takes over 0.12 s. Its
"reflect" is about the middle of the border pixels, ours about their edges, hence the difference there.

At the end the pseudo-inverse in float32 against a dense one in float64 at 64 x 64; --dense-blur adds the blur's, whose
matrix of side 4096 takes a minute or so to decompose.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of itself unless told before torch is imported

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from steadyflow.linear import BicubicDownsampling, Blur, Convolution, Inpainting, Operator, freeform_mask
from steadyflow.linear.separable import gaussian_taps

V = 0.005
Calls = dict[str, Callable[[], Tensor]]


def ours(operator: Operator, x: Tensor) -> Calls:
    y = operator(x)
    return {
        "A": lambda: operator(x),
        "A^T": lambda: operator.adjoint(y),
        "A^+": lambda: operator.pinv(y),
        "solve": lambda: operator.adjoint(operator.solve(y, 1.0, V)),
    }


def theirs(physics, x: Tensor) -> Calls:  # type: ignore[no-untyped-def]
    y, zero = physics.A(x), torch.zeros_like(x)
    return {
        "A": lambda: physics.A(x),
        "A^T": lambda: physics.A_adjoint(y),
        "A^+": lambda: physics.A_dagger(y),
        "solve": lambda: physics.prox_l2(zero, y, 1 / V),
    }


def deepinv_physics(shape: tuple[int, int, int], mask: Tensor, device: str) -> dict[str, object]:
    """deepinv's operators by the name of ours; empty, with a line, where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from deepinv import physics
    except ImportError:
        print("deepinv is not installed ('steadyflow[bench]'): ours alone")
        return {}
    taps = gaussian_taps(3.0, 61)
    kernel = torch.outer(taps, taps).float()[None, None].to(device)
    return {
        "bicubic x4": physics.DownsamplingMatlab(factor=4, device=device),
        "blur, reflect": physics.Blur(filter=kernel, padding="reflect", device=device),  # reflects about pixel centres
        "blur, circular": physics.BlurFFT(img_size=shape, filter=kernel, device=device),
        "free-form mask": physics.Inpainting(img_size=shape, mask=mask.float().expand(1, *shape[1:]), device=device),
    }


def timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Milliseconds, and what the call returns."""
    begin, clock = time.process_time(), time.perf_counter()
    out = call()
    if out.is_cuda:
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - clock), out
    return 1e3 * (time.process_time() - begin), out


def peak_mb(call: Callable[[], Tensor], device: str) -> float:
    """The most that torch had allocated during a call, beyond what it had before."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        call()
    held, peak = 0, 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def dense_error(operator: Operator) -> float:
    """|A^+ y of float32 - A^+ y of the dense float64 matrix| / |.| for y = A x, x standard Gaussian."""
    n = torch.Size(operator.shape).numel()
    a = torch.cat([operator(e.reshape(-1, *operator.shape)).flatten(1) for e in torch.eye(n).double().split(256)]).mT
    y = operator(torch.randn(4, *operator.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    s2, u = torch.linalg.eigh(a @ a.mT)  # of the measurement's size
    kept = s2 > (operator.cutoff**2) * s2.max()
    exact = ((y.flatten(1) @ u[:, kept]) / s2[kept]) @ u[:, kept].mT @ a
    single = operator.pinv(y.float()).flatten(1).double()
    return float((single - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", nargs="*", default=[], help="operators whose name contains one of these")
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--dense-blur", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    device, shape = arguments.device, (3, 256, 256)
    x = torch.randn(arguments.batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    mask, taps = freeform_mask(shape[1:]), gaussian_taps(3.0, 61)
    operators: dict[str, Operator] = {
        "bicubic x4": BicubicDownsampling(shape, 4),
        "blur, reflect": Blur(shape, 3.0, 61),
        "blur, circular": Blur(shape, 3.0, 61, "circular"),
        "blur, circular, FFT": Convolution(shape, torch.outer(taps, taps)),
        "free-form mask": Inpainting(shape, mask),
    }
    chosen = {n: a for n, a in operators.items() if not arguments.only or any(part in n for part in arguments.only)}
    peers = deepinv_physics(shape, mask, device)
    print(f"{arguments.batch}x3x256x256 float32, {device}, {arguments.threads} thread(s), torch {torch.__version__}")
    print(f"{'operator':22}{'':8}{'ms':>9}{'MB':>8}{'deepinv ms':>12}{'MB':>8}{'ratio':>9}{'difference':>12}")
    for name, operator in chosen.items():
        peer = peers.get(name.removesuffix(", FFT"))
        with torch.no_grad():
            sides = [ours(operator, x)] + ([theirs(peer, x)] if peer is not None else [])
            slow = len(sides) == 2 and timed(sides[1]["A"])[0] > 120 and not arguments.slow
            for what in sides[0]:
                calls = [side[what] for side in sides[: 1 if slow and what in ("A^+", "solve") else 2]]
                first = [timed(call) for call in calls]  # to warm up, and the only time of a slow call
                times: list[list[float]] = [[once] if once > 1000 else [] for once, _ in first]
                for _ in range(arguments.repeat):
                    for call, (once, _), taken in zip(calls, first, times, strict=True):
                        if once <= 1000:
                            taken.append(timed(call)[0])
                medians = [statistics.median(taken) for taken in times]
                line = f"{name:22}{what:8}{medians[0]:9.2f}{peak_mb(calls[0], device):8.1f}"
                if len(calls) == 2:
                    a, b = (out for _, out in first)
                    difference = float((a - b).norm() / b.norm())
                    line += f"{medians[1]:12.2f}{peak_mb(calls[1], device):8.1f}{medians[0] / medians[1]:9.4f}"
                    line += f"{difference:12.1e}"
                print(line, flush=True)

    print(f"\n{'float32 A^+ against dense float64, 64 x 64':46}{'error':>10}")
    dense: dict[str, Operator] = {"bicubic x4": BicubicDownsampling((1, 64, 64), 4)}
    if arguments.dense_blur:
        dense["blur, reflect"] = Blur((1, 64, 64), 3.0, 61)
    for name, operator in dense.items():
        print(f"{name:46}{dense_error(operator):10.1e}", flush=True)


if __name__ == "__main__":
    main()
