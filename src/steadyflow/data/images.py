"""uint8 images and the float images networks see, and image sets that fit in memory."""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "test")


def from_uint8(images: Tensor) -> Tensor:
    """x = u / 127.5 - 1: uint8 of any shape to float32 in [-1, 1]."""
    return images.to(torch.float32, copy=True).div_(127.5).sub_(1)


def unpacked(images: Tensor) -> list[Tensor]:
    """Each image of a batch, (n, C, H, W) uint8, by `from_uint8`; converted a quarter of a megabyte at a time.

    A large block of memory comes fresh from the system, page by page, which takes longer than filling it.
    """
    parts = images.split(max(1, 2**16 // max(1, images[:1].numel())))
    return [x for part in parts for x in from_uint8(part).unbind()]


def to_uint8(x: Tensor) -> Tensor:
    """u = round((clamp(x, -1, 1) + 1) 127.5): floats of any shape to uint8, computed in at least float32."""
    x = x if x.dtype == torch.float64 else x.to(torch.float32)
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def check_split(split: str) -> str:
    """`split` itself, or a ValueError that names the two there are."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    return split


def nothing(split: str = "train") -> NoReturn:
    """No dataset: a FileNotFoundError where one is read."""
    raise FileNotFoundError("dataset=none has no images; choose a dataset, or a file of images or statistics instead")


def sha256_of(path: Path) -> str:
    """The sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_below(folder: Path) -> list[str]:
    """The files below a folder by their path inside it, with forward slashes.

    Folders behind links are read too (a subset of a large set is often made of them), but for those that lie above.
    """
    names = []
    for place, inside, files in os.walk(folder, followlinks=True):
        here = Path(place)
        if any((here / name).is_symlink() for name in inside):
            above = {parent.resolve() for parent in (here.absolute(), *here.absolute().parents)}
            inside[:] = [name for name in inside if (here / name).resolve() not in above]
        names += [(here.relative_to(folder) / name).as_posix() for name in files]
    return names


def content_of(path: Path) -> str:
    """sha256 of a file, or over the names and contents of the files of a folder."""
    if path.is_file():
        return sha256_of(path)
    digest = hashlib.sha256()
    for name in sorted(files_below(path), key=Path):
        digest.update(f"{name} {sha256_of(path / name)}\n".encode())
    return digest.hexdigest()


def content_hash(*arrays: Tensor) -> str:
    """sha256 over the dtype, shape and bytes of each array, in order: the fingerprint of a set in memory."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {tuple(array.shape)}\n".encode())
        digest.update(array.contiguous().numpy().data)
    return digest.hexdigest()


class InMemoryImages(Dataset[tuple[Tensor, int]]):
    """Images held as uint8. Item i is (x (C, H, W) float32 in [-1, 1], label).

    Args:
        name: of the set, as in its config.
        split: train or test.
        images: (N, C, H, W) uint8.
        labels: (N,) class indices; None for an unlabelled set, whose items carry label 0.
        num_classes: 0 for an unlabelled set.

    Attributes: `name`, `split`, `images`, `labels` (int64), `num_classes`, `shape` = (C, H, W), and `fingerprint`, the
    sha256 of images and labels.
    """

    def __init__(
        self,
        name: str,
        split: str,
        images: Tensor,
        labels: Tensor | None = None,
        num_classes: int = 0,
    ):
        self.name, self.split, self.images, self.num_classes = (
            name,
            check_split(split),
            images,
            num_classes,
        )
        self.labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels.to(torch.int64)
        self.shape = tuple(images.shape[1:])
        if images.dtype != torch.uint8 or images.ndim != 4 or len(self.labels) != len(images):
            raise ValueError(
                f"{name}: need uint8 images (N, C, H, W) and N labels; got {images.dtype} {tuple(images.shape)} and "
                f"{len(self.labels)} labels"
            )

    @cached_property
    def fingerprint(self) -> str:
        return content_hash(self.images, self.labels)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return from_uint8(self.images[index]), int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """The items of a batch (the data loader calls this where it exists)."""
        at = torch.as_tensor(indices)
        return list(zip(unpacked(self.images[at]), self.labels[at].tolist(), strict=True))
