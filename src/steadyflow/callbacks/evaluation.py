"""Scores a run's samples at its end."""

import csv
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from steadyflow.callbacks.samples import SampleWriter
from steadyflow.data import ImageFiles, open_images
from steadyflow.data.image_writing import whole_file
from steadyflow.metrics import EvaluationMetric, Evaluator, FeatureExtractor, Sources
from steadyflow.metrics.reference import STATISTICS


class Evaluation(L.Callback):
    """Scores the images a run has written, all of them, as they are on disk: a resumed run scores the same files.

    Of metrics that give a number for each image, these go to per_image.csv in the run's directory.

    Each process of the run reads every world-th image; the numbers are the same on each. What metrics compare with is
    loaded before the first sample, so a mistake there costs no sampling.

    Args:
        metrics: by any name.
        features: makes the feature extractor.
        dataset: makes a split of the data set, called as dataset(split="train").
        reference: what features are compared with; see Sources.
        paired_with: the images to compare with one by one, matched by index, or their path.
        images: path of the images to score; by default the samples of the run.
        batch_size: images at a time.
        cache_dir: where features of references are kept; None keeps none.

    Attributes: `results` after predict: numbers by name, `protocol` by number, `reason` of each that is None.
    """

    def __init__(
        self,
        metrics: Mapping[str, EvaluationMetric],
        features: Callable[[], FeatureExtractor],
        dataset: Callable[..., Any],
        reference: str = "train",
        paired_with: ImageFiles | str | os.PathLike[str] | None = None,
        images: str | os.PathLike[str] | None = None,
        batch_size: int = 64,
        cache_dir: str | os.PathLike[str] | None = STATISTICS,
    ):
        self.metrics, self.features, self.dataset, self.reference = dict(metrics), features, dataset, reference
        self.paired_with, self.images = paired_with, images
        self.batch_size, self.cache_dir = batch_size, cache_dir
        self.results: dict[str, Any] = {}
        self._evaluator: Evaluator | None = None

    def evaluator(self, device: torch.device | str) -> Evaluator:
        """The metrics with what they compare with, on a device."""
        sources = Sources(self.features, self.dataset, self.reference, self.cache_dir, self.batch_size, device)
        return Evaluator(self.metrics, sources, self.batch_size)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if len(getattr(pl_module, "shape", (1, 1, 1))) == 3:
            self._evaluator = self.evaluator(trainer.strategy.root_device)
            self._evaluator.prepare()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._evaluator is None:  # the samples are vectors
            keys = [metric.keys for metric in self.metrics.values()]
            reason = "a metric of images, and the samples are vectors"
            self.results = {key: None for names in keys for key in names}
            self.results |= {"protocol": {}, "reason": {names[0]: reason for names in keys}}
            return
        trainer.strategy.barrier("evaluation")  # every process has written its samples
        writers = [callback for callback in trainer.callbacks if isinstance(callback, SampleWriter)]  # type: ignore[attr-defined]
        if not writers and self.images is None:
            raise ValueError("nothing to score: the run writes no samples; set `images` of the evaluation to a path")
        paired, ranks = self.paired_with, (trainer.global_rank, trainer.world_size)
        target = paired if paired is None or isinstance(paired, ImageFiles) else open_images(paired)
        self.results = self._evaluator.score(open_images(self.images or writers[0].files.folder), target, ranks)
        found = self._evaluator.per_image()
        if trainer.is_global_zero and writers and found:
            with whole_file(writers[0].files.directory / "per_image.csv") as temporary:
                write_per_image(temporary, found)


def write_per_image(file: Path, found: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """A line for each image: its index, then its number by each metric (of each: the index (N,), the numbers (N,))."""
    columns = {name: dict(zip(index.tolist(), rows.tolist(), strict=True)) for name, (index, rows) in found.items()}
    with file.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["index", *columns])
        for i in sorted(set().union(*columns.values())):
            writer.writerow([i, *(f"{of[i]:.8g}" for of in columns.values())])
