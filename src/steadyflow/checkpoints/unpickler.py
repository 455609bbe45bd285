"""Pickles as plain data: an unpickler that looks every global up in a list and imports none."""

import pickle
import re
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAGIC = 0x1950A86A20F9469CFC6C  # torch's, of its legacy files
STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "Untyped": torch.uint8,
}
INERT = ("argparse.Namespace", "dnnlib.util.EasyDict", "easydict.EasyDict", "types.SimpleNamespace")


class Record:
    """An object of a class that is not here, as data.

    Attributes:
        name: of its class, as "torch.nn.modules.container.ModuleDict"; in an EDM pickle the class alone, "SongUNet".
        arguments: of its construction, as the pickle has them.
        state: what the class would have restored itself from: mostly a dict of its attributes.
    """

    name = ""

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> "Record":  # pickles make objects with and without their __init__
        record = super().__new__(cls)
        record.arguments, record.state = arguments, None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:  # subclasses of dict are filled so
        self.state = {**(self.state or {}), key: value}

    def __getitem__(self, key: str) -> Any:
        """An attribute of the state."""
        return self.state[key]

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The state dict of a record that was a torch module: parameters and buffers by their dotted names."""
        state = self.state if isinstance(self.state, Mapping) else {}
        found: dict[str, Tensor] = {}
        for kind in ("_parameters", "_buffers"):
            found |= {f"{prefix}{k}": v for k, v in (state.get(kind) or {}).items() if isinstance(v, Tensor)}
        for name, module in (state.get("_modules") or {}).items():
            if isinstance(module, Record):
                found |= module.tensors(f"{prefix}{name}.")
        return found


def read_pickle(data: memoryview) -> Any:
    """A legacy torch file or a plain pickle, in memory or mapped."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        stream = _Stream(data)
        first = _Unpickler(stream).load()
        if not isinstance(first, int) or first != MAGIC:
            return first
        _Unpickler(stream).load(), _Unpickler(stream).load()  # version of the protocol, sizes of C's types
        start = stream.place
        wanted: dict[str, tuple[torch.dtype, int]] = {}
        _Unpickler(stream, wanted=wanted).load()  # which storages there are; their bytes come last
        storages = {}
        for key in _Unpickler(stream).load():
            dtype, count = wanted[key]
            (found,) = struct.unpack("<q", stream.read(8))
            offset, size = stream.place, count * dtype.itemsize
            if found != count or offset + size > len(data):
                raise ValueError(
                    f"truncated: storage {key} should have {count} numbers, {len(data) - offset} bytes left"
                )
            storages[key] = _storage(data[offset : offset + size], dtype)
            stream.place = offset + size
        stream.place = start
        return _Unpickler(stream, storages=storages).load()


def _storage(data: memoryview, dtype: torch.dtype) -> Tensor:
    """Bytes as a tensor (n,), without a copy."""
    return torch.frombuffer(data, dtype=dtype) if len(data) else torch.empty(0, dtype=dtype)


class _Stream:
    """A view of memory as the unpickler reads it; `place` is where."""

    def __init__(self, data: memoryview):
        self.data, self.place = data, 0

    def read(self, size: int = -1) -> bytes:
        end = len(self.data) if size is None or size < 0 else min(self.place + size, len(self.data))
        found = bytes(self.data[self.place : end])
        self.place = end
        return found

    def readline(self, size: int | None = -1) -> bytes:
        window = bytes(self.data[self.place : self.place + 4096])
        return self.read(window.find(b"\n") + 1 or len(window))


def refusal(name: str) -> str:
    """What is said of a pickle that names a global outside the list."""
    return f"refused: the pickle asks for {name}, which could run code; weights need no more than tensors and numbers"


def record_class(name: str) -> type[Record]:
    """A class of records of this name, for one unpickler alone."""
    return type("Record", (Record,), {"name": name})  # a class a file: nothing the file does to it outlives the file


class _Unpickler(pickle.Unpickler):
    """Builds data alone: every global is looked up in a list, never imported.

    Args:
        stream: where the pickle begins.
        storages: of a legacy torch file, by key.
        wanted: filled with the dtype and count of each storage, in a first reading, in which tensors are None.
    """

    def __init__(
        self,
        stream: _Stream,
        storages: Mapping[str, Tensor] | None = None,
        wanted: dict[str, tuple[torch.dtype, int]] | None = None,
    ):
        super().__init__(stream, encoding="latin1")
        self.storages, self.wanted = storages, wanted

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        known: dict[str, Callable[..., Any]] = {  # methods and classes of this reading: none can be changed by the file
            "collections.OrderedDict": OrderedDict,
            "torch.Size": tuple,
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": self._parameter,
            "torch.storage._load_from_bytes": self._nested,
            "torch_utils.persistence._reconstruct_persistent_obj": self._persistent,
            "numpy.dtype": self._dtype,
            "_codecs.encode": self._bytes,  # how protocol 2 writes bytes
        }
        known |= {f"builtins.{kind.__name__}": kind for kind in (set, frozenset, complex, slice)}
        for core in ("numpy.core", "numpy._core"):
            known |= {f"{core}.multiarray._reconstruct": self._array, f"{core}.multiarray.scalar": self._scalar}
        if full in known:
            return known[full]
        if module in ("torch", "torch.cuda", "torch.storage") and name.removesuffix("Storage") in STORAGES:
            return record_class(name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        inert = full in ("torch.device", "numpy.ndarray", *INERT)
        if inert or re.fullmatch(r"torch\.nn\.modules\.[a-z]+\.[A-Z]\w*", full):
            return record_class(full)
        raise ValueError(refusal(full))

    def persistent_load(self, pid: Any) -> Tensor | None:
        kind, storage, key, _, count, *view = pid
        if kind != "storage" or any(v is not None for v in view) or not isinstance(count, int) or count < 0:
            raise ValueError(f"a persistent object of an unknown kind, {str(pid)[:80]}")
        if self.wanted is not None:
            self.wanted[key] = STORAGES[storage.name.removesuffix("Storage")], count
            return None
        if self.storages is None:
            raise ValueError("a plain pickle that refers to storages outside it")
        return self.storages[key]

    def _tensor(
        self, storage: Tensor | None, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any
    ) -> Tensor | None:
        if storage is None:
            return None
        last = offset + sum((n - 1) * s for n, s in zip(size, stride)) if prod(size) else offset - 1
        if offset < 0 or min((*size, *stride), default=0) < 0 or last >= len(storage) or prod(size) > len(storage):
            raise ValueError(f"a tensor of shape {tuple(size)} on a storage of {len(storage)} numbers")
        return storage.as_strided(tuple(size), tuple(stride), offset)

    def _parameter(self, data: Tensor | None, *_: Any) -> Tensor | None:
        return data

    def _nested(self, data: bytes) -> Any:
        """A storage inside a plain pickle: a legacy torch file of its own."""
        return read_pickle(memoryview(data))

    def _persistent(self, meta: Mapping[str, Any]) -> Record:
        """An object of EDM's persistent classes; meta["module_src"], the source of its class, is left alone."""
        if not isinstance(meta, Mapping) or meta.get("type") != "class":
            raise ValueError("a persistent object that is no class's")
        record = record_class(str(meta["class_name"]))()
        record.state = meta["state"]
        return record

    def _bytes(self, text: str, encoding: str) -> bytes:
        if encoding != "latin1":
            raise ValueError(f"bytes encoded as {encoding!r}")
        return text.encode("latin1")

    def _dtype(self, kind: str, *_: Any) -> "_Dtype":
        return _Dtype(kind)

    def _array(self, *_: Any) -> "_Array":
        return _Array()

    def _scalar(self, dtype: "_Dtype", data: bytes) -> int | float:
        return np.frombuffer(data, dtype.numpy)[0].item()


class _Dtype:
    """A numpy dtype of plain numbers, from its pickle."""

    def __init__(self, kind: str):
        if not re.fullmatch(r"[biuf][1248]", kind):
            raise ValueError(f"numpy numbers of the kind {kind!r}")
        self.numpy = np.dtype(kind)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.numpy = self.numpy.newbyteorder(state[1]) if state[1] in "<>" else self.numpy


class _Array:
    """A numpy array of plain numbers, from its pickle: `value` (a tensor cannot be made before its state comes)."""

    value: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if prod(shape) * dtype.numpy.itemsize != len(data):
            raise ValueError(f"an array of shape {tuple(shape)} in {len(data)} bytes")
        self.value = np.frombuffer(data, dtype.numpy).reshape(shape, order="F" if fortran else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.value if dtype is None else self.value.astype(dtype)
