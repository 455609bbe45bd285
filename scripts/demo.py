"""`make demo`: the embedded checkpoint sampled by three samplers, scored, as one table and one picture.

Every line of the table is one `steadyflow sample` run, kept in outputs/demo/NAME. Overrides go to each of them:

    python scripts/demo.py checkpoint=analytic num_samples=128
"""

import json
import logging
import shutil
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from steadyflow import cli
from steadyflow.callbacks.samples import SampleFiles
from steadyflow.data.image_writing import whole_file
from steadyflow.data.images import from_uint8

OUT = Path(__file__).parents[1] / "outputs" / "demo"
IMAGES = 256  # of each run
COMPARED = 48  # of which are compared with the same noise taken to its end
RUNS = {
    "DDIM, 10 steps": ["sampler=ddim", "sampler.steps=10"],
    "DDIM, 20 steps": ["sampler=ddim", "sampler.steps=20"],
    "DDIM, 50 steps": ["sampler=ddim", "sampler.steps=50"],
    "Heun, 18 steps": ["sampler=heun", "sampler.steps=18"],
    "DDPM, 50 steps": ["sampler=ddpm", "sampler.steps=50"],
}
REFERENCE = "Heun, 200 steps"
SHOWN = 20  # images a row of the picture


def sample(name: str, *overrides: str) -> tuple[Tensor, dict]:
    """One run of the sampling job: its images by number, in [-1, 1], and its metrics."""
    directory = OUT / name.lower().replace(", ", "-").replace(" ", "-")
    code = cli.main(["sample", f"hydra.run.dir={directory}", "batch_size=128", *overrides, *sys.argv[1:]])
    if code:
        sys.exit(code)
    count = len(SampleFiles(directory).index())
    return from_uint8(SampleFiles(directory).first_images(count)), json.loads((directory / "metrics.json").read_text())


def picture(rows: dict[str, Tensor], file: Path) -> None:
    """The first images of each run, a labelled row a run."""
    figure = Figure(figsize=(12, 0.6 * len(rows)), dpi=120)
    for axes, (name, x) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows.items(), strict=True):
        strip = torch.nn.functional.pad(x[:SHOWN].clamp(-1, 1), (1, 1, 1, 1), value=-1.0)
        strip = (strip.permute(2, 0, 3, 1).flatten(1, 2) + 1) / 2  # (H, n W, C)
        axes.imshow(strip.squeeze(-1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10)
    with whole_file(file) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.05)  # with the labels at the left


def main() -> None:
    start, console = time.perf_counter(), Console()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    shutil.rmtree(OUT, ignore_errors=True)
    quiet = ["hydra/job_logging=disabled", "logger=none"]
    console.print(f"[dim]{REFERENCE}: where the noise of the first images leads, for the RMSE[/dim]")
    end, _ = sample(REFERENCE, "sampler=heun", "sampler.steps=200", f"num_samples={COMPARED}", "callbacks=none", *quiet)
    table, rows = Table("sampler", title="one line, one run"), {}
    for column in ("NFE", "FID", "KID x 1000", "ms / image", "RMSE"):
        table.add_column(column, justify="right")
    metrics: dict = {}
    for name, overrides in RUNS.items():
        console.print(f"[dim]{name}[/dim]")
        x, metrics = sample(name, *overrides, f"num_samples={IMAGES}", *quiet)
        n = min(len(x), len(end))
        rmse = (x[:n] - end[:n]).square().mean().sqrt()
        table.add_row(
            name,
            f"{metrics['nfe']:g}",
            f"{metrics['fid']:.3f} ± {metrics['fid_std']:.3f}",
            f"{1000 * metrics['kid']:.2f} ± {1000 * metrics['kid_std']:.2f}",
            f"{1000 * metrics['seconds_per_image']:.1f}",
            "random" if "sampler=ddpm" in overrides else f"{rmse:.4f}",
        )
        rows[f"{name}\n{metrics['nfe']:g} evaluations"] = x
    rows[REFERENCE] = end
    picture(rows, OUT / "demo.png")
    told = metrics["protocol"]["fid"]
    table.title = f"{told['count']} images of each sampler"
    table.caption = (
        f"FID and KID: `{told['features']}` features of {told['count']} images against {told['reference']}; "
        f"± of FID is its bootstrap error, of KID its spread over subsets. RMSE: of {len(end)} images, in [-1, 1], to "
        f"{REFERENCE} from the same noise; DDPM, which adds noise at each step, ends elsewhere."
    )
    console.print(table)
    console.print(f"{OUT / 'demo.png'}   ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
