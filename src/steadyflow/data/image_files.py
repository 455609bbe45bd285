"""Images on disk - a run's samples, a folder, a zip, an npz - streamed in batches."""

import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from steadyflow.data.archive import UNREADABLE, ImageArchive
from steadyflow.data.images import to_uint8
from steadyflow.data.npz import Npz

Reader = Callable[[np.ndarray], np.ndarray]  # rows (n,) of a part to images (n, H, W, C) uint8
RUNS = ("samples", "restored")  # where the runs of a job keep their images


def open_images(path: str | os.PathLike[str]) -> "ImageFiles":
    """The images at a path, none of them read into memory yet.

    Args:
        path: the directory of a run (its `samples/` or `restored/` is read) or of its shards: npz files with arrays
            `images` uint8 (n, H, W, C) and `index` int64 (n,), or zips of png; one such npz, or one whose images are
            called `arr_0` (the batches of Dhariwal & Nichol 2021); a folder or a zip of images, searched recursively;
            one picture.

    Raises:
        FileNotFoundError: nothing there, or no image in it.
        ValueError: images of different sizes, more than 8 bits a channel, damaged files, one index twice; by name.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a run's directory, an npz, a folder or zip of images")
    if path.is_file():
        return ImageFiles([NpzPart(path) if path.suffix == ".npz" else ArchivePart(path)])
    path = next((path / name for name in RUNS if (path / name).is_dir()), path)
    npz, zips = sorted(path.glob("*.npz")), sorted(path.glob("*.zip"))
    if runs := sorted(path.glob("**/run.json")) if not npz and not zips and path.name not in RUNS else []:
        raise ValueError(f"{path} holds {len(runs)} runs; give one of them, such as {runs[-1].parent}")
    if npz and zips:
        raise ValueError(f"{path} holds npz and zip files ({npz[0].name}, {zips[0].name}); give one of them")
    if npz:
        return ImageFiles([NpzPart(file) for file in npz])
    return ImageFiles([ArchivePart(file) for file in zips or [path]])


class ImageFiles:
    """Images of one size on disk, in the order of their files.

    Attributes: `index` (N,) int64, each image's own number; `shape` (C, H, W); `label` (N,) int64, each image's class,
    or None unless every file says (`label` in an npz, `labels` of a zip's dataset.json).
    """

    def __init__(self, parts: "Sequence[Part]"):
        self.index = np.concatenate([part.index for part in parts])
        self.parts = [part for part in parts if len(part.index)]
        if not self.parts:
            raise FileNotFoundError(f"{parts[0].where} holds no image")
        first = self.parts[0]
        for part in self.parts:
            if part.size != first.size:
                raise ValueError(_sizes(first.where, first.size, part.where, part.size))
        values, counts = np.unique(self.index, return_counts=True)
        if len(values) < len(self.index):
            twice = values[counts.argmax()]
            files = [part.where for part in self.parts if twice in part.index]
            raise ValueError(f"image {twice} is there twice, in {files[0]} and {files[-1]}; remove one of them")
        labels = [part.label for part in self.parts if part.label is not None]
        self.label = np.concatenate(labels) if len(labels) == len(self.parts) else None
        self.channels = max(part.channels for part in self.parts)
        self.shape = (self.channels, *first.size)
        self._open: tuple[int, Reader] = (-1, lambda rows: rows)  # the part read last

    def __len__(self) -> int:
        return len(self.index)

    def batches(self, batch_size: int, ranks: tuple[int, int] = (0, 1)) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (index (B,) int64, images (B, C, H, W) uint8), B = batch_size but for the last.

        Args:
            batch_size: >= 1.
            ranks: (rank, world): every world-th image from the rank-th on, so that the ranks share the images out.
        """
        rank, world = ranks
        if batch_size < 1 or not 0 <= rank < world:
            raise ValueError(f"need batch_size >= 1 and 0 <= rank < world, got {batch_size} and {ranks}")
        index, images, first = np.empty(0, np.int64), np.empty((0, *self.shape[1:], self.channels), np.uint8), 0
        for part in self.parts:
            rows = np.arange((rank - first) % world, len(part.index), world)
            first += len(part.index)
            read = part.reader(self.channels)
            for start in range(0, len(rows), batch_size):
                chunk = rows[start : start + batch_size]
                index = np.concatenate([index, part.index[chunk]])
                images = np.concatenate([images, read(chunk)])
                if len(index) >= batch_size:
                    yield _tensors(index[:batch_size], images[:batch_size])
                    index, images = index[batch_size:], images[batch_size:]
        if len(index):
            yield _tensors(index, images)

    def read(self, index: np.ndarray | Tensor) -> Tensor:
        """The images of the numbers `index` (n,), in that order: (n, C, H, W) uint8.

        Raises:
            ValueError: a number that no image has.
        """
        return torch.from_numpy(self.pixels(np.asarray(index)).transpose(0, 3, 1, 2).copy())

    def pixels(self, index: np.ndarray) -> np.ndarray:
        """As `read`, (n, H, W, C)."""
        place, ends = self._places(index), np.cumsum([len(part.index) for part in self.parts])
        number = np.searchsorted(ends, place, side="right")
        images = np.empty((len(index), *self.shape[1:], self.channels), np.uint8)
        for n in np.unique(number):
            if n != self._open[0]:  # an npz is loaded whole: kept until another is needed
                self._open = (int(n), self.parts[n].reader(self.channels))
            rows = number == n
            images[rows] = self._open[1](place[rows] - (ends[n] - len(self.parts[n].index)))
        return images

    def only(self, index: np.ndarray) -> "ImageFiles":
        """The images of the numbers `index` alone, in that order; still none of them read."""
        return ImageFiles([ChosenPart(self, index, index)])

    def repeated(self, times: int) -> "ImageFiles":
        """Each image `times` times, image i under the numbers times i to times i + times - 1."""
        number = (self.index[:, None] * times + np.arange(times)).ravel()
        return ImageFiles([ChosenPart(self, number, number // times)])

    def _places(self, index: np.ndarray) -> np.ndarray:
        place = self._order[np.searchsorted(self.index, index, sorter=self._order).clip(max=len(self) - 1)]
        if (self.index[place] != index).any():
            raise ValueError(f"{self.parts[0].where} has no image {index[self.index[place] != index][0]}")
        return place

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.index)


class Part(Protocol):
    """One file or folder of images: its name for messages, its images' numbers, classes, size (H, W) and channels."""

    where: str
    index: np.ndarray
    label: np.ndarray | None
    size: tuple[int, int]
    channels: int

    def reader(self, channels: int) -> Reader: ...


class Items(Protocol):
    """What is asked of a dataset of images; item i is (x in [-1, 1] (C, H, W), label)."""

    name: str
    split: str
    shape: tuple[int, ...]
    num_classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class NpzPart:
    """An npz of images. Opening it reads the header and the index; a reader loads it whole."""

    def __init__(self, path: Path):
        self.where = str(path)
        try:
            with zipfile.ZipFile(path) as file, np.load(path) as arrays:
                self.key = next((key for key in ("images", "arr_0") if key in arrays.files), "")
                if not self.key:
                    raise ValueError(f"it has the arrays {', '.join(arrays.files)} and no `images`")
                with file.open(f"{self.key}.npy") as member:
                    shape, dtype = _npy_header(member)
                if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
                    raise ValueError(f"`{self.key}` is {dtype} {shape}")
                self.index = arrays["index"] if "index" in arrays.files else np.arange(shape[0])
                if self.index.shape != shape[:1] or self.index.dtype != np.int64:
                    raise ValueError(f"`index` is {self.index.dtype} {self.index.shape} for {shape[0]} images")
                self.label = arrays["label"].astype(np.int64) if "label" in arrays.files else None
                if self.label is not None and self.label.shape != shape[:1]:
                    raise ValueError(f"`label` is {self.label.shape} for {shape[0]} images")
        except (ValueError, *UNREADABLE) as error:
            raise ValueError(
                f"{path} cannot be read as images: {error}; expected an npz of `images` uint8 (n, H, W, 1 or 3) and "
                "`index` int64 (n,)"
            ) from None
        self.size, self.channels = (shape[1], shape[2]), shape[3]

    def reader(self, channels: int) -> Reader:
        if channels != self.channels:
            raise ValueError(f"{self.where} holds grey images and other shards of it colour images")
        with Npz(Path(self.where), "; remove it and make its images again") as arrays:
            return arrays[self.key].__getitem__


class ArchivePart:
    """A folder or zip of images. Opening it reads the header of every image; pixels are read as they are asked for.

    Images are numbered by their names where each is a whole number and none occurs twice (00000007.png is image 7),
    else by their place in the sorted list of names. They are read as RGB unless all are grey.
    """

    def __init__(self, path: Path):
        self.where = str(path)
        self.files = ImageArchive(path)
        headers = [self.files.header(i) for i in range(len(self.files))]
        self.size = headers[0][1:]
        for i, (_, *size) in enumerate(headers):
            if tuple(size) != self.size:
                raise ValueError(_sizes(self.files.where(0), self.size, self.files.where(i), (size[0], size[1])))
        self.channels = max(channels for channels, _, _ in headers)
        stems = [name.rsplit("/", 1)[-1].rsplit(".", 1)[0] for name in self.files.names]
        numbers = {int(stem) for stem in stems if stem.isascii() and stem.isdigit()}
        numbered = len(numbers) == len(stems)
        self.index = np.array([int(stem) for stem in stems] if numbered else range(len(stems)), np.int64)
        classes = self.files.classes()
        known = classes is not None and all(name in classes for name in self.files.names)
        self.label = np.array([classes[name] for name in self.files.names], np.int64) if classes and known else None

    def reader(self, channels: int) -> Reader:
        return lambda rows: np.stack([self.files.pixels(int(i), channels) for i in rows])


class ChosenPart:
    """Some of other files' images: those of the numbers `source`, under the numbers `index`."""

    def __init__(self, files: ImageFiles, index: np.ndarray, source: np.ndarray):
        self.files, self.index, self.source, self.where = files, index, source, files.parts[0].where
        place = files._places(source)
        self.label = None if files.label is None else files.label[place]
        self.size, self.channels = files.shape[1:], files.channels

    def reader(self, channels: int) -> Reader:
        return lambda rows: self.files.pixels(self.source[rows])


class DatasetPart:
    """The items `index` of a dataset of images, item i as image i; decoded as they are asked for.

    Raises:
        ValueError: items that are no images (1 or 3, H, W).
    """

    def __init__(self, dataset: Items, index: np.ndarray):
        self.dataset, self.index, self.where = dataset, index, f"{dataset.name} {dataset.split}"
        if len(dataset.shape) != 3 or dataset.shape[0] not in (1, 3):
            raise ValueError(f"{self.where} holds vectors {tuple(dataset.shape)}; images are needed")
        self.channels, self.size = dataset.shape[0], (dataset.shape[1], dataset.shape[2])
        known = getattr(dataset, "labels", None)
        labels = [dataset[int(i)][1] for i in index] if known is None else known[index]
        self.label = np.asarray(labels, np.int64) if dataset.num_classes else None

    def reader(self, channels: int) -> Reader:
        return lambda rows: (
            to_uint8(torch.stack([self.dataset[int(i)][0] for i in self.index[rows]])).permute(0, 2, 3, 1).numpy()
        )


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an npy file without its data."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return shape, dtype


def _tensors(index: np.ndarray, images: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(index.copy()), torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def _sizes(first: str, size: tuple[int, int], second: str, other: tuple[int, int]) -> str:
    return (
        f"images of different sizes: {first} is {size[1]}x{size[0]} and {second} {other[1]}x{other[0]}; "
        "bring them to one size first"
    )
