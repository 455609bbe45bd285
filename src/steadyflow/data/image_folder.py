"""A folder or zip of images of any size as a dataset."""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from steadyflow.data.archive import ImageArchive
from steadyflow.data.image_writing import whole_file
from steadyflow.data.images import SPLITS, check_split, from_uint8

KERNELS = ("bicubic", "bilinear", "lanczos", "box", "nearest")


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """The images (png, jpg, webp, bmp) of a folder or zip, brought to one size; decoded as they are asked for.

    Item i is (x (channels, size, size) float32 in [-1, 1], label): the shorter side is resized to `size`, antialiased
    when shrinking, and the centre is cut out. Orientation tags in a photograph's metadata are not applied.

    Splits. If `path` holds `train` or `test` (folders, or train.zip and test.zip), these are the splits. Else the
    `held_out` images whose names have the smallest sha256 are `test` and the others `train`.

    Args:
        path: the folder or zip.
        split: train or test.
        size: of an item's side, in pixels.
        resize: the kernel, bicubic, bilinear, lanczos, box or nearest; None cuts the centre out of the image as it is.
        channels: 3 (RGB), or 1 (grey, by luma).
        class_folders: the folder an image lies in is its class (sorted by name); otherwise the set is unlabelled.
        held_out: how many images to hold out as `test`, where the path brings no splits of its own.
        in_memory: decode everything now and keep it as `images`, (N, C, size, size) uint8.
        name: of the set.
        cache_dir: where the hash of the content is kept, so that an unchanged folder is hashed once.

    Attributes: `name`, `split`, `shape`, `num_classes`, `classes` (names), `labels` (N,) int64, `names` (of the files),
    `images` with in_memory, and `fingerprint`: the sha256 of the files' names and bytes and of the settings above. The
    hash of the bytes is kept in cache_dir under the path, names, sizes and modification times of the files; a file
    changed without a trace in these is not noticed until the cache is removed.

    Raises:
        FileNotFoundError: nothing at path, no image in it, no such split.
        ValueError: settings out of range; a file that is no 8-bit image, by name, when it is read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str = "train",
        size: int = 32,
        resize: str | None = "bicubic",
        channels: int = 3,
        class_folders: bool = False,
        held_out: int = 0,
        in_memory: bool = False,
        name: str = "image_folder",
        cache_dir: str | os.PathLike[str] = "~/.cache/steadyflow",
    ):
        if size < 1 or channels not in (1, 3) or held_out < 0 or resize not in (None, *KERNELS):
            raise ValueError(
                f"need size >= 1, channels 1 or 3, held_out >= 0 and resize {', '.join(KERNELS)} or null; got "
                f"{size}, {channels}, {held_out} and {resize}"
            )
        self.name, self.split, self.shape, self.resize = name, check_split(split), (channels, size, size), resize
        self.cache_dir = Path(cache_dir).expanduser()
        path = Path(path).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"no folder or zip of images at {path}; say where it is with dataset.path=PATH")
        places = {s: place for s in SPLITS for place in (path / s, path / f"{s}.zip") if place.exists()}
        if places and split not in places:
            raise FileNotFoundError(f"{path} has a split {next(iter(places))} and no {split} (a folder or {split}.zip)")
        if places:
            archives = {s: ImageArchive(place) for s, place in places.items()}
            self.archive, self.index = archives[split], np.arange(len(archives[split]))
            known = [name for archive in archives.values() for name in archive.names]
        else:
            self.archive = ImageArchive(path)
            self.index, known = self._part(self.archive.names, held_out), self.archive.names
        self.names = [self.archive.names[i] for i in self.index]
        self.classes = sorted({_class(name) for name in known}) if class_folders else []
        if "" in self.classes:
            stray = next(name for name in known if not _class(name))
            raise ValueError(f"{stray} in {path} lies in no class folder; set dataset.class_folders=false")
        self.num_classes = len(self.classes)
        number = {name: k for k, name in enumerate(self.classes)}
        self.labels = torch.tensor([number.get(_class(name), 0) for name in self.names])
        if in_memory:
            self.images = torch.stack([self._pixels(i) for i in range(len(self))])

    def _part(self, names: list[str], held_out: int) -> np.ndarray:
        order = np.argsort([hashlib.sha256(name.encode()).hexdigest() for name in names])
        part = np.sort(order[held_out:] if self.split == "train" else order[:held_out])
        if len(part) == 0:
            raise FileNotFoundError(
                f"split {self.split} is empty: {len(names)} images, {held_out} of them held out; set dataset.held_out=N"
            )
        return part

    def _pixels(self, i: int) -> Tensor:
        """Image i, (C, size, size) uint8."""
        row, (channels, size, _) = int(self.index[i]), self.shape
        image = self.archive.image(row, channels)
        if self.resize is not None:
            width, height = (int(size * side / min(image.size)) for side in image.size)
            image = image.resize((width, height), Image.Resampling[self.resize.upper()])
        elif min(image.size) < size:
            raise ValueError(
                f"{self.archive.where(row)} is {image.width}x{image.height}, smaller than {size}; set dataset.resize"
            )
        left, top = (round((side - size) / 2) for side in image.size)
        pixels = np.array(image.crop((left, top, left + size, top + size)))
        return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1).contiguous()

    @cached_property
    def fingerprint(self) -> str:
        settings = [*self.shape, self.resize, self.names, self.classes]
        return hashlib.sha256(f"{self._content()} {json.dumps(settings)}".encode()).hexdigest()

    def _content(self) -> str:
        """The sha256 of the archive's names and bytes, from the cache where the archive is unchanged."""
        path = self.archive.path.resolve()
        files = [path] if self.archive.zipped else [path / name for name in self.archive.names]
        stats = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = hashlib.sha256(json.dumps([str(path), self.archive.names, stats]).encode()).hexdigest()
        cached = self.cache_dir / "fingerprints" / key
        if cached.is_file():
            return cached.read_text()
        digest = hashlib.sha256()
        for i, name in enumerate(self.archive.names):
            digest.update(f"{name}\n{hashlib.sha256(self.archive.read(i)).hexdigest()}\n".encode())
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(cached) as temporary:
                temporary.write_text(digest.hexdigest())
        except OSError:
            pass  # a cache that cannot be written only costs time
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.images[index] if hasattr(self, "images") else self._pixels(index)
        return from_uint8(pixels), int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """The items of a batch (the data loader calls this where it exists)."""
        return [self[i] for i in indices]


def _class(name: str) -> str:
    """The name of the folder a file lies in; empty at the top."""
    return name.split("/")[-2] if "/" in name else ""
