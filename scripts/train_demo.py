"""`make train-demo`: trains the two embedded checkpoints from scratch, scores them and writes them as they ship.

    python scripts/train_demo.py [--install]

Both runs go side by side (outputs/train/NAME), each with half of the cores; killed and started again, they go on where
they were. The result is outputs/train/NAME/embedded: half-precision weights and a card with the scores; --install
writes it into the package instead.
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
import yaml

from steadyflow import checkpoints, cli

ROOT = Path(__file__).parents[1]
NAMES = ("digits32", "digits32_ot")
SAMPLES = 1797
SCORES = ("fid", "fid_std", "accuracy", "memorisation", "memorisation_held_out")


def train() -> None:
    """Both runs at once; ends the script with the exit code of one that fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2))}
    runs = {}
    for name in NAMES:
        command = [sys.executable, "-m", "steadyflow", "train", f"+experiment=train_{name}"]
        command += [f"hydra.run.dir={ROOT / 'outputs' / 'train' / name}"]
        show = [] if name == NAMES[0] else ["+trainer.enable_progress_bar=false"]  # one bar tells of both
        runs[name] = subprocess.Popen(command + show, env=environment)
    for run in runs.values():
        if code := run.wait():
            sys.exit(code)


def job(*words: str) -> dict:
    """Runs a job of the command line and returns its metrics.json."""
    if code := cli.main([*words]):
        sys.exit(code)
    directory = next(word.split("=", 1)[1] for word in words if word.startswith("hydra.run.dir="))
    return json.loads((Path(directory) / "metrics.json").read_text())


def score(run: Path, model: Path) -> dict[str, float]:
    """Heun's 18 steps, 1797 images: against the training split, and against the 200 images never seen."""
    samples = run / "scored"
    callbacks = "callbacks=[default,accuracy,memorisation]"
    amount = [f"num_samples={SAMPLES}", "batch_size=128"]
    seen = job(
        "sample",
        "checkpoint=path",
        f"checkpoint.file={model}",
        "sampler=heun",
        *amount,
        callbacks,
        f"hydra.run.dir={samples}",
    )
    unseen = job("evaluate", f"images={samples}", "reference=test", f"hydra.run.dir={run / 'scored_held_out'}")
    found = {f"{name} (train split)" if name.startswith("fid") else name: seen[name] for name in SCORES}
    found |= {f"{name} (held out)": unseen[name] for name in ("kid", "kid_std")}
    return {f"heun-18, {SAMPLES} images: {name}": round(value, 5) for name, value in found.items()}


def main() -> None:
    train()
    for name in NAMES:
        run = ROOT / "outputs" / "train" / name
        checkpoint = checkpoints.load(run)
        config = yaml.safe_load((run / "model" / "config.yaml").read_text())
        nodes = {key: config[key] for key in ("network", "path", "denoiser")}
        package = ROOT / "src" / "steadyflow" / "checkpoints" / name
        target = package if "--install" in sys.argv[1:] else run / "embedded"
        what = target, checkpoint.denoiser, nodes, checkpoint.shape, checkpoint.num_classes
        save = partial(checkpoints.save, *what, dtype=torch.float16)
        save(checkpoint.card)
        metrics = checkpoint.card["metrics"] | score(run, target)
        save(checkpoint.card | {"metrics": metrics})
        print(f"{target}: {json.dumps(metrics)}")


if __name__ == "__main__":
    main()
