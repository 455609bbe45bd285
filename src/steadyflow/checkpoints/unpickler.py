"""What the names in pickles of weights stand for: tensors, arrays, containers, and records of all other classes."""

import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steadyflow.checkpoints.machine import Global, Machine, Record, Restored, Unreadable
from steadyflow.checkpoints.nodes import shown

MAGIC = 0x1950A86A20F9469CFC6C  # torch's, of its legacy files
AXES, REPEATED = 64, 2**20  # of a tensor: most axes, most numbers where strides repeat those of its storage
STORAGES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "Untyped": torch.uint8,
}
DTYPES = {str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
INERT = {  # classes whose objects are records
    *("argparse.Namespace", "dnnlib.util.EasyDict", "easydict.EasyDict", "types.SimpleNamespace"),
    *("torch.device", "torch.Tensor", "torch.nn.parameter.Parameter", "numpy.ndarray"),
}
Storages = Callable[[torch.dtype, str, int], Tensor | None]  # a dtype, key and count -> the numbers, (count,)


def read_pickle(data: memoryview) -> Any:
    """A legacy torch file or a plain pickle, in memory or mapped."""
    return Unpickler(data).file()


def read_zip(data: memoryview, records: Mapping[str, memoryview]) -> Any:
    """The pickle of a torch file that is a zip, with its storages by key."""

    def storage(dtype: torch.dtype, key: str, count: int) -> Tensor:
        if key not in records:
            raise Unreadable(f"damaged: it has no storage {shown(key)}")
        return _numbers(records[key], dtype, count, key)

    return Unpickler(data, storage).load()


class Unpickler(Machine):
    """Builds data alone.

    Args:
        data: the pickles.
        storages: what tensors stand on, outside the pickle; None where it has none.
        inside: whether this is a pickle in a pickle, which holds no further one.
    """

    def __init__(self, data: memoryview, storages: Storages | None = None, inside: bool = False):
        super().__init__(data)
        self.storages, self.inside = storages, inside
        self.known: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": lambda pairs=(): OrderedDict(self.pairs(pairs)),
            "collections.Counter": lambda counts: counts,
            "torch.Size": tuple,
            "torch._utils._rebuild_tensor": _tensor,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_tensor_v3": _tensor_of_bytes,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            "torch._tensor._rebuild_from_type_v2": lambda made, kind, arguments, state: self.call(made, arguments),
            "torch.storage._load_from_bytes": self._nested,
            "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
            "numpy.dtype": lambda kind, *_: _Dtype(kind),
            "_codecs.encode": _encoded,  # how protocol 2 writes bytes
            "builtins.bytes": lambda: b"",  # and empty ones
            "builtins.set": lambda members=(): {self.key(member) for member in members},
            "builtins.frozenset": lambda members=(): frozenset(self.key(member) for member in members),
            "builtins.complex": complex,
        }
        for core in ("numpy.core", "numpy._core"):
            self.known |= {f"{core}.multiarray._reconstruct": lambda *_: _Array(), f"{core}.multiarray.scalar": _scalar}
            self.known[f"{core}.numeric._frombuffer"] = _from_buffer

    def file(self) -> Any:
        """The object of a plain pickle, or of a legacy torch file.

        Such a file is five pickles (a magic number, the protocol's version, the sizes of C's types, the object, the
        keys of its storages) and then each storage, as its count and its numbers.
        """
        first = self.load()
        if not isinstance(first, int) or first != MAGIC:
            return first
        self.load(), self.load()
        start, numbers = self.place, self.numbers
        wanted: dict[str, tuple[torch.dtype, int]] = {}

        def note(dtype: torch.dtype, key: str, count: int) -> None:
            wanted.setdefault(key, (dtype, count))

        self.storages = note
        self.load()  # for what it wants: the numbers come last
        found = {}
        for key in self.load():
            dtype, count = wanted[key]
            (claimed,) = struct.unpack("<q", self.take(8))
            found[key] = _numbers(self.data[self.place :], dtype, count, key)
            if claimed != count:
                raise Unreadable(f"damaged: storage {shown(key)} should have {count} numbers, and says {claimed}")
            self.place += count * dtype.itemsize
        self.place, self.numbers, self.storages = start, numbers, lambda dtype, key, count: found[key]
        return self.load()

    def find(self, name: str) -> Any:
        if name in DTYPES:
            return DTYPES[name]
        if name in self.known:
            return Global(name, self.known[name])
        if name in INERT or _storage_type(name) or re.fullmatch(r"torch\.nn\.modules\.[a-z]+\.[A-Z]\w*", name):
            return Global(name, partial(Record, name))
        needs = "weights need no more than tensors and numbers"
        raise Unreadable(f"refused: the pickle asks for {shown(name)}, which could run code; {needs}")

    def persistent(self, description: Any) -> Tensor | Global | None:
        known = isinstance(description, tuple) and len(description) < 7 and description[5:] in ((), (None,))
        match description[:5] if known else ():
            case ("module", Global() as network, _, _):  # and the text of its source, in a legacy file
                return network
            case ("storage", Global(name=name), str(key), _, count) if dtype := _storage_type(name):
                pass
            case _:
                raise Unreadable("damaged: what stands outside the pickle is no storage")
        if self.storages is None:
            raise Unreadable("a plain pickle that refers to storages outside it")
        return self.storages(dtype, key, _whole([count])[0])

    def _nested(self, data: bytes | memoryview) -> Any:
        """A storage inside a plain pickle: a legacy torch file of its own."""
        if self.inside:
            raise Unreadable("refused: a pickle in a pickle in a pickle")
        reader = Unpickler(memoryview(data), inside=True)
        reader.left, reader.numbers, reader.copies = self.left, self.numbers, self.copies
        found = reader.file()
        self.left, self.numbers, self.copies = reader.left, reader.numbers, reader.copies
        return found


def _storage_type(name: str) -> torch.dtype | None:
    match = re.fullmatch(r"torch\.(?:cuda\.|storage\.)?([A-Z]\w*)Storage", name)
    return STORAGES.get(match[1]) if match else None


def _whole(numbers: Sequence[Any]) -> list[int]:
    """Sizes, if that is what they are: with anything else in their place a product could take all memory or time."""
    if len(numbers) > AXES or not all(isinstance(n, int) and 0 <= n < 2**62 for n in numbers):
        raise Unreadable(f"damaged: a shape that is not of {AXES} whole numbers or fewer")
    return list(numbers)


def _numbers(data: memoryview, dtype: torch.dtype, count: int, key: str) -> Tensor:
    """The first numbers of a storage's bytes as a tensor (count,), without a copy."""
    if count * dtype.itemsize > len(data):
        there = f"{len(data)} bytes are there"
        raise Unreadable(f"truncated: storage {shown(key)} should have {count} numbers of {dtype}, {there}")
    return torch.frombuffer(data, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)


def _tensor(storage: Tensor | None, offset: int, size: Any, stride: Any, *rest: Any) -> Tensor | None:
    """A view of a storage; None where the storage is not known yet."""
    if storage is None:
        return None
    size, stride, (offset,) = _whole(size), _whole(stride), _whole([offset])
    if not isinstance(storage, Tensor) or storage.ndim != 1 or len(size) != len(stride) or any(rest[2:]):
        raise Unreadable("damaged: a tensor of a kind that weights never have")
    last = offset + sum((n - 1) * s for n, s in zip(size, stride)) if prod(size) else offset - 1
    if last >= len(storage) or prod(size) > max(len(storage), REPEATED):
        raise Unreadable(f"damaged: a tensor of shape {shown(tuple(size))} on a storage of {len(storage)} numbers")
    return storage.as_strided(size, stride, offset)


def _tensor_of_bytes(storage: Tensor | None, *rest: Any) -> Tensor | None:
    *view, _, _, dtype = rest[:6]
    return _tensor(None if storage is None else storage.view(dtype), *view)


def _persistent(meta: Any) -> Record:
    """An object of EDM's persistent classes; meta["module_src"], the source of its class, is left alone."""
    if not isinstance(meta, Mapping) or meta.get("type") != "class" or not isinstance(meta.get("class_name"), str):
        raise Unreadable("damaged: a persistent object that is no class's")
    return Record(shown(meta["class_name"]), state=meta["state"])


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise Unreadable("refused: bytes in an encoding other than latin1")
    return text.encode("latin1")


def _scalar(dtype: "_Dtype", data: bytes | memoryview) -> int | float:
    return np.frombuffer(data, dtype.numpy)[0].item()


def _from_buffer(data: memoryview, dtype: "_Dtype", shape: Any, order: str) -> "_Array":
    """How protocol 5 writes an array."""
    array = _Array()
    array.restore((1, shape, dtype, order == "F", data))
    return array


class _Dtype(Restored):
    """A numpy dtype of plain numbers, from its pickle."""

    def __init__(self, kind: str):
        if not re.fullmatch(r"[biuf][1248]", kind):
            raise Unreadable(f"numpy numbers of the kind {shown(kind)}")
        self.numpy = np.dtype(kind)

    def restore(self, state: Any) -> None:
        self.numpy = self.numpy.newbyteorder(state[1]) if state[1] in ("<", ">") else self.numpy


class _Array(Restored):
    """A numpy array of plain numbers, from its pickle: `value` (a tensor cannot be made before its state comes)."""

    value = np.empty(0)

    def restore(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if prod(_whole(shape)) * dtype.numpy.itemsize != len(data):
            raise Unreadable(f"damaged: an array of shape {shown(shape)} in {len(data)} bytes")
        self.value = np.frombuffer(data, dtype.numpy).reshape(shape, order="F" if fortran else "C")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.value if dtype is None else self.value.astype(dtype)
