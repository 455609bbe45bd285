"""Scores a set of images on disk by several metrics in one pass."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steadyflow.data import ImageFiles
from steadyflow.metrics.metric import EvaluationMetric, PerImageMetric
from steadyflow.metrics.reference import Sources

log = logging.getLogger(__name__)


class Evaluator:
    """Streams images through the extractor once and into every metric.

    A metric whose weights or data are not on this machine is None in the results, with the reason; the others are not
    affected. Every process of a distributed run streams its share of the images, the metrics synchronise their states,
    and each process gets the same results.

    Args:
        metrics: by any name.
        sources: what they compare with, and the extractor.
        batch_size: images at a time.
    """

    def __init__(self, metrics: Mapping[str, EvaluationMetric], sources: Sources, batch_size: int = 64):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.metrics, self.sources, self.batch_size = metrics, sources, batch_size
        self.reasons: dict[str, str] = {}  # of the metrics that cannot be had
        self._prepared = False
        self._scored: dict[str, EvaluationMetric] = {}

    def prepare(self) -> None:
        """Loads what the metrics compare with: weights, reference features (extracted where the cache lacks them).

        Raises:
            ValueError: a reference that does not fit the features.
        """
        if self._prepared:
            return
        for name, metric in self.metrics.items():
            try:
                metric.to("cpu" if self.sources.device.type == "mps" else self.sources.device)  # mps has no float64
                metric.prepare(self.sources)
            except FileNotFoundError as error:
                self.reasons[name] = str(error)
        self.reasons = agreed(self.reasons)
        warn(self.reasons)
        self._prepared = True

    @torch.no_grad()
    def score(
        self,
        images: ImageFiles,
        target: ImageFiles | None = None,
        ranks: tuple[int, int] = (0, 1),
        strict: bool = False,
    ) -> dict[str, Any]:
        """The numbers of all metrics, by their keys, with `protocol` (by key) and `reason` (of those that are None).

        Args:
            images: what to score.
            target: the other image of each pair, of the same index.
            ranks: (rank, world) of this process.
            strict: raise where a metric cannot use the images (too few, of another shape) instead of giving its reason.

        Raises:
            ValueError: target with another index or shape than images; with `strict`, see there.
        """
        self.prepare()
        check_pairs(images, target)
        reasons = dict(self.reasons)
        for name, metric in self.metrics.items():
            metric.reset()
            if "label" in metric.needs and images.label is None:
                reasons.setdefault(name, "the images carry no labels (a run's npz shards of a labelled checkpoint do)")
            if "target" in metric.needs and target is None:
                reasons.setdefault(name, "the images have no pairs to compare with; evaluate takes them as paired_with")
        active = {name: metric for name, metric in self.metrics.items() if name not in reasons}
        if extracted := [name for name, metric in active.items() if {"features", "probabilities"} & set(metric.needs)]:
            try:
                self.sources.extractor(next(images.batches(1))[1].to(self.sources.device))
            except ValueError as error:  # images that the features are not made for
                if strict:
                    raise
                for name in extracted:
                    reasons[name] = str(error)
                    del active[name]
        for batch in self._batches(
            images, target, ranks, {need for metric in active.values() for need in metric.needs}
        ):
            for name, metric in list(active.items()):
                with excused(name, reasons, active, strict):
                    metric.update(**{need: batch[need].to(metric.device) for need in metric.needs})
        active = {name: metric for name, metric in active.items() if name not in agreed(reasons)}
        values: dict[str, dict[str, Tensor]] = {}
        for name, metric in list(active.items()):
            with excused(name, reasons, active, strict):
                values[name] = metric.compute()
        self._scored = {name: metric for name, metric in active.items() if name in values}
        reasons = agreed(reasons)
        warn({name: reason for name, reason in reasons.items() if name not in self.reasons})
        return self._results(values, reasons, len(images))

    def per_image(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of the images scored last: their index (N,) and number (N,) by the key of each metric that has one an image.

        All processes of a distributed run call it together, and each gets all images.
        """
        found = {}
        for metric in self._scored.values():
            if isinstance(metric, PerImageMetric):
                with metric.sync_context():
                    index, rows = metric.per_image()
                    found[metric.keys[0]] = index.cpu(), rows.cpu()
        return found

    def _batches(
        self, images: ImageFiles, target: ImageFiles | None, ranks: tuple[int, int], needs: set[str]
    ) -> Iterator[dict[str, Tensor]]:
        """This process's batches, at least one (an empty one, so that every process joins the synchronisation)."""
        count = 0
        paired = target if "target" in needs else None
        for index, batch in images.batches(self.batch_size, ranks):
            count += 1
            yield self._tensors(index, batch, paired.read(index.numpy()) if paired else None, images, needs)
        if count == 0:
            index, batch = next(images.batches(1))
            full = self._tensors(index, batch, batch if paired else None, images, needs)
            yield {need: tensor[:0] for need, tensor in full.items()}

    def _tensors(
        self, index: Tensor, batch: Tensor, target: Tensor | None, images: ImageFiles, needs: set[str]
    ) -> dict[str, Tensor]:
        device = self.sources.device
        result = {"index": index, "images": batch}
        if target is not None:
            result["target"] = target
        if images.label is not None:
            order = np.argsort(images.index)
            rows = order[np.searchsorted(images.index, index.numpy(), sorter=order)]
            result["label"] = torch.from_numpy(images.label[rows])
        if needs & {"features", "probabilities"}:
            with torch.autocast(device.type, enabled=False):
                features, probabilities = self.sources.extractor(batch.to(device))
            result |= {"features": features.float()}
            if probabilities is not None:
                result |= {"probabilities": probabilities.float()}
        return result

    def _results(self, values: dict[str, dict[str, Tensor]], reasons: dict[str, str], count: int) -> dict[str, Any]:
        numbers: dict[str, float | None] = {}
        protocol: dict[str, dict[str, Any]] = {}
        why: dict[str, str] = {}
        for name, metric in self.metrics.items():
            found = {key: float(value) for key, value in values.get(name, {}).items()}
            for key in metric.keys:
                value = found.get(key)
                numbers[key] = value if value is None or math.isfinite(value) else None
                if name in reasons and key == metric.keys[0]:
                    why[key] = reasons[name]
                elif value is not None and not math.isfinite(value) and not key.endswith("_std"):
                    why[key] = f"{key} is {value}"
            if found:
                entry: dict[str, Any] = {"count": count}
                if set(metric.needs) & {"features", "probabilities"}:
                    extractor = self.sources.extractor
                    entry |= {
                        "features": extractor.name,
                        "features_sha256": extractor.sha256,
                        "resize": extractor.resize,
                    }
                protocol |= {key: entry | metric.protocol() for key in metric.keys if not key.endswith("_std")}
        return {**numbers, "protocol": protocol, "reason": why}


@contextmanager
def excused(name: str, reasons: dict[str, str], active: dict[str, EvaluationMetric], strict: bool) -> Iterator[None]:
    """Takes a metric that cannot use the images out of the evaluation, unless `strict`."""
    try:
        yield
    except ValueError as error:
        if strict:
            raise
        reasons[name] = str(error)
        del active[name]


def warn(reasons: dict[str, str]) -> None:
    """Logs why there are metrics that cannot be had, a line for each reason."""
    for line in grouped(reasons):
        log.warning("%s", line)


def grouped(reasons: dict[str, str]) -> list[str]:
    """`names: reason`, each reason once."""
    whose = {reason: [name for name, why in reasons.items() if why == reason] for reason in reasons.values()}
    return [f"{', '.join(names)}: {reason}" for reason, names in whose.items()]


def agreed(reasons: dict[str, str]) -> dict[str, str]:
    """The reasons of all processes together, so that all leave out the same metrics."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return reasons
    everywhere: list[dict[str, str]] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everywhere, reasons)
    return {name: reason for one in everywhere for name, reason in one.items()}


def check_pairs(images: ImageFiles, target: ImageFiles | None) -> None:
    """Raises ValueError unless target is None or holds an image of the same shape for each image, by index."""
    if target is None:
        return
    if images.shape != target.shape:
        raise ValueError(f"pairs of different sizes: images are {images.shape}, their pairs {target.shape} (C, H, W)")
    if len(images) != len(target):
        raise ValueError(f"{len(images)} images have {len(target)} pairs; pairs are matched by index, one to one")
    if len(lone := np.setdiff1d(images.index, target.index)):
        raise ValueError(
            f"images and pairs are numbered differently: no pair is numbered {lone[0]}, as an image is; name the files "
            "alike"
        )
