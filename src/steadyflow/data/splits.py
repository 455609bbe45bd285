"""Where the splits of a set of image files are, and which of the files belong to one."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from steadyflow.data.archive import SUFFIXES, ImageArchive

WORDS = {
    "train": ("train",),
    "test": ("test", "val", "valid"),
}  # what folders, zips and databases of a split are called


def split_archives(path: Path) -> dict[str, ImageArchive]:
    """The archives of the splits that a path brings, by split; a path that brings none is one archive, `all`.

    Those of `train` are PATH/train, PATH/train.zip or PATH_train_lmdb (LSUN's names); those of `test` are also called
    val or valid.

    Raises:
        FileNotFoundError: nothing there.
    """
    places = {
        split: place
        for split, words in WORDS.items()
        for word in reversed(words)
        for place in (path.with_name(f"{path.name}_{word}_lmdb"), path / f"{word}.zip", path / word)
        if place.exists()
    }
    return {split: ImageArchive(place) for split, place in places.items()} or {"all": ImageArchive(path)}


def check_unmixed(where: object, names: Sequence[str]) -> None:
    """Raises ValueError where the images of one split lie in folders of both: a zip's own train and val, say."""
    folders = {part for folder in {name.rpartition("/")[0] for name in names} for part in folder.split("/")}
    inside = [next((word for word in words if word in folders), None) for words in WORDS.values()]
    if all(inside):
        raise ValueError(
            f"{where} holds the folders {' and '.join(map(str, inside))} further inside, and would mix them; give the "
            "folder they lie in as dataset.path (unpack a zip), or the name of one as dataset.folder"
        )


def check_counts(where: str, counts: Mapping[str, int], expected: Mapping[str, int] | None) -> None:
    """Raises ValueError where a split, or all splits together (`all`), has not as many images as expected.

    A path that brings no splits may hold the images of one of them, or of both.
    """
    expected = dict(expected or {})
    if unknown := expected.keys() - {*WORDS, "all"}:
        raise ValueError(f"expected counts images of train, test or all; got {min(unknown)}")
    wanted = {split: {number} for split, number in expected.items() if split in (*counts, "all")}
    if "all" in counts and expected and "all" not in expected:
        wanted["all"] = {*expected.values(), sum(expected.values())}
    for split, numbers in wanted.items():
        found, what = (sum(counts.values()), "") if split == "all" else (counts[split], f" of split {split}")
        if found not in numbers:
            raise ValueError(
                f"{where} has {found} images{what}, expected {' or '.join(map(str, sorted(numbers)))}: it is "
                "incomplete or another set; take it as it is with dataset.expected=null"
            )


def below(names: Sequence[str], folder: str | None) -> np.ndarray:
    """The places of the names that lie in a folder of this name, at any depth; all for None."""
    return np.array([i for i, name in enumerate(names) if folder is None or f"/{folder}/" in f"/{name}"], np.int64)


def listed(names: Sequence[str], file: str | os.PathLike[str]) -> np.ndarray:
    """The places of the names that a text file lists: one a line, its first word; folders, suffix and case are ignored.

    Raises:
        FileNotFoundError: no such file. ValueError: a listed name that is not there, or there twice.
    """
    places: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        places.setdefault(_stem(name), []).append(i)
    wanted = [words[0] for words in _lines(file)]
    missing = [name for name in wanted if _stem(name) not in places]
    if missing or not wanted:
        raise ValueError(f"{file} lists {len(wanted)} images, {len(missing)} of which are not there: {missing[:1]}")
    for name in wanted:
        if len(found := places[_stem(name)]) > 1:
            raise ValueError(f"{file} lists {name}, which is both {names[found[0]]} and {names[found[1]]}; remove one")
    return np.sort(np.array([places[_stem(name)][0] for name in wanted]))


def partition(names: Sequence[str], file: str | os.PathLike[str], split: str) -> np.ndarray:
    """The places of the names to which a text file of lines `name number` gives 0 (train) or 2 (test): CelebA's.

    1 is its validation split, which is neither.

    Raises:
        FileNotFoundError: no such file. ValueError: an image that it does not list.
    """
    number = {_stem(words[0]): words[1] for words in _lines(file) if len(words) == 2}
    if missing := [name for name in names if _stem(name) not in number]:
        raise ValueError(f"{file} has no line `name number` for {len(missing)} of the images, such as {missing[0]}")
    wanted = {"train": "0", "test": "2"}[split]
    return np.array([i for i, name in enumerate(names) if number[_stem(name)] == wanted], np.int64)


def held_out(names: Sequence[str], count: int, split: str, last: bool = False) -> np.ndarray:
    """`count` of the sorted names, those with the smallest sha256 or the last, for test; the others for train."""
    order = np.argsort([hashlib.sha256(name.encode()).hexdigest() for name in names])
    order = np.arange(len(names))[::-1] if last else order
    return np.sort(order[count:] if split == "train" else order[:count])


def _lines(file: str | os.PathLike[str]) -> list[list[str]]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no text file of image names at {path}; set dataset.only or dataset.partition")
    return [line.split() for line in path.read_text().splitlines() if line.strip()]


def _stem(name: str) -> str:
    name = name.rsplit("/", 1)[-1].lower()
    stem, dot, suffix = name.rpartition(".")
    return stem if f"{dot}{suffix}" in SUFFIXES else name
