"""Datasets of images as plain arrays on disk, mapped into memory: no decoding, no copy kept."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from steadyflow.data.image_writing import whole_file
from steadyflow.data.images import check_split, from_uint8, to_uint8, unpacked

SHARD_BYTES = 2**27  # of pixels in one file


class Shards(Dataset[tuple[Tensor, int]]):
    """A set that `write_shards` wrote. Its items, labels, name and fingerprint are those of the set it was made from.

    The files are mapped, not read: a batch touches the pages of its own images, which all processes share.

    Args:
        path: what `steadyflow prepare dataset=... shards=PATH` was given.
        split: train or test.

    Raises:
        FileNotFoundError: no such set or split; shards missing.
        ValueError: files that are not as set.json says.
    """

    def __init__(self, path: str | os.PathLike[str], split: str = "train"):
        self.folder = Path(path).expanduser() / check_split(split)
        about = self._about()
        self.name, self.split, self.num_classes = about["name"], split, about["num_classes"]
        self.shape, self.fingerprint = tuple(about["shape"]), about["fingerprint"]
        self.count, self.rows = about["count"], about["rows"]
        self.files = shard_files(self.folder, about)
        if missing := [file for file in [*self.files, self.folder / "labels.npy"] if not file.is_file()]:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(self.files) + 1} files of {self.folder} are missing ({missing[0].name}): "
                "run the command that writes them again, it goes on where it stopped"
            )
        self.labels = torch.from_numpy(np.load(self.folder / "labels.npy"))
        if self.labels.shape != (self.count,):
            raise ValueError(f"{self.folder}/labels.npy has {len(self.labels)} labels, set.json says {self.count}")
        self._maps: dict[int, np.ndarray] = {}

    def _about(self) -> dict[str, Any]:
        file = self.folder / "set.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"no shards at {self.folder}; write them with `steadyflow prepare dataset=... "
                f"shards={self.folder.parent}`, or say where they are with dataset.path=PATH"
            )
        try:
            return json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is damaged ({error}); remove {self.folder} and write it again") from None

    def _map(self, shard: int) -> np.ndarray:
        """One shard, (n, C, H, W) uint8, mapped when it is first asked for."""
        if shard not in self._maps:
            try:
                pixels = np.asarray(np.load(self.files[shard], mmap_mode="r"))
            except ValueError as error:
                raise ValueError(f"{self.files[shard]} is damaged ({error}); remove it and write it again") from None
            expected = (min(self.rows, self.count - shard * self.rows), *self.shape)
            if pixels.shape != expected or pixels.dtype != np.uint8:
                raise ValueError(f"{self.files[shard]} is {pixels.dtype} {pixels.shape}, expected uint8 {expected}")
            self._maps[shard] = pixels
        return self._maps[shard]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_maps": {}}  # a map would be copied to another process

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """Images of the numbers given, (n, C, H, W) uint8."""
        images = np.empty((len(indices), *self.shape), np.uint8)
        for place, i in enumerate(indices):
            images[place] = self._map(i // self.rows)[i % self.rows]
        return torch.from_numpy(images)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.count:
            raise IndexError(f"image {index} of {self.count}")
        return from_uint8(self.pixels([index])[0]), int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """The items of a batch (the data loader calls this where it exists)."""
        return list(zip(unpacked(self.pixels(indices)), self.labels[list(indices)].tolist(), strict=True))


def shard_files(folder: Path, about: dict[str, Any]) -> list[Path]:
    """The files of a split's pixels, in order."""
    return [folder / f"{k:05d}.npy" for k in range(-(-about["count"] // about["rows"]))]


def write_shards(
    dataset: Any,
    path: str | os.PathLike[str],
    batch_size: int = 256,
    workers: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[int]:
    """Writes a split of a dataset to PATH/SPLIT: set.json, 00000.npy, 00001.npy, ... and labels.npy.

    Each file appears whole or not at all, and those that are there are kept, so a killed run goes on where it stopped.

    Args:
        dataset: of images in [-1, 1], with name, split, shape, num_classes and fingerprint.
        path: of the set.
        batch_size, workers: of the data loader.
        shard_bytes: pixels in one file.

    Yields:
        the number of images that are written, as it grows to len(dataset).

    Raises:
        ValueError: another set is at path; a dataset that does not hold images.
    """
    if len(dataset.shape) != 3:
        raise ValueError(f"{dataset.name} holds vectors {tuple(dataset.shape)}; shards are of images")
    folder, count = Path(path).expanduser() / dataset.split, len(dataset)
    about = {
        "name": dataset.name,
        "shape": list(dataset.shape),
        "count": count,
        "rows": max(1, shard_bytes // int(np.prod(dataset.shape))),
        "num_classes": dataset.num_classes,
        "fingerprint": dataset.fingerprint,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "set.json"
    if file.is_file():
        old = json.loads(file.read_text())
        if {**old, "rows": 0} != {**about, "rows": 0}:
            raise ValueError(
                f"{folder} holds another set ({old.get('name')}, {old.get('count')} images of {old.get('shape')}); "
                "remove it or choose another place with shards=DIR"
            )
        about = old  # with its own number of rows
    else:
        with whole_file(file) as temporary:
            temporary.write_text(json.dumps(about, indent=1))
    for k, shard in enumerate(shard_files(folder, about)):
        items = range(k * about["rows"], min((k + 1) * about["rows"], count))
        yield from _write_shard(dataset, shard, items, batch_size, workers)
    labels = dataset.labels if hasattr(dataset, "labels") else [dataset[i][1] for i in range(count)]
    with whole_file(folder / "labels.npy") as temporary, temporary.open("wb") as out:
        np.save(out, np.asarray(labels, np.int64))


def _write_shard(dataset: Any, file: Path, items: range, batch_size: int, workers: int) -> Iterator[int]:
    if file.is_file():
        yield items.stop
        return
    pixels, done = np.empty((len(items), *dataset.shape), np.uint8), 0
    for x, _ in DataLoader(Subset(dataset, items), batch_size, num_workers=workers):
        pixels[done : done + len(x)] = to_uint8(x).numpy()
        done += len(x)
        yield items.start + done
    with whole_file(file) as temporary, temporary.open("wb") as out:
        np.save(out, pixels)
