"""Weights of strangers as plain data: no file read here can run code.

    zip-format torch files      torch.load(weights_only=True, mmap=True)
    legacy torch files          pickles with the storages behind them, by unpickler.py; mapped, not copied
    plain pickles (EDM, EDM2)   by unpickler.py; the source code embedded in them stays text
    safetensors                 mapped, not copied

The unpickler knows a list of globals, none of which does more than hold data; any other is refused by its name. Before
memory is taken for a tensor, its size is compared with the storage it stands on, and that with the file.
"""

import mmap
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from steadyflow.checkpoints.unpickler import INERT, Record, read_pickle, record_class, refusal

__all__ = ["Record", "read_state", "tensors_of"]


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
        if head[:4] == b"PK\x03\x04":
            found = _read_zip(file)
        elif head[8:9] == b"{":
            found = safetensors.torch.load_file(file)
        elif head[:1] == b"\x80":
            with file.open("rb") as stream:  # a private, writable map: the file itself cannot be changed through it
                found = read_pickle(memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)))
        else:
            raise ValueError(_no_weights(head))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    except (safetensors.SafetensorError, EOFError, pickle.UnpicklingError, struct.error, RuntimeError) as error:
        raise ValueError(f"{file} is truncated or damaged: {' '.join(str(error).split())[:200]}") from error
    _check_sizes(found, str(file))
    return found


def _no_weights(head: bytes) -> str:
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the weights; fetch the file itself (git lfs pull)"
    if head.lstrip()[:1] == b"<":
        return "this is a web page, not the weights; the download was refused or redirected: fetch the file by hand"
    return f"no torch file, pickle or safetensors file: it begins with {head[:8]!r}"


def _read_zip(file: Path) -> Any:
    try:
        with zipfile.ZipFile(file) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except zipfile.BadZipFile as error:
        raise ValueError(f"truncated or damaged ({error})") from error
    if packed:
        raise ValueError(f"a compressed zip ({packed[0]}), which torch never writes")
    records = [(record_class(name), name) for name in INERT]
    try:
        with torch.serialization.safe_globals(records):  # type: ignore[arg-type]
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:unsupported|Unsupported global:) GLOBAL (\S+)", str(error))
        name = named[1] if named else re.search(r"function (.+)", str(error)) or str(error).splitlines()[-1]
        raise ValueError(refusal(str(name))) from error


def _check_sizes(found: Any, where: str) -> None:
    """That no tensor claims more numbers than its storage holds, as an expanded one does: copied, it would be large."""
    for key, value in tensors_of(found).items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            held = value.untyped_storage().nbytes()
            raise ValueError(f"{where}: {key} has shape {tuple(value.shape)} on a storage of {held} bytes")


def tensors_of(found: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of nested dicts, lists and records, by its dotted place."""
    if isinstance(found, Tensor):
        return {prefix: found}
    if isinstance(found, Record):
        return tensors_of(found.state, prefix)
    if isinstance(found, Mapping):
        items: Any = found.items()
    else:
        items = enumerate(found) if isinstance(found, list | tuple) else ()
    nested = (tensors_of(value, f"{prefix}.{key}".lstrip(".")) for key, value in items)
    return {key: value for part in nested for key, value in part.items()}
