"""The one checkpoint a killed or interrupted training run continues from."""

import os
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from steadyflow.modules.training import DenoiserTraining


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, written to a temporary name in the same folder, then renamed: whole or absent."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")  # one name: what a killed run left is overwritten
        with temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


class LastCheckpoint(Checkpoint):
    """Saves the run to one file every `every` optimiser steps, at the last step, and when Ctrl-C asks to stop.

    Only between optimiser steps, and only after looking that the losses so far and the weights are finite, so the file
    is always one to continue from. The first Ctrl-C of a one-process run finishes the step, saves and stops
    (`interrupted` is then True); the second, or one in a distributed run, interrupts at once.

    Args:
        path: of the file. every: >= 1.

    Raises:
        FloatingPointError: in place of saving what is not finite.
    """

    def __init__(self, path: Path | str, every: int):
        if every < 1:
            raise ValueError(f"save_every must be at least 1 step, got {every}")
        self.path, self.every, self.interrupted = Path(path), every, False
        self._saved = -1
        self._handler: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved = trainer.global_step  # not known before, where the run is resumed
        # not before, either: Lightning notes all handlers in between, and puts them back at its end
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, *_: Any) -> None:
        self.interrupted = True
        self._restore()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._saved:  # within an accumulation, or just resumed
            return
        if step % self.every and step != trainer.max_steps and not self.interrupted:
            return
        assert isinstance(pl_module, DenoiserTraining)
        pl_module.check_finite()
        total = torch.stack([p.detach().sum() for p in pl_module.parameters()]).sum()
        if not total.isfinite():
            raise FloatingPointError(f"the weights are not finite after step {step}; {self.path} is from before")
        trainer.save_checkpoint(self.path, weights_only=False)
        self._saved = step
        if self.interrupted:
            trainer.should_stop = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None
