"""A folder or zip of images of any size as a dataset."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from steadyflow.data import splits
from steadyflow.data.archive import ImageArchive
from steadyflow.data.image_writing import whole_file
from steadyflow.data.images import check_split, from_uint8
from steadyflow.data.squares import Crop, check_square, square


class ImageFolder(Dataset[tuple[Tensor, int]]):
    """The images (png, jpg, webp, bmp) of a folder, zip or lmdb database, brought to one size; decoded as they are
    asked for.

    Item i is (x (channels, size, size) float32 in [-1, 1], label), by `steadyflow.data.squares.square`. Orientation
    tags in a photograph's metadata are not applied.

    Splits. If `path` holds train or test (or val, valid; folders or zips), or PATH_train_lmdb lies beside it, these are
    the splits. Else a `partition` file says, or else the `held_out` images whose names have the smallest sha256 (or are
    the last, with `hold_last`) are `test` and the others `train`.

    Args:
        path: the folder, zip or database.
        split: train or test.
        size: of an item's side, in pixels.
        crop, resize: of `square`.
        channels: 3 (RGB), or 1 (grey, by luma).
        class_folders: the folder an image lies in is its class (sorted by name).
        class_json: its class is in the archive's dataset.json (EDM's zips). With neither the set is unlabelled.
        folder: read the images below folders of this name alone.
        only: a text file that lists the images to read, one a line.
        partition: a text file of lines `name number`: 0 train, 1 neither, 2 test (CelebA's list_eval_partition.txt).
        held_out, hold_last: how many images to hold out as `test`, where there are no splits otherwise, and whether
            they are the last by name.
        expected: how many images there should be, by split or in `all` of them, before `only` or a split is taken.
        source: where to get the set, for the message when it is not there.
        in_memory: decode everything now and keep it as `images`, (N, C, size, size) uint8.
        name: of the set.
        cache_dir: where the hash of the content is kept, so that an unchanged folder is hashed once.

    Attributes: `name`, `split`, `shape`, `num_classes`, `classes` (names), `labels` (N,) int64, `names` (of the files),
    `images` with in_memory, and `fingerprint`: the sha256 of the files' names and bytes and of the settings above. The
    hash of the bytes is kept in cache_dir under the path, names, sizes and modification times of the files; a file
    changed without a trace in these is not noticed until the cache is removed.

    Raises:
        FileNotFoundError: nothing at path, no image in it, no such split.
        ValueError: settings out of range; not as many images as expected; folders of train and of test read as one set
            (AFHQ's own zip); a file that is no 8-bit image, by name, when it is read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str = "train",
        size: int = 32,
        crop: Crop = None,
        resize: str | None = "bicubic",
        channels: int = 3,
        class_folders: bool = False,
        class_json: bool = False,
        folder: str | None = None,
        only: str | os.PathLike[str] | None = None,
        partition: str | os.PathLike[str] | None = None,
        held_out: int = 0,
        hold_last: bool = False,
        expected: Mapping[str, int] | None = None,
        source: str | None = None,
        in_memory: bool = False,
        name: str = "image_folder",
        cache_dir: str | os.PathLike[str] = "~/.cache/steadyflow",
    ):
        check_square(size, resize, crop)
        if channels not in (1, 3) or held_out < 0 or (class_folders and class_json):
            raise ValueError(
                f"need channels 1 or 3, held_out >= 0 and at most one of class_folders and class_json; got {channels}, "
                f"{held_out}, {class_folders} and {class_json}"
            )
        self.name, self.split, self.shape = name, check_split(split), (channels, size, size)
        self.crop, self.resize, self.class_json = crop, resize, class_json
        self.cache_dir = Path(cache_dir).expanduser()
        archives = self._archives(Path(path).expanduser(), source)
        kept = {s: splits.below(archive.names, folder) for s, archive in archives.items()}
        splits.check_counts(f"{name} at {path}", {s: len(rows) for s, rows in kept.items()}, expected)
        own = "all" if "all" in archives else split
        self.archive = archives[own]
        names = [self.archive.names[i] for i in kept[own]]
        rows = np.arange(len(names)) if only is None else splits.listed(names, only)
        if own == "all":
            rows = rows[self._part([names[i] for i in rows], held_out, hold_last, partition)]
        self.index = kept[own][rows]
        self.names = [self.archive.names[i] for i in self.index]
        if own == "all":
            splits.check_unmixed(path, self.names)
        known = [archive.names[i] for s, archive in archives.items() for i in kept[s]]
        if class_json:
            self.num_classes, self.classes, self.labels = self._json_classes(archives)
        else:
            self.classes = sorted({_class(name) for name in known}) if class_folders else []
            if "" in self.classes:
                stray = next(name for name in known if not _class(name))
                raise ValueError(f"{stray} in {path} lies in no class folder; set dataset.class_folders=false")
            self.num_classes = len(self.classes)
            number = {name: k for k, name in enumerate(self.classes)}
            self.labels = torch.tensor([number.get(_class(name), 0) for name in self.names])
        if in_memory:
            self.images = torch.stack([self._pixels(i) for i in range(len(self))])

    def _archives(self, path: Path, source: str | None) -> dict[str, ImageArchive]:
        try:
            archives = splits.split_archives(path)
        except FileNotFoundError:
            if path.exists():
                raise
            get = f"{self.name} comes from {source}; " if source else ""
            raise FileNotFoundError(
                f"no folder or zip of images at {path}; {get}say where it is with dataset.path=PATH"
            ) from None
        if "all" not in archives and self.split not in archives:
            raise FileNotFoundError(
                f"{path} has a split {next(iter(archives))} and no {self.split} (a folder or {self.split}.zip)"
            )
        return archives

    def _part(
        self, names: list[str], held_out: int, last: bool, partition: str | os.PathLike[str] | None
    ) -> np.ndarray:
        """The places of the names of this split, in a set that comes without splits."""
        if partition is None:
            part, how = splits.held_out(names, held_out, self.split, last), f"{held_out} of them held out"
        else:
            part, how = splits.partition(names, partition, self.split), f"split by {partition}"
        if len(part) == 0:
            raise FileNotFoundError(f"split {self.split} is empty: {len(names)} images, {how}; set dataset.held_out=N")
        return part

    def _json_classes(self, archives: dict[str, ImageArchive]) -> tuple[int, list[str], Tensor]:
        found = {split: archive.classes() or {} for split, archive in archives.items()}
        own = found.get("all", found.get(self.split, {}))
        if unknown := [name for name in self.names if name not in own]:
            raise ValueError(
                f"{self.archive.path} has no dataset.json with a class for {unknown[0]}; set dataset.class_json=false"
            )
        count = 1 + max(max(numbers.values(), default=0) for numbers in found.values())
        return count, [str(k) for k in range(count)], torch.tensor([own[name] for name in self.names])

    def _pixels(self, i: int) -> Tensor:
        """Image i, (C, size, size) uint8."""
        row, (channels, size, _) = int(self.index[i]), self.shape
        image = self.archive.image(row, channels)
        try:
            image = square(image, size, self.resize, self.crop)
        except ValueError as error:
            raise ValueError(f"{self.archive.where(row)} {error}") from None
        return torch.from_numpy(np.array(image).reshape(size, size, channels)).permute(2, 0, 1).contiguous()

    @cached_property
    def fingerprint(self) -> str:
        settings = [*self.shape, self.resize, self.names, self.classes]
        settings += [] if self.crop is None else [self.crop if isinstance(self.crop, str) else list(self.crop)]
        settings += [self.labels.tolist()] if self.class_json else []
        return hashlib.sha256(f"{self._content()} {json.dumps(settings)}".encode()).hexdigest()

    def _content(self) -> str:
        """The sha256 of the archive's names and bytes, from the cache where the archive is unchanged."""
        path = self.archive.path.resolve()
        files = dict.fromkeys(self.archive.on_disk(i) for i in range(len(self.archive)))
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
