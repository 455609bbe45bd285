"""How parallel sampling converges: Figures 3.1 to 3.4 of Pokle 2025 for our checkpoints, each with its numbers.

    python scripts/convergence_study.py [key=value ...]      e.g. sampler.map=gaussian sampler.mixing=causal

reads convergence_study.yaml beside it and writes to outputs/convergence_study

    convergence.png, .csv   |F(z) - z| over the sweeps for chains of several lengths, mean and min-max band over the
                            runs; beside it the relative error of x_0 to sequential sampling
    init.png, .csv          the same for all states starting from x_T and from zero
    latents.png, .csv       intermediate states of one chain for both starts, after a third and after all of the sweeps
"""

import csv
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from steadyflow.checkpoints import Checkpoint, embedded
from steadyflow.noise import NoiseSource
from steadyflow.samplers import in_parallel


class Run(NamedTuple):
    """One solve: |F(z) - z| and the relative error of x_0 (K, B), and the states (B, M, *S) after sweep k = 1..K."""

    residual: Tensor
    error: Tensor
    states: list[Tensor]
    exact: Tensor


def solve(cfg: DictConfig, checkpoint: Checkpoint, steps: int, init: str) -> Run:
    """All sweeps of a chain of `steps`, none of them stopped early."""
    options: dict[str, Any] = {**cfg.sampler, "tolerance": 0.0, "max_iterations": cfg.iterations, "init": init}
    sampler = in_parallel(checkpoint.path, instantiate(cfg.grid), steps, **options)
    chain, trajectory = sampler.trajectory.sampler, sampler.trajectory
    noise = NoiseSource(cfg.seed, range(cfg.runs), checkpoint.shape)
    condition = {"label": torch.arange(cfg.runs) % checkpoint.num_classes} if checkpoint.num_classes else {}
    start, denoiser = chain.path(chain.times[0])[1].item() * noise(0), checkpoint.denoiser
    fresh = chain.noises(noise)
    x, exact = start, []
    for k in range(steps):
        z = None if fresh is None else fresh[:, k]
        x = chain.step(denoiser, x, chain.times[k], chain.times[k + 1], z, **condition)
        exact.append(x)
    truth = torch.stack(exact, 1)[:, trajectory.states - 1]
    shape, blank = (cfg.iterations, cfg.runs), torch.full((cfg.iterations, cfg.runs), torch.nan)
    residual, error, states = blank.clone(), blank.clone(), [truth.new_zeros(truth.shape) for _ in range(shape[0])]

    def look(k: int, rows: Tensor, image: Tensor, relative: Tensor) -> None:
        residual[k, rows] = (relative * image.flatten(1).norm(dim=1)).float()
        last = truth[rows, -1]
        error[k, rows] = (image[:, -1] - last).flatten(1).norm(dim=1) / last.flatten(1).norm(dim=1)
        for later in states[k:]:  # a run that is done stays where it is
            later[rows] = image

    sampler.solver(
        trajectory.bind(denoiser, condition),
        trajectory.initial(denoiser, start, init == "zeros", **condition),
        start,
        fresh,
        *condition.values(),
        callback=look,
    )
    return Run(residual, error, states, truth)


def curves(file: Path, runs: dict[str, Run], title: str) -> None:
    """Residual and error over the sweeps, with bands over the runs; the numbers beside the picture."""
    figure = Figure(figsize=(9, 3.6), dpi=130, layout="constrained")
    for axes, name, label in zip(
        figure.subplots(1, 2), ("residual", "error"), ("|F(z) - z|", "relative error of x_0"), strict=True
    ):
        for i, (what, run) in enumerate(runs.items()):
            values = getattr(run, name)
            values = torch.where(values > 0, values, torch.nan).numpy()
            sweeps = range(1, len(values) + 1)
            centre = torch.from_numpy(values).nanmean(1)
            low, high = (
                torch.from_numpy(values).nan_to_num(fill).aminmax(dim=1)[side] for side, fill in ((0, 1e30), (1, 0.0))
            )
            axes.plot(sweeps, centre, color=f"C{i}", label=what, marker=".", markersize=4)
            axes.fill_between(
                sweeps, low, high, where=centre.isfinite().tolist(), color=f"C{i}", alpha=0.2, linewidth=0
            )
        axes.set(yscale="log", xlabel="sweeps", ylabel=label)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(file)
    with file.with_suffix(".csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["curve", "sweep", "run", "residual", "relative_error_x0"])
        for what, run in runs.items():
            for k, (residual, error) in enumerate(zip(run.residual.tolist(), run.error.tolist(), strict=True)):
                writer.writerows([what, k + 1, b, r, e] for b, (r, e) in enumerate(zip(residual, error, strict=True)))


def latents(file: Path, runs: dict[str, Run], columns: int, iterations: int) -> None:
    """The first image's states of both starts after a third and after all of the sweeps, over the sequential ones."""
    exact = next(iter(runs.values())).exact[0]
    count = len(exact)
    shown = sorted({*range(0, count, max(1, count // columns)), *range(max(0, count - 5), count)})
    early = max(1, iterations // 3)
    rows = {f"{name}, {k} sweeps": run.states[k - 1][0] for name, run in runs.items() for k in (early, iterations)}
    rows |= {"sequential": exact}
    figure = Figure(figsize=(0.75 * len(shown) + 1.6, 0.8 * len(rows) + 0.3), dpi=130, layout="constrained")
    axes = figure.subplots(len(rows), len(shown))
    for line, (name, states) in zip(axes, rows.items(), strict=True):
        for one, k in zip(line, shown, strict=True):
            image = states[k].clamp(-1, 1).add(1).div(2)
            one.imshow(image.movedim(0, -1).squeeze(-1), cmap="gray", vmin=0, vmax=1)
            one.set(xticks=[], yticks=[])
            if name == next(iter(rows)):
                one.set_title(f"{count - 1 - k}", fontsize=7)
        line[0].set_ylabel(name.replace(", ", "\n"), rotation=0, ha="right", va="center", fontsize=7)
    figure.suptitle("steps left to x_0", fontsize=8)
    figure.savefig(file)
    with file.with_suffix(".csv").open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["row", "steps_left", "relative_error"])
        for name, states in rows.items():
            writer.writerows(
                [name, count - 1 - k, float((states[k] - exact[k]).norm() / exact[k].norm())] for k in shown
            )


def main() -> None:
    cfg = OmegaConf.load(Path(__file__).with_suffix(".yaml"))
    assert isinstance(cfg, DictConfig)
    OmegaConf.set_struct(cfg, True)
    cfg.merge_with_dotlist(sys.argv[1:])
    warnings.simplefilter("ignore", UserWarning)  # no convergence is what the picture shows
    checkpoint, out = embedded(cfg.checkpoint), Path(cfg.directory)
    out.mkdir(parents=True, exist_ok=True)
    title = f"{cfg.checkpoint}, map {cfg.sampler.map}, mixing {cfg.sampler.mixing}, {cfg.runs} runs"
    with torch.inference_mode():
        runs = {f"T = {steps}": solve(cfg, checkpoint, steps, "start") for steps in cfg.lengths}
        starts = {
            "x_T": runs.get(f"T = {cfg.init_length}") or solve(cfg, checkpoint, cfg.init_length, "start"),
            "zeros": solve(cfg, checkpoint, cfg.init_length, "zeros"),
        }
    curves(out / "convergence.png", runs, title)
    curves(out / "init.png", starts, f"{title}, T = {cfg.init_length}")
    latents(out / "latents.png", starts, cfg.columns, cfg.iterations)
    for name, run in {**runs, f"zeros, T = {cfg.init_length}": starts["zeros"]}.items():
        last, error = run.residual[-1], run.error[-1]
        print(
            f"{name}: after {cfg.iterations} sweeps |F(z) - z| {last.nan_to_num(0).mean():.3g}, relative error of x_0 "
            f"{error.nan_to_num(0).mean():.3g} (worst {error.nan_to_num(0).max():.3g})"
        )
    print(f"{out}/convergence.png init.png latents.png, each with its .csv")


if __name__ == "__main__":
    main()
