"""Parallel-in-time sampling beside sequential DDIM: sweeps to a given error for every map and mixing, and wall time.

    python scripts/bench/parallel.py [--networks] [--images 4] [--only gaussian causal]

The first table counts the sweeps (network calls one after another) until a sample is within a relative L2 error of 1e-2
and 1e-3 of sequential DDIM with the same noise, for the median sample and, in brackets, the worst:

    ring         8 Gaussians (std 0.1) on a ring of radius 2, T = 1000, 64 samples
    3072-D       10 Gaussians with a 1/f^2 spectrum in the cosine basis of 3x32x32 images, T = 100, 4 samples
    digits100    with --networks: the embedded checkpoint digits32, T = 100, --images of them
    digits1000   with --networks: the same at T = 1000

`-` stands for more than 30. With --networks follows what the preset `sampler=parallel` takes on digits32: T = 100 with
64 images and T = 1000 with 8, error of each image, sweeps, evaluations and seconds beside sequential DDIM (an hour on a
processor; --claims 8,2 for fewer images). On CUDA comes the time of one image at T = 1000.
"""

import argparse
import contextlib
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from steadyflow.checkpoints import embedded
from steadyflow.denoisers import CountedDenoiser, Denoiser, GaussianMixture
from steadyflow.grids import Quadratic
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath, VariancePreserving
from steadyflow.samplers import DDIM, Parallel, in_parallel

MAPS, MIXINGS, CAP = ("thesis", "increments", "gaussian"), ("none", "state", "item", "causal"), 30
Problem = tuple[Denoiser, GaussianPath, Callable[..., Parallel], NoiseSource, dict[str, Tensor]]


class Enough(Exception):
    """The samples are as near as asked for."""


def sweeps(sampler: Parallel, denoiser: Denoiser, noise: NoiseSource, expected: Tensor, **condition: Tensor) -> str:
    """Sweeps to 1e-2 and 1e-3, every sample swept until the worst is there."""
    trajectory, errors = sampler.trajectory, list[tuple[float, float]]()
    start = trajectory.sampler.path(trajectory.sampler.times[0])[1].item() * noise(0)

    def look(k: int, rows: Tensor, image: Tensor, relative: Tensor) -> None:
        error = (image[:, -1] - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        errors.append((float(error.median()), float(error.max())))
        if errors[-1][1] < 1e-3:
            raise Enough

    with torch.inference_mode():
        states = trajectory.initial(denoiser, start, **condition)
        with contextlib.suppress(Enough):
            sampler.solver(
                lambda z, start, *given: trajectory.sweep(
                    denoiser, z, start, None, **dict(zip(condition, given, strict=True))
                ),
                states,
                start,
                *condition.values(),
                norm=lambda r: torch.ones(len(r), device=r.device),  # never done
                callback=look,
            )
    median, worst = (
        "/".join(next((str(k + 1) for k, e in enumerate(errors) if e[i] < limit), "-") for limit in (1e-2, 1e-3))
        for i in (0, 1)
    )
    return f"{median} ({worst})"


def ring() -> tuple[Denoiser, NoiseSource]:
    angle = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    means = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    return GaussianMixture(means, torch.full((8,), 0.01)), NoiseSource(0, range(64), (2,))


def spectrum() -> tuple[Denoiser, NoiseSource]:
    """Means and modes of the same spectrum, half the variance each, 0.25 a pixel together."""
    f = torch.arange(32, dtype=torch.float64)
    power = 1 / (f[:, None] ** 2 + f**2).clamp(min=1)
    power = (0.125 * power / power.mean()).expand(3, 32, 32)
    g = torch.Generator().manual_seed(0)
    means = torch.randn(10, 3, 32, 32, generator=g, dtype=torch.float64) * power.sqrt()
    return GaussianMixture(means, power.expand(10, 3, 32, 32)), NoiseSource(0, range(4), (3, 32, 32))


def synchronised(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def table(arguments: argparse.Namespace) -> None:
    path, columns = VariancePreserving(), {"ring": (*ring(), 1000, {}), "3072-D": (*spectrum(), 100, {})}
    paths: dict[str, GaussianPath] = {}
    if arguments.networks:
        checkpoint, label = embedded("digits32"), torch.arange(arguments.images) % 10
        noise = NoiseSource(0, range(arguments.images), checkpoint.shape)
        for steps in (100, 1000):
            columns[f"digits{steps}"] = (checkpoint.denoiser, noise, steps, {"label": label})
            paths[f"digits{steps}"] = checkpoint.path
    rows = [(map, mixing) for map in MAPS for mixing in MIXINGS]
    rows = [row for row in rows if not arguments.only or set(arguments.only) <= set(row)]
    columns = {name: column for name, column in columns.items() if not arguments.problem or name in arguments.problem}
    print(f"{'sweeps to 1e-2 / 1e-3':24}" + "".join(f"{name:>14}" for name in columns), flush=True)
    expected = {}
    for name, (denoiser, noise, steps, condition) in columns.items():
        expected[name] = DDIM(paths.get(name, path), Quadratic(), steps)(denoiser, noise, **condition)
    for map, mixing in rows:
        print(f"{map + ' + ' + mixing:24}", end="", flush=True)
        for name, (denoiser, noise, steps, condition) in columns.items():
            sampler = in_parallel(
                paths.get(name, path),
                Quadratic(),
                steps,
                map=map,
                mixing=mixing,
                history=3,
                max_iterations=CAP,
                max_batch=20 if name == "3072-D" else 1024,
            )
            print(f"{sweeps(sampler, denoiser, noise, expected[name], **condition):>14}", end="", flush=True)
        print(flush=True)


def beside_sequential(steps: int, images: int, device: torch.device, options: dict) -> None:
    """One line: errors of each image, sweeps, evaluations, seconds of the parallel and of the sequential sampler."""
    checkpoint = embedded("digits32")
    denoiser, label = checkpoint.denoiser.to(device), torch.arange(images, device=device) % 10
    noise = NoiseSource(0, range(images), checkpoint.shape, device)
    runs = {}
    for name, sampler in (
        ("sequential", DDIM(checkpoint.path, Quadratic(), steps)),
        ("parallel", in_parallel(checkpoint.path, Quadratic(), steps, 0.0, **options)),
    ):
        counted = CountedDenoiser(denoiser)
        with torch.inference_mode():
            if device.type == "cuda":
                sampler(counted, noise, label=label)  # warm-up
            counted.rows, begin = 0, synchronised(device)
            x = sampler(counted, noise, label=label)
            runs[name] = (x.flatten(1), synchronised(device) - begin, counted.rows / images, sampler.iterations)
    (x, slow, nfe, _), (y, fast, parallel_nfe, iterations) = runs["sequential"], runs["parallel"]
    error = (y - x).norm(dim=1) / x.norm(dim=1)
    print(
        f"T={steps} images={images} {device.type} {options}: relative L2 median {error.median():.2g} worst "
        f"{error.max():.2g}; sweeps {iterations.float().mean():.1f} (most {iterations.max()}); NFE {parallel_nfe:.0f} "
        f"beside {nfe:.0f}; seconds {fast:.1f} beside {slow:.1f}, {slow / fast:.2f}x",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", action="store_true", help="also the embedded checkpoint")
    parser.add_argument("--images", type=int, default=4, help="of the checkpoint in the table")
    parser.add_argument("--only", nargs="*", default=[], help="a map, a mixing, or both")
    parser.add_argument("--problem", nargs="*", default=[], help="these columns of the table alone")
    parser.add_argument("--claims", default="64,8", help="images at T = 100 and at T = 1000; 0 for none")
    arguments = parser.parse_args()
    table(arguments)
    if arguments.networks:
        for steps, images in zip((100, 1000), map_int(arguments.claims), strict=True):
            if images:
                for options in ({"mixing": "causal"}, {"mixing": "causal", "window": steps}):
                    beside_sequential(steps, images, torch.device("cpu"), options)
    if torch.cuda.is_available():
        for options in ({"mixing": "causal"}, {"mixing": "none"}, {"mixing": "causal", "window": 1000}):
            beside_sequential(1000, 1, torch.device("cuda"), options)
    else:
        print("one image at T = 1000 on CUDA: skipped, there is none")


def map_int(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    main()
