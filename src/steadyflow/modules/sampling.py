"""Sampling under Lightning's Trainer: which samples a process makes, and how a batch of them is made."""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor

from steadyflow.data.batches import philox
from steadyflow.data.images import to_uint8
from steadyflow.denoisers import CountedDenoiser, Denoiser, NetworkClassifier, NoiseModel
from steadyflow.diffusions import LinearDiffusion
from steadyflow.guidance import Classifier, ClassifierFree
from steadyflow.noise import NoiseSource
from steadyflow.samplers.sampler import Progress, Sampler

# Top counter words, beyond the streams of training (data/batches.py); the steps of sampling have 0.
# Of random labels, the noise of measurements, uniform dequantisation, and the random signs of a trace.
LABELS, MEASUREMENT, DEQUANTISATION, SIGNS = (2**33 + i for i in range(4))


class Indices(NamedTuple):
    """What a batch is made from: the samples' numbers (B,) int64 and their classes (B,) int64, or None."""

    indices: Tensor
    label: Tensor | None


class Samples(NamedTuple):
    """A finished batch on the CPU: numbers (B,), classes (B,) or None, and x (B, C, H, W) uint8 or (B, D) float32."""

    indices: Tensor
    label: Tensor | None
    x: Tensor


def class_labels(mode: str | int | None, index: Tensor, num_classes: int, seed: int) -> Tensor | None:
    """The class of each sample, a function of (seed, index) alone: (B,) int64, or None where there are no classes.

    Args:
        mode: `balanced` (index mod num_classes), `random` (uniform), a class, None (no condition: the null label
            num_classes), or `auto`: balanced where the checkpoint has classes.
        index: (B,) the samples' numbers.
        num_classes: of the checkpoint, 0 for none.
        seed: of the run.

    Raises:
        ValueError: an unknown mode, a class out of range, or any condition on a checkpoint without classes.
    """
    named = ("auto", "balanced", "random", None)
    if mode not in named and not (isinstance(mode, int) and not isinstance(mode, bool) and mode >= 0):
        raise ValueError(f"label must be auto, balanced, random, null or a class number; got {mode!r}")
    if num_classes == 0:
        if mode not in ("auto", None):
            raise ValueError(f"label={mode}, but this checkpoint has no classes; set label=null")
        return None
    if mode in ("auto", "balanced"):
        return index % num_classes
    if mode == "random":
        return torch.tensor([int(philox(seed, int(i), LABELS).integers(num_classes)) for i in index], dtype=torch.int64)
    if isinstance(mode, int) and mode >= num_classes:
        raise ValueError(f"label={mode}, but this checkpoint's classes are 0..{num_classes - 1}")
    return torch.full_like(index, num_classes if mode is None else int(mode))


def guided(denoiser: CountedDenoiser, scale: float, label: Tensor | None, num_classes: int) -> Denoiser:
    """The denoiser under classifier-free guidance of a scale; scale 1 is the denoiser itself.

    Raises:
        ValueError: guidance without classes to guide to.
    """
    if scale == 1:
        return denoiser
    if label is None or bool((label == num_classes).any()):
        raise ValueError(
            f"guidance_scale={scale} guides towards a class, and there is none; choose a class or classes (label=) on "
            "a checkpoint that has them, or guidance_scale=1"
        )
    return ClassifierFree(denoiser, scale, num_classes)


class IndexBatches:
    """This process's share of the samples still to make: batches j = rank, rank + world, ... of `batch_size` of them.

    Never empty: a process without a share gets one batch of no samples, so that the hooks at the end, where processes
    wait for each other, run everywhere.
    """

    def __init__(self, index: Tensor, label: Tensor | None, batch_size: int, rank: int = 0, world: int = 1):
        starts = range(rank * batch_size, max(len(index), 1), world * batch_size)
        rows = [slice(start, start + batch_size) for start in starts] or [slice(0, 0)]
        self.batches = [Indices(index[r], None if label is None else label[r]) for r in rows]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Indices]:
        return iter(self.batches)


class Sampling(L.LightningModule):
    """Sample i of a run, a function of (seed, i, its label) alone:

        x_i = sampler(denoiser, z_i, label_i),  z_i(step) = Philox(key = (seed, i), counter = step)

    so the same samples come out, up to the rounding of the network, for any batch size, number of processes or order
    of work.

    Args:
        denoiser: of the checkpoint, or its noise model.
        sampler: turns noise into samples. Its state is float32 (float64 for a float64 network) in any precision of the
            trainer: autocast and half precision reach the network alone.
        shape: S of one sample: (C, H, W) or (D,).
        seed: >= 0.
        index: (N,) int64, the numbers of the samples to make, over all processes.
        label: (N,) their classes, or None.
        batch_size: samples a process makes at a time.
        guidance_scale: w of classifier-free guidance; 1 is the conditional denoiser itself.
        num_classes: of the checkpoint; the null label of the guidance.
        classifier: log p(label | x), whose gradient guides the samples to their labels, times `classifier_scale`.

    Where the sampler shares the work on each sample (`shard`), every process makes all samples, and the first has them.

    Attributes: `denoiser.rows`, the network evaluations so far; `made`, the samples so far; `iterations`, their
    parallel iterations, of a sampler that has them; `seconds` and `timed`, the time spent and the samples made in it,
    warm-up left out; `progress`, called with the fraction of the batch done.

    Raises:
        ValueError: batch_size < 1, a negative seed, or guidance without classes to guide to.
        FloatingPointError: from the sampler, naming the samples and the step.
    """

    def __init__(
        self,
        denoiser: Denoiser | NoiseModel,
        sampler: Sampler,
        shape: Sequence[int],
        seed: int,
        index: Tensor,
        label: Tensor | None = None,
        *,
        batch_size: int,
        guidance_scale: float = 1.0,
        num_classes: int = 0,
        classifier: NetworkClassifier | None = None,
        classifier_scale: float = 1.0,
    ):
        super().__init__()
        NoiseSource(seed, index[:1], shape)  # raises for a seed that cannot be
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.denoiser, self.path = CountedDenoiser(denoiser), getattr(denoiser, "path", None)
        self.guided = guided(self.denoiser, guidance_scale, label, num_classes)
        if classifier is not None:
            if label is None or isinstance(self.path, LinearDiffusion):
                raise ValueError("a classifier guides a denoiser towards labels: choose a class or classes (label=)")
            self.guided = Classifier(self.guided, classifier.eval(), classifier_scale, conditional=num_classes > 0)
        self.sampler, self.shape, self.seed = sampler, tuple(shape), int(seed)
        self.index, self.label, self.batch_size = index, label, int(batch_size)
        self.progress: Progress | None = None
        self.made, self.timed, self.seconds, self.iterations = 0, 0, 0.0, 0

    def skip(self, finished: Tensor) -> None:
        """Leaves out the samples of these numbers."""
        missing = ~torch.isin(self.index, finished)
        self.index, self.label = self.index[missing], None if self.label is None else self.label[missing]

    def predict_dataloader(self) -> IndexBatches:
        rank, world = (0, 1) if self.sampler.shard else (self.trainer.global_rank, self.trainer.world_size)
        return IndexBatches(self.index, self.label, self.batch_size, rank, world)

    def predict_step(self, batch: Indices, batch_idx: int) -> Samples:
        """Makes the samples of one batch."""
        index, label = (None if v is None else v.cpu() for v in batch)
        assert index is not None
        if len(index) == 0:
            return Samples(index, label, torch.empty(0, *self.shape))
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        noise = NoiseSource(self.seed, index, self.shape, self.device, dtype)
        condition = {} if batch.label is None else {"label": batch.label}
        warm = self._warm_up(noise, condition, batch_idx)
        start = time.perf_counter()
        try:
            x = self.sampler(self.guided, noise, progress=self.progress, **condition)
        except FloatingPointError as error:
            raise FloatingPointError(f"samples {index.min()} to {index.max()}: {error}") from None
        x = (to_uint8(x) if len(self.shape) == 3 else x.float()).cpu()  # waits for the device
        self.seconds += (time.perf_counter() - start) if warm else 0.0
        if self.sampler.shard and self.trainer.global_rank > 0:  # the first process has this sample as well
            return Samples(index[:0], None if label is None else label[:0], x[:0])
        self.made, self.timed = self.made + len(index), self.timed + (len(index) if warm else 0)
        if self.sampler.iterations is not None:
            self.iterations += int(self.sampler.iterations.sum())
        return Samples(index, label, x)

    def _warm_up(self, noise: NoiseSource, condition: dict[str, Tensor], batch_idx: int) -> bool:
        """Whether this batch is to be timed: any but the first; a first with no other whole batch after a warm-up."""
        world = 1 if self.sampler.shard else self.trainer.world_size
        full = min(self.index.numel() // (self.batch_size * world), 2)
        if batch_idx > 0 or full > 1:
            return batch_idx > 0
        rows, path = self.denoiser.rows, self.path
        half, end = torch.tensor([0.5, 1.0], dtype=torch.float64)
        with torch.no_grad():
            if isinstance(path, LinearDiffusion):
                self.guided(path.lift(noise(0)), half, **condition)
            else:
                at = (half, half) if path is None else path(end)  # noise, where every network is at home
                self.guided(at[1].to(noise(0)) * noise(0), *at, **condition)
        self.denoiser.rows = rows
        return True
