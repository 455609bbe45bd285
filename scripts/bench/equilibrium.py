"""Anderson acceleration beside the torchdeq package, on the same batched problem in the same process.

    python scripts/bench/equilibrium.py [--threads 1] [--batch 2048] [--size 512] [--m 5] [--rtol 1e-4] [--repeat 7]
                                        [--radius 0.9] [--device cpu]

The problem: z = tanh(W z + x), W Gaussian with spectral radius `radius`, x standard normal, from z = 0, until every
item's |f(z) - z| <= rtol |f(z)|. An iteration is a call of f. torchdeq keeps every item until the last has converged;
ours lets items leave, unless masked. Medians over the repeats, which take turns; on a CPU it is processor time, which
other work on the machine hardly changes.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from steadyflow.equilibrium import Anderson


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--m", type=int, default=5)
    parser.add_argument("--rtol", type=float, default=1e-4)
    parser.add_argument("--radius", type=float, default=0.9)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        from torchdeq.solver.anderson import anderson_solver
    except ImportError:
        sys.exit("this bench compares with torchdeq, which is not installed: pip install 'steadyflow[bench]'")

    generator = torch.Generator().manual_seed(0)
    batch, size, m, rtol = arguments.batch, arguments.size, arguments.m, arguments.rtol
    weight = arguments.radius * torch.randn(size, size, generator=generator).to(arguments.device) / size**0.5
    x = torch.randn(batch, size, generator=generator).to(arguments.device)
    z0, calls, inside = torch.zeros_like(x), 0, 0.0

    def now() -> float:
        if not x.is_cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def f(z: Tensor, x: Tensor = x) -> Tensor:
        nonlocal calls, inside
        begin, calls = now(), calls + 1
        out = torch.tanh(z @ weight + x)
        inside += now() - begin
        return out

    def ours(compact: bool) -> Callable[[], Tensor]:
        solver = Anderson(m=m, rtol=rtol, max_iterations=200, compact=compact)
        return lambda: solver(f, z0, x).z

    runs: dict[str, Callable[[], Tensor]] = {
        "torchdeq": lambda: anderson_solver(f, z0, max_iter=200, tol=rtol, stop_mode="rel", m=m)[0],
        "steadyflow": ours(True),
        "steadyflow, masked": ours(False),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    counts, residuals = {}, {}
    with torch.no_grad():
        for repeat in range(arguments.repeat + 1):
            for name, run in runs.items():
                calls, inside, begin = 0, 0.0, now()
                z = run()
                spent = now() - begin
                if repeat:  # the first warms up
                    times[name].append((1e3 * spent / calls, 1e3 * (spent - inside) / calls))
                counts[name] = calls
                image = torch.tanh(z @ weight + x)
                residuals[name] = float(((image - z).norm(dim=1) / image.norm(dim=1)).max())

    print(
        f"{batch}x{size} float32, tanh map, m = {m}, relative tolerance {rtol:g}, {arguments.device}, "
        f"{arguments.threads} thread(s), torch {torch.__version__}"
    )
    titles = ("iterations", "ms / iteration", "of torchdeq", "outside f", "of torchdeq", "worst residual")
    print(" " * 20 + "".join(f"{title:>16}" for title in titles))
    reference = times["torchdeq"]
    for name, pairs in times.items():
        whole, outside = (statistics.median(values) for values in zip(*pairs))
        ratios = [statistics.median(a[i] / b[i] for a, b in zip(pairs, reference)) for i in (0, 1)]
        cells = (f"{whole:.2f}", f"{ratios[0]:.2f}", f"{outside:.2f}", f"{ratios[1]:.2f}", f"{residuals[name]:.1e}")
        print(f"{name:20}{counts[name]:16}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
