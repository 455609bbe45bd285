"""MNIST and CIFAR-10, read and fetched by torchvision."""

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from steadyflow.data.images import InMemoryImages, check_split


class MNIST(InMemoryImages):
    """MNIST: 60000 training and 10000 test images of handwritten digits, grey, 10 classes (LeCun et al. 1998).

    Args:
        root: holds `MNIST/raw/` with the four idx files.
        split: train or test.
        size: 28, or 32: two black pixels added on each side.

    Raises:
        FileNotFoundError: no such files below root.
        ValueError: a damaged file, another size.
    """

    SHA256 = {  # noqa: RUF012
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    }

    def __init__(self, root: str | os.PathLike[str], split: str = "train", size: int = 28):
        if size not in (28, 32):
            raise ValueError(f"size must be 28, MNIST's own, or 32 (padded); got {size}")
        root = Path(root).expanduser()
        if missing := [name for name in self.SHA256 if not (root / "MNIST" / "raw" / name).is_file()]:
            raise FileNotFoundError(missing_message("MNIST", root / "MNIST" / "raw", ", ".join(missing), "mnist"))
        import torchvision  # here: it takes seconds, and most of this package can do without

        try:
            files = torchvision.datasets.MNIST(root, train=check_split(split) == "train", download=False)
        except (ValueError, RuntimeError, AssertionError, EOFError) as error:
            raise ValueError(f"{root}/MNIST/raw is damaged ({error}); run: steadyflow prepare dataset=mnist") from None
        images = torch.nn.functional.pad(files.data, [(size - 28) // 2] * 4)[:, None]
        super().__init__("mnist", split, images, files.targets, num_classes=10)

    @classmethod
    def download(cls, root: str | os.PathLike[str]) -> None:
        """Fetches what is missing below root from torchvision's addresses and checks each file's hash."""
        import torchvision

        root = Path(root).expanduser()
        raw = root / "MNIST" / "raw"
        files = [name for name, _ in torchvision.datasets.MNIST.resources]
        cls._verify(raw)  # first, because torchvision takes whatever lies there
        with _fetching("MNIST", files, torchvision.datasets.MNIST.mirrors[0], raw):
            torchvision.datasets.MNIST(root, download=True)
        cls._verify(raw)

    @classmethod
    def _verify(cls, raw: Path) -> None:
        """Checks the hash of each file that is there."""
        for name, expected in cls.SHA256.items():
            if not (raw / name).is_file():
                continue
            found = hashlib.sha256((raw / name).read_bytes()).hexdigest()
            if found != expected:
                raise ValueError(
                    f"{raw / name} is not MNIST's file: sha256 {found}, expected {expected}; delete it and run this "
                    "command again"
                )


class CIFAR10(InMemoryImages):
    """CIFAR-10: 50000 training and 10000 test images, 32x32 RGB, 10 classes (Krizhevsky 2009).

    torchvision unpickles the archive's files only after their md5 was found right.

    Args:
        root: holds `cifar-10-batches-py/`.
        split: train or test.

    Raises:
        FileNotFoundError: no such files below root.
        ValueError: files with a wrong hash.
    """

    def __init__(self, root: str | os.PathLike[str], split: str = "train"):
        import torchvision

        root = Path(root).expanduser()
        folder = root / torchvision.datasets.CIFAR10.base_folder
        if not folder.is_dir():
            raise FileNotFoundError(missing_message("CIFAR-10", folder, "the folder", "cifar10"))
        try:
            files = torchvision.datasets.CIFAR10(root, train=check_split(split) == "train", download=False)
        except RuntimeError:
            raise ValueError(
                f"{folder} is incomplete, or a file in it has a wrong md5; run: steadyflow prepare dataset=cifar10"
            ) from None
        images = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()
        super().__init__("cifar10", split, images, torch.tensor(files.targets), num_classes=10)

    @classmethod
    def download(cls, root: str | os.PathLike[str]) -> None:
        """Fetches the archive to root from torchvision's address where it is missing; every hash is checked."""
        import torchvision

        source = torchvision.datasets.CIFAR10
        root = Path(root).expanduser()
        with _fetching("CIFAR-10", [source.filename], source.url.removesuffix(source.filename), root):
            source(root, download=True)


def missing_message(what: str, where: Path, missing: str, config: str) -> str:
    """One line for a set that is not there: where it was looked for, how to get it, what to set."""
    return (
        f"{what} is not at {where} (missing: {missing}); get it with `steadyflow prepare dataset={config}`, or say "
        "where it is with data_dir=DIR (dataset.root=DIR)"
    )


@contextmanager
def _fetching(what: str, files: list[str], address: str, folder: Path) -> Iterator[None]:
    """Turns a failed download into one line that says what to put where; a silent server is given up after 30 s."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{what} could not be fetched ({reason}); run this command again with a network, or put {', '.join(files)} "
            f"from {address} in {folder} and run it again"
        ) from None
    finally:
        socket.setdefaulttimeout(timeout)
