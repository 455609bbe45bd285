"""Finds the best time grids of a checkpoint for few steps, once, and saves them beside it as plain numbers.

    python scripts/find_grid.py FILE [checkpoint=digits32 ...] [samples=16] [steps=[5,10,20]] [end=0.001]

FILE is the JSON file to write, e.g. outputs/train/DATE/TIME/model/grid.json. Then, on this checkpoint,

    steadyflow sample sampler=dpmpp sampler/grid=saved sampler.grid.file=FILE sampler.steps=10

Any other override of the sampling job (seed, label, dataset) is one here too.
"""

import json
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from steadyflow.data.image_writing import whole_file
from steadyflow.modules.sampling import class_labels
from steadyflow.noise import NoiseSource
from steadyflow.samplers.best_grid import best_grids

OWN = {"samples": 16, "steps": list(range(4, 21)), "end": 1e-3}


def main() -> None:
    if len(sys.argv) < 2 or "=" in sys.argv[1]:
        sys.exit(__doc__)
    file, words = Path(sys.argv[1]), [word.partition("=") for word in sys.argv[2:]]
    own = OWN | {key: json.loads(value) for key, _, value in words if key in OWN}
    with initialize_config_dir(str(Path(__file__).parents[1] / "configs"), version_base="1.3"):
        cfg = compose("sample", [f"{key}={value}" for key, _, value in words if key not in OWN])
    checkpoint = instantiate(cfg.checkpoint)
    index = torch.arange(own["samples"])
    label = class_labels(cfg.label, index, checkpoint.num_classes, cfg.seed)
    noise = NoiseSource(cfg.seed, index, checkpoint.shape)
    condition = {} if label is None else {"label": label}
    found = best_grids(checkpoint.denoiser, checkpoint.path, noise, own["steps"], own["end"], **condition)
    told = {"checkpoint": checkpoint.sha256, "seed": cfg.seed, **own}
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as temporary:
        Path(temporary).write_text(json.dumps({"ratios": found, "made_from": told}) + "\n")
    print(f"{file}: grids of {min(found)} to {max(found)} steps")


if __name__ == "__main__":
    main()
