"""Training a network denoiser: one LightningModule for any (path, prediction, loss weight), and its batches."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from steadyflow.data.batches import Batch, HeldOutBatches, TrainingBatches
from steadyflow.modules.losses import Times, Trainable, Weight, denoising_loss
from steadyflow.paths import GaussianPath


class DenoiserTraining(L.LightningModule):
    """Minimises E_t E_{x0, eps} w(t) |network(x_t, t, label) - target(x0, eps, t)|^2.

    All randomness comes with the batch, so the module draws none; torch's generator, which dropout layers use, is
    seeded by (seed, micro-step, process) at every step.

    Logs `train/loss` at each step and `val/loss`, of the averaged weights where there is an averaging callback.

    Args:
        denoiser: the network in its wrapper, with the path it is trained on.
        times: how t is drawn. weight: of the loss.
        optimizer: called with the parameters.
        schedule: factor of the learning rate at an optimiser step 0, 1, ...; None keeps it constant.
        num_classes: classes the network is conditioned on, 0 for none; num_classes itself is the null label.
        label_dropout: probability that a label becomes the null label, for classifier-free guidance.
        seed: of the dropout layers.
        channels_last: memory format of image batches (the network is to be converted by the caller).

    Raises:
        FloatingPointError: when a loss is not finite; names the step.
        ValueError: settings out of range, or a precision that would round the times.
    """

    def __init__(
        self,
        denoiser: Trainable,
        times: Times,
        weight: Weight,
        optimizer: Callable[[Iterator[nn.Parameter]], Optimizer],
        schedule: Callable[[int], float] | None = None,
        *,
        num_classes: int = 0,
        label_dropout: float = 0.0,
        seed: int = 0,
        channels_last: bool = False,
    ):
        super().__init__()
        if not 0 <= label_dropout <= 1:
            raise ValueError(f"label_dropout is a probability, got {label_dropout}")
        if label_dropout and not num_classes:
            raise ValueError(f"label_dropout {label_dropout} needs a class-conditional network; set label_dropout=0")
        self.denoiser, self.times, self.weight = denoiser, times, weight
        self.optimizer, self.schedule = optimizer, schedule
        self.num_classes, self.label_dropout = num_classes, label_dropout
        self.seed, self.channels_last = seed, channels_last
        self._losses: list[tuple[int, Tensor]] = []  # not yet looked at; a look waits for the device

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        key = np.random.SeedSequence([self.seed, batch.step, self.global_rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(key[0] >> np.uint64(1)))
        loss = self._loss(batch)
        self._losses.append((self.global_step + 1, loss.detach()))
        if loss.device.type == "cpu" or len(self._losses) >= 50:
            self.check_finite()
        self.log("train/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch.x0))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", self._loss(batch), prog_bar=True, sync_dist=True, batch_size=len(batch.x0))

    def _loss(self, batch: Batch) -> Tensor:
        if batch.u.dtype != torch.float64:
            raise ValueError(
                f"the trainer's precision rounds training times to {batch.u.dtype}; set trainer.precision to "
                "bf16-mixed, 16-mixed, 32-true or 64-true"
            )
        x0 = batch.x0.contiguous(memory_format=torch.channels_last) if self.channels_last else batch.x0
        condition = {}
        if self.num_classes:
            condition["label"] = torch.where(batch.drop < self.label_dropout, self.num_classes, batch.label)
        t = self.times(
            cast(GaussianPath, self.denoiser.path), batch.u
        )  # a linear diffusion refuses rules in sigma / alpha
        return denoising_loss(self.denoiser, x0, batch.eps, t, self.weight, **condition).mean()

    def check_finite(self) -> None:
        """Looks at the losses since the last look.

        Raises:
            FloatingPointError: names the first step whose loss is not finite.
        """
        losses, self._losses = self._losses, []
        for (step, _), finite in zip(losses, torch.stack([v for _, v in losses]).isfinite().tolist() if losses else ()):
            if not finite:
                raise FloatingPointError(
                    f"the training loss is not finite at step {step}; lower the learning rate, clip gradients or train "
                    "in higher precision, and resume from the last checkpoint, which is from before"
                )

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.denoiser.network.parameters())
        if self.schedule is None:
            return optimizer
        scheduler = LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class TrainingData(L.LightningDataModule):
    """The batches of a run for DenoiserTraining; see TrainingBatches.

    Without `held_out` there is no validation: the trainer takes limit_val_batches=0.
    """

    def __init__(
        self,
        train: Dataset[tuple[Tensor, int]],
        held_out: Dataset[tuple[Tensor, int]] | None = None,
        *,
        batch_size: int,
        steps: int,
        seed: int = 0,
        workers: int = 0,
        flip: bool = False,
        variables: int = 1,
    ):
        super().__init__()
        self.variables = variables
        self.train, self.held_out, self.batch_size, self.steps = train, held_out, batch_size, steps
        self.seed, self.workers, self.flip = seed, workers, flip

    def train_dataloader(self) -> TrainingBatches:
        trainer = self.trainer
        assert trainer is not None
        return TrainingBatches(
            self.train,
            self.batch_size,
            self.steps,
            self.seed,
            accumulate=trainer.accumulate_grad_batches,
            rank=trainer.global_rank,
            world=trainer.world_size,
            workers=self.workers,
            flip=self.flip,
            variables=self.variables,
            pin=trainer.strategy.root_device.type == "cuda",
        )

    def val_dataloader(self) -> HeldOutBatches:
        trainer = self.trainer
        assert trainer is not None
        assert self.held_out is not None
        size = max(1, self.batch_size // (trainer.world_size * trainer.accumulate_grad_batches))
        rank, world = trainer.global_rank, trainer.world_size
        return HeldOutBatches(self.held_out, size, self.seed, rank=rank, world=world, variables=self.variables)


def learning_rate(steps: int, warm: int = 0, decay: str | None = None) -> Callable[[int], float]:
    """The factor of the learning rate: linear over the first `warm` steps, then constant or a half cosine to 0.

    Args:
        steps: of the run. warm: steps until the full rate. decay: None or "cosine".
    """
    if decay not in (None, "cosine"):
        raise ValueError(f"lr_decay must be null or cosine, got {decay!r}")
    if not 0 <= warm <= steps:
        raise ValueError(f"need 0 <= warmup <= max_steps, got {warm} and {steps}")
    return partial(_factor, steps, warm, decay)


def _factor(steps: int, warm: int, decay: str | None, step: int) -> float:
    if step < warm:
        return (step + 1) / (warm + 1)
    return 1.0 if decay is None else 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm))))


class EMA:
    """avg <- avg + (1 - d) (weights - avg),  d = min(decay, (1 + n) / (10 + n)) after n updates.

    The `multi_avg_fn` of Lightning's WeightAveraging; the warm-up of d forgets the initial weights.
    """

    def __init__(self, decay: float = 0.999):
        if not 0 <= decay < 1:
            raise ValueError(f"need 0 <= decay < 1, got {decay}")
        self.decay = float(decay)

    @torch.no_grad()
    def __call__(self, averaged: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
        n = int(updates)
        torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + n) / (10 + n)))
