"""Draws the paths of samples of 2-D data under several samplers: one panel each, one PNG.

    python scripts/trajectories.py FILE.png [samplers=ddim,deis,heun] [count=40] [dataset=toy2d dataset.name=rings ...]

Each line joins the states at which the denoiser was called, x / sqrt(alpha^2 + sigma^2), from noise (grey) to sample
(red), over samples of the data. All panels start from the same noise. Other words are overrides of the sampling job; by
default dataset=toy2d with its exact denoiser (checkpoint=analytic), and sampler.steps=10.
"""

import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from steadyflow.data.image_writing import whole_file
from steadyflow.denoisers import Denoiser
from steadyflow.noise import NoiseSource

DEFAULTS = {"dataset": "toy2d", "checkpoint": "analytic", "sampler.steps": "10"}


class Recorder(Denoiser):
    """Keeps the states at which a denoiser is called, scaled to one size."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser = denoiser
        self.states: list[Tensor] = []

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        self.states.append((x / torch.hypot(alpha, sigma).to(x)).clone())
        return self.denoiser(x, alpha, sigma, **condition)


def main() -> None:
    if len(sys.argv) < 2 or "=" in sys.argv[1]:
        sys.exit(__doc__)
    words = DEFAULTS | dict(word.split("=", 1) for word in sys.argv[2:])
    names, count = words.pop("samplers", "ddim,deis,heun").split(","), int(words.pop("count", "40"))
    figure = Figure(figsize=(3.6 * len(names), 3.9), dpi=130, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        with initialize_config_dir(str(Path(__file__).parents[1] / "configs"), version_base="1.3"):
            cfg = compose("sample", [f"sampler={name}", *(f"{key}={value}" for key, value in words.items())])
        dataset, checkpoint = instantiate(cfg.dataset), instantiate(cfg.checkpoint)
        if checkpoint.shape != (2,):
            sys.exit(f"trajectories are drawn in the plane, and these samples have the shape {checkpoint.shape}")
        own = {} if cfg.sampler.get("path") is not None else {"path": checkpoint.path}
        recorder = Recorder(checkpoint.denoiser)
        end = instantiate(cfg.sampler, **own)(recorder, NoiseSource(cfg.seed, range(count), (2,), dtype=torch.float64))
        lines = torch.stack([*recorder.states, end]).transpose(0, 1)  # (count, calls + 1, 2)
        data = torch.stack([dataset[i][0] for i in range(min(len(dataset), 4000))])
        axes.scatter(*data.T, s=1, color="0.85", linewidths=0)
        axes.add_collection(LineCollection(lines.numpy(), colors="C0", linewidths=0.7, alpha=0.7))
        axes.scatter(*lines[:, 0].T, s=6, color="0.4", linewidths=0)
        axes.scatter(*end.T, s=8, color="C3", linewidths=0, zorder=3)
        axes.set(title=f"{name}, {len(recorder.states)} calls", aspect="equal")
    file = Path(sys.argv[1])
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as temporary:
        figure.savefig(temporary, format="png")
    print(file)


if __name__ == "__main__":
    main()
