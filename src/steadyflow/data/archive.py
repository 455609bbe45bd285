"""The image files of a folder, a zip or an lmdb database, by name."""

import io
import json
import os
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image

from steadyflow.data.images import files_below

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SINGLE_CHANNEL = ("1", "L", "LA")  # Pillow's modes of 8-bit grey images
# What reading a damaged file raises (RuntimeError: encrypted), and what decoding one raises (a bomb: absurd sides).
UNREADABLE = (OSError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)
DAMAGED = (*UNREADABLE, ValueError, SyntaxError, Image.DecompressionBombError)


class Files(Protocol):
    """Where the files of an archive are: all their names, the bytes of one, a stream of one; the file behind a name."""

    def names(self) -> list[str]: ...

    def open(self, name: str) -> IO[bytes]: ...

    def on_disk(self, name: str) -> Path: ...


class Folder:
    """The files below a folder."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        return files_below(self.path)

    def open(self, name: str) -> IO[bytes]:
        return (self.path / name).open("rb")

    def on_disk(self, name: str) -> Path:
        return self.path / name


class Zip:
    """The members of a zip, which is opened once in each process: a fork must not share its parent's file offset."""

    def __init__(self, path: Path):
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        self._owner = 0  # the process that opened it

    def _opened(self) -> zipfile.ZipFile:
        if self._zip is None or self._owner != os.getpid():
            try:
                self._zip, self._owner = zipfile.ZipFile(self.path), os.getpid()
            except zipfile.BadZipFile as error:
                kinds = "" if self.path.suffix == ".zip" else f", and no picture ({', '.join(SUFFIXES)})"
                raise ValueError(f"{self.path} is no zip file, or a damaged one ({error}){kinds}") from None
        return self._zip

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_zip": None}

    def names(self) -> list[str]:
        return [entry.filename for entry in self._opened().infolist() if not entry.is_dir()]

    def open(self, name: str) -> IO[bytes]:
        return self._opened().open(name)

    def on_disk(self, name: str) -> Path:
        return self.path


class Lmdb:
    """The values of an lmdb database (LSUN's: encoded images) under their keys, which are bytes, read as Latin-1."""

    def __init__(self, path: Path):
        self.path = path

    def names(self) -> list[str]:
        with _environment(str(self.path)).begin() as view:
            return [key.decode("latin-1") for key in view.cursor().iternext(values=False)]

    def open(self, name: str) -> IO[bytes]:
        with _environment(str(self.path)).begin() as view:
            value = view.get(name.encode("latin-1"))
        if value is None:
            raise KeyError(f"There is no item named {name!r} in the database")
        return io.BytesIO(value)

    def on_disk(self, name: str) -> Path:
        return self.path / "data.mdb"


@lru_cache(maxsize=32)
def _environment(path: str) -> Any:
    """An lmdb database opened to be read, once, as lmdb wants it. Without locks a forked process may go on with it."""
    try:
        import lmdb
    except ImportError:
        raise ValueError(
            f"{path} is an lmdb database, which the package lmdb reads: pip install 'steadyflow[lmdb]'"
        ) from None
    try:
        return lmdb.open(path, readonly=True, lock=False, readahead=False, meminit=False, create=False)
    except lmdb.Error as error:
        raise ValueError(f"{path} is no lmdb database, or a damaged one ({error})") from None


class ImageArchive:
    """The image files (png, jpg, webp, bmp) of a folder, searched recursively, or of a zip, by name; or one such file.

    Also the values of an lmdb database (a folder with data.mdb), all of which must be images. Hidden files and files of
    other kinds are passed over; a file that is named like an image and is none, or holds more than 8 bits a channel, is
    refused by name. An archive can be handed to the workers of a data loader.

    Args:
        path: the folder, zip, database or picture.

    Attributes: `path`, of a picture its folder's, and `names`, each file's path inside the archive with forward
    slashes.

    Raises:
        FileNotFoundError: no such folder or zip, or no image in it.
        ValueError: a file that cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        path = Path(path).expanduser()
        picture = path.is_file() and path.suffix.lower() in SUFFIXES
        self.path = path.parent if picture else path
        keyed = (self.path / "data.mdb").is_file()
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path} does not exist; expected a folder or a zip of images")
        self.files: Files = (Lmdb if keyed else Zip if self.path.is_file() else Folder)(self.path)
        found = [path.name] if picture else self.files.names()
        self.names = sorted(
            found if keyed else (name for name in found if name.lower().endswith(SUFFIXES) and not _hidden(name))
        )
        if not self.names:
            other = f"; {len(found)} other files, such as {sorted(found)[0]}" if found else ""
            raise FileNotFoundError(f"{self.path} holds no image ({', '.join(SUFFIXES)}){other}")

    def __len__(self) -> int:
        return len(self.names)

    def classes(self) -> dict[str, int] | None:
        """The class of each file by name, where a dataset.json beside them has `labels` [[name, class], ...] (EDM)."""
        try:
            with self.files.open("dataset.json") as file:
                return {str(name): int(label) for name, label in json.load(file)["labels"]}
        except (OSError, KeyError, ValueError, TypeError):  # none, or a file of another kind
            return None

    def where(self, i: int) -> str:
        """File i as an error message names it."""
        return f"{self.path}/{self.names[i]}"

    def on_disk(self, i: int) -> Path:
        """The file that holds file i: itself, or the zip or database."""
        return self.files.on_disk(self.names[i])

    def read(self, i: int) -> bytes:
        """The bytes of file i."""
        with self._open(i) as file:
            try:
                return file.read()
            except UNREADABLE as error:
                raise self._unreadable(i, error) from None

    def header(self, i: int) -> tuple[int, int, int]:
        """(channels, height, width) of file i, 1 channel if it is grey and else 3, from its first bytes."""
        with self._open(i) as file:
            image = self._identified(i, file)
            return 1 if image.mode in SINGLE_CHANNEL else 3, image.height, image.width

    def image(self, i: int, channels: int = 3) -> Image.Image:
        """File i decoded to mode RGB (3 channels) or L (1). An alpha channel is dropped, as clean-fid drops it."""
        image = self._identified(i, io.BytesIO(self.read(i)))
        try:
            if "transparency" in image.info:  # else Pillow warns of a palette with transparency
                image = image.convert("RGBA")
            return image.convert("L" if channels == 1 else "RGB")
        except DAMAGED as error:
            raise ValueError(f"{self.where(i)} is a damaged image ({error}); replace or remove it") from None

    def pixels(self, i: int, channels: int = 3) -> np.ndarray:
        """File i decoded, (H, W, channels) uint8."""
        image = self.image(i, channels)
        return np.asarray(image).reshape(image.height, image.width, channels)

    def _open(self, i: int) -> IO[bytes]:
        try:
            return self.files.open(self.names[i])
        except UNREADABLE as error:
            raise self._unreadable(i, error) from None

    def _unreadable(self, i: int, error: Exception) -> ValueError:
        return ValueError(f"{self.where(i)} cannot be read ({error})")

    def _identified(self, i: int, file: IO[bytes]) -> Image.Image:
        try:
            start = file.read(25)
            file.seek(0)
            image = Image.open(file)
        except DAMAGED as error:
            raise ValueError(f"{self.where(i)} is not an image ({error}); replace or remove it") from None
        deep = image.format == "PNG" and start[24] == 16  # Pillow would cut a 16-bit RGB to 8 bits silently
        if deep or image.mode[0] in "IF":
            raise ValueError(f"{self.where(i)} has more than 8 bits a channel; convert it to 8 bits")
        return image


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
