"""Arrays in npz files."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from steadyflow.data.archive import UNREADABLE


class Npz(Mapping[str, np.ndarray]):
    """The arrays of an npz, each read when it is asked for; a context that closes the file.

    Args:
        path: of the file.
        remedy: what to do about a damaged one, as the end of the message.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no npz, a damaged one, or one without the array asked for; by name.
    """

    def __init__(self, path: Path, remedy: str = ""):
        self.path, self.remedy = path, remedy
        self._file = path.open("rb")
        try:
            arrays = np.load(self._file)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
        except (ValueError, *UNREADABLE) as error:
            self._file.close()
            raise self._damaged(str(error).split(". ")[0]) from None
        self._arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self._arrays[name]
        except (KeyError, ValueError, *UNREADABLE) as error:
            raise self._damaged(error) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays.files)

    def __len__(self) -> int:
        return len(self._arrays.files)

    def __enter__(self) -> "Npz":
        return self

    def __exit__(self, *_: object) -> None:
        self._arrays.close()
        self._file.close()

    def _damaged(self, error: object) -> ValueError:
        return ValueError(f"{self.path} is no npz file, or a damaged one ({error}){self.remedy}")
