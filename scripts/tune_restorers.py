"""Chooses the hyper-parameters of the tables restoration_digits and restoration_mnist, and prints their rows.

    python scripts/tune_restorers.py FILE [images=32] [task="SR x8"] [method=DDNM]
    python scripts/tune_restorers.py FILE checkpoints=DIR vp=mnist_vp ot=mnist_ot dataset=mnist dataset.size=32

The same effort for each method and task: its twelve settings in GRIDS restore images of the training split, measured
with sigma_y = 0.05, in 10 evaluations (the C- methods, which are for few, in 5; RED-diff, which is for many, in 100 on
half the images; DPS, whose step size belongs to a number of steps, in both), and the least mean lpips_digits wins. FILE
is a JSON of all scores; what stands there is not run again.
"""

import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from steadyflow.checkpoints import Checkpoint
from steadyflow.data import to_uint8
from steadyflow.data.image_files import DatasetPart, ImageFiles
from steadyflow.data.image_writing import whole_file
from steadyflow.jobs.sample import sampler_on
from steadyflow.metrics import DigitsDistance
from steadyflow.modules.restoring import Measurements, Restoration
from steadyflow.noise import NoiseSource

TASKS = {
    "SR x8": "task=sr8",
    "Box 16": "task=inpaint_box task.size=16",
    "Blur 4": "task=blur task.std=4",
    "Random 90%": "task=inpaint_random",
}
PINV = ["sampler.init=noise", *(f"sampler.init=pinv sampler.grid.start={v}" for v in (0.6, 0.8))]


def settings(key: str, *values: float) -> list[str]:
    return [f"sampler.{key}={value:g}" for value in values]


GRIDS: dict[str, tuple[str, list[str], list[str]]] = {  # checkpoint and sampler, and two lists of settings
    "PiGDM": (
        "vp sampler=pigdm",
        settings("weight", 1, 2, 4),
        [f"{e} {i}" for e in settings("eta", 0, 1) for i in PINV[:2]],
    ),
    "OT-ODE": ("vp sampler=ot_ode", settings("weight", 1, 2, 4), settings("t0", 0.6, 0.7, 0.8, 0.9)),
    "OT-ODE (flow)": ("ot sampler=ot_ode", settings("weight", 1, 2, 4), settings("t0", 0.6, 0.7, 0.8, 0.9)),
    "VP-ODE": ("vp sampler=vp_ode", settings("weight", 1, 2, 4), settings("t0", 0.3, 0.45, 0.6, 0.75)),
    "C-PiGDM": ("vp sampler=c_pigdm", settings("weight", 2, 5, 12, 30), settings("grid.start", 0.4, 0.6, 0.8)),
    "C-PiGFM": ("ot sampler=c_pigfm", settings("weight", 5, 20, 60, 180), settings("grid.start", 0.6, 0.8, 0.9)),
    "DDRM": ("vp sampler=ddrm", settings("eta", 0, 0.5, 0.85, 1), settings("eta_b", 1, 0.75, 0.5)),
    "DDNM": ("vp sampler=ddnm", settings("eta", 0, 0.5, 0.85, 1), PINV),
    "RED-diff": (
        "vp sampler=red_diff sampler.means=false",
        settings("weight", 0.01, 0.06, 0.25, 1, 4, 16),
        settings("lr", 0.1, 0.3),
    ),
    "DPS": ("vp sampler=dps", settings("scale", 0.1, 0.3, 1, 3, 10, 30), settings("eta", 0, 1)),
}
NFE = {"C-PiGDM": [5], "C-PiGFM": [5], "RED-diff": [100], "DPS": [10, 100]}  # [10] of the others
OWN = {"images": "32", "task": "", "method": "", "vp": "digits32", "ot": "digits32_ot", "checkpoints": ""}


def main() -> None:
    if len(sys.argv) < 2 or "=" in sys.argv[1]:
        sys.exit(__doc__)
    file, more = Path(sys.argv[1]), dict(word.split("=", 1) for word in sys.argv[2:])
    own = {key: more.pop(key, default) for key, default in OWN.items()}
    count, folder = int(own["images"]), own["checkpoints"]
    lpips = DigitsDistance()
    scores: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    rows, train = [], None
    with initialize_config_dir(str(Path(__file__).parents[1] / "configs"), version_base="1.3"):
        for task, of in TASKS.items():
            if own["task"] not in (task, ""):
                continue
            rows += [f"  {task}:", f'    set: "{of}"', "    rows:"]
            for method, (start, *lists) in GRIDS.items():
                if own["method"] not in (method, ""):
                    continue
                kind, *sampler = start.split()
                name = own[kind]
                at = f"checkpoint=path checkpoint.file={folder}/{name}" if folder else f"checkpoint={name}"
                given = [f"{key}={value}" for key, value in more.items()]
                cfg = compose("restore", [*given, *of.split(), *at.split(), *sampler, "task.sigma_y=0.05"])
                checkpoint = instantiate(cfg.checkpoint)
                train = train or instantiate(cfg.dataset, split="train")
                best = {}
                for steps in NFE.get(method, [10]):
                    found = {}
                    for line in map(" ".join, product(*lists)):
                        key = f"{task} | {method} | {steps} | {line}"
                        if key not in scores:
                            images = ImageFiles([DatasetPart(train, np.arange(count if steps < 100 else count // 2))])
                            scores[key] = score(cfg, checkpoint, f"sampler.steps={steps} {line}", images, lpips)
                            with whole_file(file) as temporary:
                                Path(temporary).write_text(json.dumps(scores, indent=0))
                        found[line] = scores[key]
                    best[steps] = min(found, key=lambda line: found[line])
                    told = f"{task:12} {method:13} {steps:3} {best[steps]:48}"
                    print(f"{told} {found[best[steps]]:.4f} .. {max(found.values()):.4f}", file=sys.stderr, flush=True)
                words = f"{at} " * (kind == "ot") + " ".join(sampler)
                few, many = best[min(best)], best[max(best)]
                nfe = "*nfe" if few == many else f'{{<<: *nfe, NFE 100: {{set: "sampler.steps=100 {many}"}}}}'
                rows.append(f'      {method}: {{set: "{words} {few}", rows: {nfe}}}')
    print("\n".join(rows))


def score(cfg: DictConfig, checkpoint: Checkpoint, line: str, images: ImageFiles, lpips: DigitsDistance) -> float:
    """Mean lpips_digits of restored images; inf of a setting that diverges."""
    changed: Any = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    for word in line.split():
        key, value = word.split("=")
        OmegaConf.update(changed, key, yaml.safe_load(value))
    operator = instantiate(cfg.task.operator, shape=checkpoint.shape)
    run = Restoration(
        sampler_on(changed.sampler, checkpoint), Measurements(images, operator, cfg.task.sigma_y, cfg.seed)
    )
    label = torch.full((len(images),), checkpoint.num_classes)  # the null label
    noise = NoiseSource(cfg.seed, torch.from_numpy(images.index), checkpoint.shape)
    try:
        x = run(checkpoint.denoiser.requires_grad_(False), noise, label=label)
    except FloatingPointError:
        return float("inf")
    return lpips.compare(to_uint8(x), images.read(images.index)).mean().item()


if __name__ == "__main__":
    main()
