"""Which images a job is about, and their classes."""

from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from steadyflow.data import ImageFiles, open_images
from steadyflow.data.image_files import DatasetPart


def chosen_images(cfg: DictConfig, dataset: Any) -> tuple[ImageFiles, str]:
    """`num_images` images from the `first`-th on, none of them read yet, and where they are from.

    Args:
        cfg: `images` (folder, zip, npz or run, in the order of their numbers; None: the dataset's), first, num_images.
        dataset: of images; its item i is image i.

    Raises:
        ValueError: fewer images than asked for, or a dataset of vectors.
        FileNotFoundError: no images there.
    """
    first, count = cfg.first, cfg.num_images
    if not (isinstance(count, int) and count >= 1 and isinstance(first, int) and first >= 0):
        raise ValueError(f"need num_images >= 1 and first >= 0, got {count} and {first}")
    files = None if cfg.images is None else open_images(cfg.images)
    source = f"{dataset.name} {dataset.split}" if files is None else str(cfg.images)
    there = len(dataset if files is None else files)
    if first + count > there:
        raise ValueError(
            f"{source} has {there} images, too few for {first} to {first + count - 1}; set num_images, first"
        )
    if files is None:
        return ImageFiles([DatasetPart(dataset, np.arange(first, first + count))]), source
    return files.only(np.sort(files.index)[first : first + count]), source


def condition_labels(mode: str | int | None, own: Tensor | None, count: int, num_classes: int) -> Tensor | None:
    """The class each image is conditioned on, (N,) int64; None where the checkpoint has no classes.

    Args:
        mode: auto (its own, or the null label where it has none), a class, or None (the null label num_classes).
        own: the images' own classes.
        count: N.
        num_classes: of the checkpoint.

    Raises:
        ValueError: an unknown mode, or a class out of range.
    """
    if mode not in ("auto", None) and not (isinstance(mode, int) and not isinstance(mode, bool) and mode >= 0):
        raise ValueError(f"label must be auto, null or a class number; got {mode!r}")
    if num_classes == 0:
        if isinstance(mode, int):
            raise ValueError(f"label={mode}, but this checkpoint has no classes; set label=null")
        return None
    label = torch.full((count,), num_classes if isinstance(mode, str | None) else mode)
    label = own if mode == "auto" and own is not None else label
    if (label > num_classes).any() or (isinstance(mode, int) and mode == num_classes):
        raise ValueError(f"class {int(label.max())}, but this checkpoint's classes are 0..{num_classes - 1}")
    return label
