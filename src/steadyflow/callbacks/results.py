"""The end of a sampling run: the picture, metrics.json, and both in the logger."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from PIL import Image

from steadyflow.callbacks.samples import SampleFiles
from steadyflow.data.image_writing import whole_file
from steadyflow.modules.sampling import Sampling


class SampleResults(L.Callback):
    """Writes grid.png and metrics.json, and hands them to the loggers. Last in the list.

    metrics.json holds what the callbacks before it found in their `results` (metrics by name, `protocol`, `reason`) and

        nfe                network evaluations a sample, those of guidance counted
        seconds_per_image  processor (or card) seconds a sample: warm-up, writing and metrics left out
        parallel_iterations  sweeps a sample, of a sampler that works in parallel
        parameters         of the checkpoint's network

    of the samples this start has made; a start that makes none keeps those of the earlier one.

    Args:
        files: the run's samples.
        draw: draws the picture to a file; by default `files.draw`.
        protocol: what to say of the run itself, e.g. its sampler; goes to protocol.nfe and seconds_per_image.
    """

    def __init__(
        self,
        files: SampleFiles,
        draw: Callable[[Path], None] | None = None,
        protocol: dict[str, Any] | None = None,
    ):
        self.files, self.draw, self.protocol = files, draw or files.draw, protocol or {}
        self.results: dict[str, Any] = {}

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Sampling)
        own = [pl_module.denoiser.rows, pl_module.made, pl_module.seconds, pl_module.timed, pl_module.iterations]
        sums = torch.tensor(own, dtype=torch.float64, device=trainer.strategy.root_device)
        sums = trainer.strategy.reduce(sums, reduce_op="sum")
        if trainer.is_global_zero:
            self._write(trainer, pl_module, sums.tolist())

    def _write(self, trainer: L.Trainer, module: Sampling, sums: list[float]) -> None:
        rows, made, seconds, timed, sweeps = sums
        grid = self.files.directory / "grid.png"
        self.draw(grid)

        file = self.files.directory / "metrics.json"
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        found = [results for callback in others if (results := getattr(callback, "results", None))]
        if made:
            run = self.protocol | {"devices": trainer.world_size, "batch_size": module.batch_size}
            run, timing = run | {"count": int(made)}, run | {"count": int(timed)}
            own = {"nfe": rows / made, "seconds_per_image": seconds / timed if timed else None}
            own |= {"parallel_iterations": sweeps / made} if sweeps else {}
            if parameters := sum(p.numel() for p in module.denoiser.parameters()):
                own["parameters"] = parameters
            found.append(own | {"protocol": {k: timing if k == "seconds_per_image" else run for k in own}})
        elif file.exists():
            found.insert(0, json.loads(file.read_text()))
        self.results = merged(found)
        with whole_file(file) as temporary:
            temporary.write_text(json.dumps(self.results, indent=2) + "\n")
        log(trainer, {k: v for k, v in self.results.items() if isinstance(v, int | float)}, grid)


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One dict of several, later ones first; `protocol` and `reason` are joined, and stand last."""
    nested = ("protocol", "reason")
    flat = {k: v for part in parts for k, v in part.items() if k not in nested}
    return flat | {name: {k: v for part in parts for k, v in part.get(name, {}).items()} for name in nested}


def log(trainer: L.Trainer, metrics: dict[str, float], picture: Path) -> None:
    """The final metrics to every logger, the picture to those that take one."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics)
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image("samples", np.asarray(Image.open(picture).convert("RGB")), dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image("samples", [str(picture)])
        if isinstance(logger, CSVLogger):
            logger.save()


def close(loggers: list[Logger]) -> None:
    """Ends the runs of Weights & Biases: the next run in this process, a cell of a sweep, would join them."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()
