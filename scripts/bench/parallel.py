"""Parallel-in-time sampling beside sequential DDIM: sweeps to a given error for every map and mixing, and wall time.

    python scripts/bench/parallel.py [--problem ring digits100] [--only gaussian causal] [--claims 64,8]

The table counts the sweeps (network calls one after another) until a sample is within a relative L2 error of 1e-2 and
1e-3 of sequential DDIM with the same noise, for the median sample and, in brackets, the worst:

    ring         8 Gaussians (std 0.1) on a ring of radius 2, T = 1000, 64 samples
    3072-D       10 Gaussians with a 1/f^2 spectrum in the cosine basis of 3x32x32 images, T = 100, 8 samples
    digits100    the embedded checkpoint digits32, T = 100, 2 images
    digits1000   the same at T = 1000, 1 image

Most of the time is digits1000's: a sweep is 1000 evaluations, of some 2.5 ms on one core, and each of the twelve rows
takes up to 30 sweeps, so some ten minutes; --problem ring 3072-D digits100 leaves it out.

--claims 64,8 adds what the preset `sampler=parallel` takes on digits32, T = 100 with 64 images and T = 1000 with 8:
error of each image, sweeps, evaluations, seconds and FID beside sequential DDIM; an hour on a processor. On CUDA follow
the same at T = 1000 for one image (seconds) and for 1000 (FID; --fid 1000).
"""

import argparse
import contextlib
import math
import time
from itertools import product
from typing import Any

import torch
from torch import Tensor

from steadyflow.checkpoints import embedded
from steadyflow.data import Digits, to_uint8
from steadyflow.denoisers import CountedDenoiser, Denoiser, GaussianMixture
from steadyflow.grids import Quadratic
from steadyflow.metrics import DigitsNet, FrechetDistance, Sources
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath, VariancePreserving
from steadyflow.samplers import DDIM, Parallel, in_parallel

MAPS, MIXINGS, CAP = ("thesis", "increments", "gaussian"), ("none", "state", "item", "causal"), 30
Problem = tuple[Denoiser, NoiseSource, GaussianPath, int, dict[str, Tensor]]


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
                trajectory.bind(denoiser, condition),
                states,
                start,
                None,
                *condition.values(),
                norm=lambda r: torch.ones(len(r), device=r.device),  # never done
                callback=look,
            )
    each = [
        "/".join(next((str(k + 1) for k, e in enumerate(errors) if e[i] < limit), f">{CAP}") for limit in (1e-2, 1e-3))
        for i in (0, 1)
    ]
    return each[0] if len(expected) == 1 else "{} ({})".format(*each)


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
    return GaussianMixture(means, power.expand(10, 3, 32, 32)), NoiseSource(0, range(8), (3, 32, 32))


def synchronised(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def table(problems: list[str], only: set[str], images: list[int]) -> None:
    checkpoint = embedded("digits32")
    columns: dict[str, Problem] = {}
    for name, mixture, steps in (("ring", ring, 1000), ("3072-D", spectrum, 100)):
        columns[name] = (*mixture(), VariancePreserving(), steps, {})
    for steps, count in zip((100, 1000), images, strict=True):
        noise, label = NoiseSource(0, range(count), checkpoint.shape), torch.arange(count) % 10
        columns[f"digits{steps}"] = (checkpoint.denoiser, noise, checkpoint.path, steps, {"label": label})
    columns = {name: columns[name] for name in problems}
    print(f"{'sweeps to 1e-2 / 1e-3':24}" + "".join(f"{name:>17}" for name in columns), flush=True)
    expected = {
        name: DDIM(path, Quadratic(), steps)(denoiser, noise, **condition)
        for name, (denoiser, noise, path, steps, condition) in columns.items()
    }
    for map, mixing in product(MAPS, MIXINGS):
        if not only <= {map, mixing}:
            continue
        print(f"{map + ' + ' + mixing:24}", end="", flush=True)
        for name, (denoiser, noise, path, steps, condition) in columns.items():
            options = {
                "map": map,
                "mixing": mixing,
                "max_iterations": CAP,
                "max_batch": 20 if name == "3072-D" else 1024,
            }
            sampler = in_parallel(path, Quadratic(), steps, **options)
            print(f"{sweeps(sampler, denoiser, noise, expected[name], **condition):>17}", end="", flush=True)
        print(flush=True)


def beside_sequential(steps: int, images: int, device: torch.device, batch: int = 64, **options: Any) -> None:
    """One line: errors of the parallel sampler; its sweeps, evaluations, seconds and FID beside the sequential one."""
    checkpoint = embedded("digits32")
    denoiser = CountedDenoiser(checkpoint.denoiser.to(device))
    sources = Sources(DigitsNet, Digits, device=device)
    runs = []
    for sampler in (
        DDIM(checkpoint.path, Quadratic(), steps),
        in_parallel(checkpoint.path, Quadratic(), steps, max_batch=1024, **options),
    ):
        parts, iterations = list[Tensor](), list[Tensor]()
        seconds, fid = 0.0, FrechetDistance(bootstrap=0).to(device)
        fid.prepare(sources)
        for index in torch.arange(images).split(batch):
            noise, label = NoiseSource(0, index, checkpoint.shape, device), (index % 10).to(device)
            with torch.inference_mode():
                if device.type == "cuda" and not parts:
                    sampler(denoiser, noise, label=label)  # warm-up
                if not parts:
                    denoiser.rows = 0
                begin = synchronised(device)
                parts.append(sampler(denoiser, noise, label=label))
                seconds += synchronised(device) - begin
                fid.update(index, sources.extractor(to_uint8(parts[-1]))[0])
            iterations.append(sampler.iterations)
        distance = float(fid.compute()["fid"]) if images > 1 else math.nan
        runs.append((torch.cat(parts).flatten(1), seconds, denoiser.rows / images, distance, iterations))
    (x, slow, nfe, fid_x, _), (y, fast, parallel_nfe, fid_y, iterations) = runs
    error, swept = (y - x).norm(dim=1) / x.norm(dim=1), torch.cat(iterations).float()
    print(
        f"T={steps} images={images} {device.type} {options}: relative L2 median {error.median():.2g} worst "
        f"{error.max():.2g}, {int((error <= 0.01).sum())} within 1%; sweeps {swept.mean():.1f}, most {swept.max():.0f}"
        f"; NFE {parallel_nfe:.0f} beside {nfe:.0f}; seconds {fast:.3g} beside {slow:.3g}, {slow / fast:.2f}x"
        + (f"; FID {fid_y:.4g} beside {fid_x:.4g}, {100 * (fid_y / fid_x - 1):+.2f}%" if images > 1 else ""),
        flush=True,
    )


def on_a_card(device: torch.device, steps: int, images: int) -> None:
    """The time of one image for several parallel samplers, and the FID of many for the default and the thesis' one."""
    thesis = {"map": "thesis", "mixing": "state", "history": 5, "ridge": 1e-3, "max_iterations": 15}
    default = {"mixing": "causal"}
    for options in (default, {"mixing": "none"}, default | {"window": steps}, thesis):
        beside_sequential(steps, 1, device, **options)
    for options in (default, thesis):
        beside_sequential(steps, images, device, **options)


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    problems = ["ring", "3072-D", "digits100", "digits1000"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", nargs="*", default=problems, choices=problems, help="columns; none: no table")
    parser.add_argument("--only", nargs="*", default=[], choices=[*MAPS, *MIXINGS], help="a map, a mixing, or both")
    parser.add_argument("--images", type=numbers, default=[2, 1], help="of digits100 and digits1000")
    parser.add_argument("--claims", type=numbers, default=[0, 0], help="images at T = 100 and at T = 1000")
    parser.add_argument("--fid", type=int, default=1000, help="images of the FID on CUDA")
    arguments = parser.parse_args()
    if arguments.problem:
        table(arguments.problem, set(arguments.only), arguments.images)
    for steps, images in zip((100, 1000), arguments.claims, strict=True):
        if images:
            beside_sequential(steps, images, torch.device("cpu"), mixing="causal", max_iterations=15)
            beside_sequential(steps, images, torch.device("cpu"), mixing="causal", window=steps)
    if torch.cuda.is_available():
        on_a_card(torch.device("cuda"), 1000, arguments.fid)
    else:
        print("T = 1000 on CUDA (seconds of one image, FID of 1000): skipped, there is none")


if __name__ == "__main__":
    main()
