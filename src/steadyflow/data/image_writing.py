"""Images to disk: shards of a run's samples and the picture of a grid; each file appears whole or not at all."""

import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A hidden temporary name beside `path`, to write to; renamed to `path` if the block ends without an exception."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(directory: Path, index: Tensor, images: Tensor, label: Tensor | None = None) -> Path:
    """Writes images as DIRECTORY/<first index, 8 digits>.npz with `images` uint8 (n, H, W, C) and `index` int64 (n,).

    With labels also `label` int64 (n,). The same images give the same bytes.

    Args:
        directory: made where it is missing.
        index: (n,) whole numbers >= 0, n >= 1: the number of each image.
        images: (n, C, H, W) uint8, C = 1 or 3.
        label: (n,) the class of each image.

    Returns:
        the file's path.
    """
    index, images = _checked(index, images)
    labels = {} if label is None else {"label": label.cpu().long().numpy()}
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{int(index[0]):08d}.npz"
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, images=images.numpy().transpose(0, 2, 3, 1), index=index.numpy(), allow_pickle=False, **labels)
    return path


def write_png_zip(directory: Path, index: Tensor, images: Tensor) -> Path:
    """As `write_shard`, a zip of png files named by their index: DIRECTORY/<first index>.zip of <index>.png."""
    index, images = _checked(index, images)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{int(index[0]):08d}.zip"
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as file:
        for i, image in zip(index.tolist(), images, strict=True):
            with file.open(zipfile.ZipInfo(f"{i:08d}.png"), "w") as member:  # ZipInfo: no time of day in the file
                pillow(image).save(member, format="PNG")
    return path


def save_grid(path: Path, images: Tensor, columns: int | None = None, margin: int = 2) -> None:
    """One png of images side by side, row by row.

    Args:
        path: of the png.
        images: (N, C, H, W) uint8, C = 1 or 3.
        columns: images in a row; by default the grid is as square as it can be.
        margin: dark pixels around each image.
    """
    _, images = _checked(None, images)
    n, channels, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    rows = math.ceil(n / columns)
    grid = images.new_zeros(channels, margin + rows * (height + margin), margin + columns * (width + margin))
    for i, image in enumerate(images):
        top, left = margin + i // columns * (height + margin), margin + i % columns * (width + margin)
        grid[:, top : top + height, left : left + width] = image
    with whole_file(path) as temporary:
        pillow(grid).save(temporary, format="PNG")


def pillow(image: Tensor) -> Image.Image:
    """A uint8 image (C, H, W), C = 1 or 3, as a Pillow image."""
    array = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def _checked(index: Tensor | None, images: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the CPU, the index int64."""
    index = images.new_zeros(len(images)) if index is None else index
    good = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] in (1, 3) and len(images) > 0
    if not good or index.shape != images.shape[:1]:
        raise ValueError(
            f"need images uint8 (n, 1 or 3, H, W) with n >= 1 and an index (n,); got {images.dtype} "
            f"{tuple(images.shape)} and {tuple(index.shape)}"
        )
    return index.cpu().long(), images.cpu()
