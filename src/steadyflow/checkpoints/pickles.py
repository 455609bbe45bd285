"""Weights of strangers as plain data: no file read here can run code, or take much more memory than it is long.

    zip-format torch files      a pickle with the storages beside it, by unpickler.py; mapped, not copied
    legacy torch files          pickles with the storages behind them, by unpickler.py; mapped, not copied
    plain pickles (EDM, EDM2)   by unpickler.py; the source code embedded in them stays text
    safetensors                 mapped, not copied

The unpickler knows a list of names, none of which does more than hold data; any other is refused by its name. Before
memory is taken for anything, its size is compared with what the file has. What was read is then a tree that whoever
walks it can walk: not too deep, not in itself, and not much larger than the file when all that it repeats is written
out.
"""

import mmap
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from steadyflow.checkpoints.machine import Record, Unreadable
from steadyflow.checkpoints.nodes import shown
from steadyflow.checkpoints.unpickler import read_pickle, read_zip

__all__ = ["Record", "read_state", "tensors_of"]

DEPTH = 100  # of containers in containers: EDM's networks have about 20
PLACES = 2**26  # things that a file may hold and characters of their names, each as often as it is held
COPIES = 10  # of the file's size: what all tensors may have together, where several stand on the same numbers
NAME = 1000  # characters of a weight's name


def read_state(file: str | Path) -> Any:
    """What a file of weights holds: nested dicts and lists of tensors (on the CPU, read-only), numbers and texts.

    Objects of other classes are `Record`s where they can only be data (torch modules, EDM's persistent classes,
    argparse namespaces).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that names a global outside the list (says which), is truncated, or is none of the kinds.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    with file.open("rb") as stream:
        head = stream.read(512)
    try:
        if head[8:9] == b"{":
            found = safetensors.torch.load_file(file)
        elif head[:1] == b"\x80" or head[:4] == b"PK\x03\x04":
            with file.open("rb") as stream:  # a private, writable map: the file itself cannot be changed through it
                data = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))
            found = read_pickle(data) if head[:1] == b"\x80" else read_zip(*_records(file, data))
        else:
            raise Unreadable(_no_weights(head))
        _check_tree(found, file.stat().st_size)
        return found
    except Unreadable as error:
        raise ValueError(f"{file}: {error}") from error
    except Exception as error:  # whatever damage leads to
        kind = "" if isinstance(error, safetensors.SafetensorError) else f"{type(error).__name__}: "
        what = f"({kind}{shown(' '.join(str(error).split()), 200)}); fetch or save it again"
        raise ValueError(f"{file} is truncated or damaged {what}") from error


def _no_weights(head: bytes) -> str:
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the weights; fetch the file itself (git lfs pull)"
    if head.lstrip()[:1] == b"<":
        return "this is a web page, not the weights; the download was refused or redirected: fetch the file by hand"
    return f"no torch file, pickle or safetensors file: it begins with {head[:8]!r}"


def _records(file: Path, data: memoryview) -> tuple[memoryview, dict[str, memoryview]]:
    """Where the pickle and, by key, the storages of a zip stand in its bytes.

    Raises:
        Unreadable: a zip that torch would not write.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    found = {}
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise Unreadable(f"a compressed zip ({shown(entry.filename)}), which torch never writes")
        begin = entry.header_offset + 30 + sum(struct.unpack_from("<HH", data, entry.header_offset + 26))
        if begin < 0 or begin + entry.file_size > len(data):
            raise Unreadable(f"truncated: {shown(entry.filename)} in it ends at byte {begin + entry.file_size}")
        found[entry.filename.partition("/")[2]] = data[begin : begin + entry.file_size]
    if "data.pkl" not in found:
        names = shown(", ".join(sorted(entry.filename for entry in entries)))
        raise Unreadable(f"a zip without data.pkl, so none of torch's; it has {names}")
    if found.get("byteorder", data[:0]).tobytes() == b"big":
        raise Unreadable("numbers in big-endian order; save it again on a little-endian machine")
    return found["data.pkl"], {key.removeprefix("data/"): part for key, part in found.items()}


def _check_tree(found: Any, size: int) -> None:
    """That what a file of `size` bytes held can be walked, and its tensors copied.

    A file may put one thing in many places, so that what it holds, written out, grows exponentially with its size.

    Raises:
        Unreadable: what is too deep, too large, or has a name that cannot be printed.
    """
    known: dict[int, tuple[int, int, int, int]] = {}

    def measure(value: Any, depth: int) -> tuple[int, int, int, int]:
        """Height, number of places, characters of all their names, bytes of all tensors."""
        if isinstance(value, Tensor):
            return 0, 1, 0, value.numel() * value.element_size()
        if not isinstance(value, Record | Mapping | list | tuple):
            return 0, 1, 0, 0
        if depth > DEPTH:
            raise Unreadable(f"refused: it is nested more than {DEPTH} deep, or in itself; weights never are")
        if id(value) not in known:
            height, places, characters, numbers = 0, 1, 0, 0
            for key, part in _items(value):
                h, p, c, n = measure(part, depth + 1)
                name = len(key) if isinstance(key, str) else 8
                height, places, characters, numbers = max(height, h), places + p, characters + c + p * name, numbers + n
                if n and isinstance(key, str) and not (name <= NAME and key.isprintable()):
                    raise Unreadable(f"refused: {shown(key)} is no name of a weight")
            known[id(value)] = height + 1, places, characters, numbers
        height, places, characters, numbers = known[id(value)]
        if height + depth > DEPTH or places + characters > PLACES or numbers > COPIES * size + 2**20:
            raise Unreadable("refused: it repeats its parts until they are too deep or too large; weights never do")
        return known[id(value)]

    measure(found, 0)


def tensors_of(found: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of nested dicts, lists and records, by its dotted place."""
    if isinstance(found, Tensor):
        return {prefix: found}
    if isinstance(found, Record):
        return tensors_of(found.state, prefix)
    nested = (tensors_of(value, f"{prefix}.{key}".lstrip(".")) for key, value in _items(found))
    return {key: value for part in nested for key, value in part.items()}


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    """What stands in a container, by its name there."""
    if isinstance(value, Record):
        return [("", value.state)]
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, list | tuple) else ()
