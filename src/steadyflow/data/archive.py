"""The image files of a folder or of a zip, by name."""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SINGLE_CHANNEL = ("1", "L", "LA")  # Pillow's modes of 8-bit grey images


class ImageArchive:
    """The image files (png, jpg, webp, bmp) of a folder, searched recursively, or of a zip, by name; or one such file.

    Hidden files and files of other kinds are passed over; a file that is named like an image and is none, or holds more
    than 8 bits a channel, is refused by name. A zip is opened once in each process, so an archive can be handed to the
    workers of a data loader.

    Args:
        path: the folder, zip or picture.

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
        self.zipped = self.path.is_file()
        self._zip: zipfile.ZipFile | None = None
        self._owner = 0  # the process that opened it
        if picture:
            found = [path.name]
        elif self.path.is_dir():
            found = [file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file()]
        elif self.zipped:
            found = [entry.filename for entry in self._opened().infolist() if not entry.is_dir()]
        else:
            raise FileNotFoundError(f"{self.path} does not exist; expected a folder or a zip of images")
        self.names = sorted(name for name in found if name.lower().endswith(SUFFIXES) and not _hidden(name))
        if not self.names:
            other = f"; {len(found)} other files, such as {sorted(found)[0]}" if found else ""
            raise FileNotFoundError(f"{self.path} holds no image ({', '.join(SUFFIXES)}){other}")

    def _opened(self) -> zipfile.ZipFile:
        if self._zip is None or self._owner != os.getpid():  # a forked child must not share its parent's file offset
            try:
                self._zip, self._owner = zipfile.ZipFile(self.path), os.getpid()
            except zipfile.BadZipFile as error:
                raise ValueError(f"{self.path} is no zip file, or a damaged one ({error})") from None
        return self._zip

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_zip": None}

    def __len__(self) -> int:
        return len(self.names)

    def classes(self) -> dict[str, int] | None:
        """The class of each file by name, where a dataset.json beside them has `labels` [[name, class], ...] (EDM)."""
        try:
            text = self._opened().read("dataset.json") if self.zipped else (self.path / "dataset.json").read_bytes()
            return {str(name): int(label) for name, label in json.loads(text)["labels"]}
        except (OSError, KeyError, ValueError, TypeError):  # none, or a file of another kind
            return None

    def where(self, i: int) -> str:
        """File i as an error message names it."""
        return f"{self.path}/{self.names[i]}"

    def read(self, i: int) -> bytes:
        """The bytes of file i."""
        try:
            return self._opened().read(self.names[i]) if self.zipped else (self.path / self.names[i]).read_bytes()
        except (zipfile.BadZipFile, OSError, RuntimeError) as error:  # RuntimeError: encrypted
            raise ValueError(f"{self.where(i)} cannot be read ({error})") from None

    def header(self, i: int) -> tuple[int, int, int]:
        """(channels, height, width) of file i, 1 channel if it is grey and else 3, from its first bytes."""
        with self._opened().open(self.names[i]) if self.zipped else (self.path / self.names[i]).open("rb") as file:
            image = self._identified(i, file)
            return 1 if image.mode in SINGLE_CHANNEL else 3, image.height, image.width

    def image(self, i: int, channels: int = 3) -> Image.Image:
        """File i decoded to mode RGB (3 channels) or L (1). An alpha channel is dropped, as clean-fid drops it."""
        image = self._identified(i, io.BytesIO(self.read(i)))
        try:
            if "transparency" in image.info:  # else Pillow warns of a palette with transparency
                image = image.convert("RGBA")
            return image.convert("L" if channels == 1 else "RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{self.where(i)} is a damaged image ({error}); replace or remove it") from None

    def pixels(self, i: int, channels: int = 3) -> np.ndarray:
        """File i decoded, (H, W, channels) uint8."""
        image = self.image(i, channels)
        return np.asarray(image).reshape(image.height, image.width, channels)

    def _identified(self, i: int, file: IO[bytes]) -> Image.Image:
        try:
            start = file.read(25)
            file.seek(0)
            image = Image.open(file)
        except (OSError, SyntaxError, zipfile.BadZipFile) as error:
            raise ValueError(f"{self.where(i)} is not an image ({error}); replace or remove it") from None
        deep = image.format == "PNG" and start[24] == 16  # Pillow would cut a 16-bit RGB to 8 bits silently
        if deep or image.mode[0] in "IF":
            raise ValueError(f"{self.where(i)} has more than 8 bits a channel; convert it to 8 bits")
        return image


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
