"""Weights of strangers are read as data: equal to what was written, and nothing in them runs."""

import argparse
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from steadyflow.checkpoints.formats import convert
from steadyflow.checkpoints.machine import Record
from steadyflow.checkpoints.pickles import read_state


def legacy(obj: Any, file: Path) -> None:
    torch.save(obj, file, _use_new_zipfile_serialization=False)


def plain(obj: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(obj))


WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "zip": lambda obj, file: torch.save(obj, file),
    "legacy": legacy,
    "plain": plain,
}


class Module:
    """Pickles as EDM's persistent classes do: source code, class name and state."""

    def __init__(self, source: str, name: str, state: dict[str, Any]):
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": name, "state": state}

    def __reduce__(self) -> tuple:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def persistent(network: nn.Module, source: str) -> Module:
    """A torch module in EDM's dress: plain containers inside stay torch's own."""
    state = dict(vars(network)) | {"_modules": {k: persistent(m, source) for k, m in network.named_children()}}
    return Module(source, type(network).__name__, state)


@pytest.mark.parametrize("kind", WRITERS)
def test_what_was_written_is_read(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    half = torch.randn(3, 5).half()
    written = {
        "ema": net.state_dict(),
        "module": net,
        "tied": [half, half.T, half[1:, ::2], torch.randn(2, 0, 3), torch.tensor(2.5), torch.ones(1).expand(4)],
        "more": (torch.arange(5), torch.tensor([True, False]), torch.randn(3).bfloat16(), nn.Parameter(torch.ones(2))),
        "args": argparse.Namespace(lr=1e-4, name="x"),
        "plain": {"step": 3, "on": True, "none": None, "text": "ü", "shape": torch.Size([2, 3])},
    }
    WRITERS[kind](written, tmp_path / "file")
    found = read_state(tmp_path / "file")
    assert list(found) == list(written)
    for key, value in net.state_dict().items():
        assert torch.equal(found["ema"][key], value)
        assert torch.equal(found["module"].tensors()[key], value)
    for key in ("tied", "more"):
        for a, b in zip(found[key], written[key], strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
    assert found["args"].name == "argparse.Namespace"
    assert found["args"].state == vars(written["args"])
    assert found["plain"] == written["plain"]


@pytest.mark.parametrize("protocol", [4, 5])
def test_safetensors_and_numpy(protocol: int, tmp_path: Path) -> None:
    safetensors.torch.save_file({"a.b": torch.arange(6.0)}, tmp_path / "file")
    assert torch.equal(read_state(tmp_path / "file")["a.b"], torch.arange(6.0))
    array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    data = {"a": array, "b": np.float32(2.5), "c": np.arange(3, dtype=">i4")}
    (tmp_path / "file").write_bytes(pickle.dumps(data, protocol))
    found = read_state(tmp_path / "file")
    assert np.array_equal(found["a"].value, array)
    assert found["b"] == 2.5
    assert np.array_equal(found["c"].value, [0, 1, 2])


@pytest.mark.usefixtures("persistence")
def test_an_edm_pickle_is_read_and_its_code_is_not_run(tmp_path: Path) -> None:
    """35.7 million parameters in EDM's dress; the embedded source would leave a mark, as reading it by pickle shows."""
    mark = tmp_path / "executed"
    source = f"import pathlib; pathlib.Path({str(mark)!r}).touch()"
    net = nn.Sequential(nn.ModuleDict({"32x32_conv": nn.Conv2d(3, 128, 3)}), nn.Linear(8192, 4352))
    plain({"ema": persistent(net, source), "loss_fn": None}, tmp_path / "edm.pkl")
    assert sum(p.numel() for p in net.parameters()) > 35.6e6
    found = read_state(tmp_path / "edm.pkl")
    assert not mark.exists()
    assert isinstance(found["ema"], Record)
    assert found["ema"].name == "Sequential"
    for key, value in net.state_dict().items():
        assert torch.equal(found["ema"].tensors()[key], value)
    pickle.loads((tmp_path / "edm.pkl").read_bytes())
    assert mark.exists()


class Hostile:
    """os.system in __reduce__."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.usefixtures("persistence")
@pytest.mark.parametrize("kind", [*WRITERS, "persistent"])
def test_a_hostile_file_is_refused_by_the_name_of_what_it_asks_for(kind: str, tmp_path: Path) -> None:
    mark, file = tmp_path / "executed", tmp_path / "file"
    hostile: Any = {"model": {"weight": torch.ones(3)}, "x": Hostile(mark)}
    write = WRITERS.get(kind, plain)
    write(Module("", "Net", hostile) if kind == "persistent" else hostile, file)
    with pytest.raises(ValueError, match=rf"^{file}: refused: the pickle asks for posix\.system, which could run code"):
        read_state(file)
    assert not mark.exists()


@pytest.mark.parametrize(
    "target",  # bytearray(10**12) is memory
    ["builtins.eval", "builtins.getattr", "builtins.bytearray", "torch.load", "torch.hub.load", "torch.nn.Module"],
)
def test_other_globals_are_refused_too(target: str, tmp_path: Path) -> None:
    module, _, name = target.rpartition(".")
    (tmp_path / "file").write_bytes(b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X\x01\x00\x00\x001\x85R.")
    with pytest.raises(ValueError, match=f"asks for {target}"):
        read_state(tmp_path / "file")


def test_a_file_cannot_change_what_reads_the_next(tmp_path: Path) -> None:
    """BUILD with a pair sets attributes on whatever stands on the stack: here on the classes that hold records."""
    good = {"args": argparse.Namespace(a=1)}
    attack = b"\x80\x02cargparse\nNamespace\n(N}X\x0c\x00\x00\x00__setstate__NstR"  # never ends well, whatever it does
    (tmp_path / "bad").write_bytes(attack)
    with pytest.raises(ValueError):
        read_state(tmp_path / "bad")
    plain(good, tmp_path / "good")
    assert read_state(tmp_path / "good")["args"].state == {"a": 1}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_is_as_python_reads_it(protocol: int, tmp_path: Path) -> None:
    shared = {"lr": 1e-4, "betas": (0.9, 0.999), -7: None}
    data: dict[str, Any] = {"a": [shared, shared, [], {}, (), (1,), (1, 2), (1, 2, 3, 4)]}
    data |= {"n": [0, 255, 256, 65536, -1, 2**31, -(2**70)]}
    data |= {"sets": [set(), {1, 2}, frozenset([3])], "t": ["", "ü", "x" * 300], "b": [True, False, 1 + 2j, -0.5]}
    data |= {"bytes": [b"", b"\xff\x00", b"y" * 300], "more": [OrderedDict(a=1, b=[2]), *range(1500)]}
    (tmp_path / "file").write_bytes(pickle.dumps(data, protocol))
    found = read_state(tmp_path / "file")
    assert found == pickle.loads((tmp_path / "file").read_bytes())
    assert found["a"][0] is found["a"][1]


def name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


LAUGHS = b"".join(b"(" + 9 * (b"h" + bytes([k])) + b"tq" + bytes([k + 1]) for k in range(30))
PERSISTENT = name("torch_utils.persistence", "_reconstruct_persistent_obj")
STORAGE = text("storage") + name("torch", "FloatStorage") + text("0") + text("cpu") + b"K\x00"
BUFFER, UINT8 = name("numpy.core.numeric", "_frombuffer"), name("numpy", "dtype") + text("u1") + b"\x85R"
LONG_LIST, CALLS = b"](" + b"N" * 40000 + b"e\x85q\x01(", b"h\x00h\x01R" * 500
INSIDE = b"\x80\x02" + name("torch", "Size") + b"q\x00](" + b"N" * 9000 + b"e\x85q\x01(" + b"h\x00h\x01R" * 99 + b"t."
NESTED = b"q\x00B" + struct.pack("<I", len(INSIDE)) + INSIDE + b"\x85q\x01(" + b"h\x00h\x01R" * 5


@pytest.mark.parametrize("kind", ["plain", "zip"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x96" + struct.pack("<Q", 2**40) + b"abc.", "truncated: it asks for 1099511627776 bytes at byte 11, and 4 "),
        (b"\x8d" + struct.pack("<Q", 2**63) + b"abc.", "truncated: it asks for 9223372036854775808 bytes"),
        (b"\x8b\xff\xff\xff\x7fabc.", "the instruction LONG4, which weights never need"),
        (b"h\x09.", "damaged: it asks for what it never put at 9"),
        (b"}" + b")" + b"\x85" * 10**4 + b"K\x01s.", "keys are texts and some numbers, here a tuple"),
        (b"]" * 10**4 + b"a" * 9999 + b".", "nested more than 100 deep, or in itself"),
        (b"]q\x00h\x00a.", "nested more than 100 deep, or in itself"),
        (b"](K\x01tq\x00" + LAUGHS + b".", "it repeats its parts until they are too deep or too large"),
        (name("torch", "Size") + b"q\x00" + LONG_LIST + CALLS + b"t.", "it copies its parts again and again"),
        (b"\x82\x01.", "the instruction EXT1, which weights never need"),
        (b"(ios\nsystem\n.", "the instruction INST, which weights never need"),
        (b"\xf0.", r"damaged: b'\\xf0' at byte 2 of the pickle is no instruction"),
        (name("torch", "float32") + b")R.", "damaged: it calls a dtype"),
        (name("torch._utils", "_rebuild_tensor_v2") + b"}b.", "damaged: it gives a state to a Global"),
        (text("x") + b"Q.", "damaged: what stands outside the pickle is no storage"),
        (b"(" + STORAGE + b"NNtQ.", "damaged: what stands outside the pickle is no storage"),
        (
            BUFFER + b"(C\x01\x00" + UINT8 + b"(" + 65 * b"K\x01" + b"tX\x01\x00\x00\x00CtR.",
            "a shape that is not of 64",
        ),
        (name("builtins", "slice") + b")R.", "asks for builtins.slice"),  # in one another, they overflow the C stack
        (name("torch.storage", "_load_from_bytes") + NESTED + b"t.", "it copies its parts again and again"),
        (PERSISTENT + b"}" + text("type") + text("class") + b"s\x85R.", "a persistent object that is no class's"),
        (text("o\ns" * 10**4) + text("system") + b"\x93.", r"asks for o\\nso\\nso\S{71}, which could run code"),
        (b"K\x01", "truncated: it asks for 1 bytes at byte 4"),
    ],
)
def test_an_attack_is_one_line(data: bytes, message: str, kind: str, tmp_path: Path) -> None:
    """Lengths, places, depths and repetitions that would take memory or crash whoever believes them; damage."""
    file, data = tmp_path / "file", b"\x80\x02" + data
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", data)
    else:
        file.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_state(file)
    line = str(caught.value)
    assert line.startswith(str(file))
    assert line.isprintable()
    assert len(line) < len(str(file)) + 300
    with pytest.raises(ValueError) as caught:  # whichever format is asked for
        convert(file, "edm", {})
    assert str(caught.value) == line


@pytest.mark.parametrize("kind", WRITERS)
def test_a_truncated_file_is_named(kind: str, tmp_path: Path) -> None:
    WRITERS[kind]({"a": torch.randn(1000), "b": 2}, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    for length in (len(data) // 5, len(data) // 2, len(data) - 8):
        (tmp_path / "file").write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"^{tmp_path}/file(:| is) truncated|damaged") as caught:
            read_state(tmp_path / "file")
        assert "\n" not in str(caught.value)


def test_sizes_are_checked_before_memory_is_taken(tmp_path: Path) -> None:
    """Terabytes that a file of a kilobyte claims: a storage beyond its end, and a number repeated by a stride of 0."""
    legacy({"a": torch.ones(5, dtype=torch.float64)}, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    claim = struct.pack("<q", 2**40)
    (tmp_path / "file").write_bytes(
        data.replace(b"K\x05N", b"\x8a\x06" + claim[:6] + b"N")
    )  # the persistent id's count
    with pytest.raises(ValueError, match=r"truncated: storage .* should have 1099511627776 numbers"):
        read_state(tmp_path / "file")
    for kind in ("zip", "legacy"):
        WRITERS[kind]({"a": torch.ones(1).expand(10**9)}, tmp_path / "file")
        with pytest.raises(ValueError, match=r"shape \(1000000000,\) on a storage of"):
            read_state(tmp_path / "file")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"<!DOCTYPE html><html>sign in", "this is a web page, not the weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "this is a Git LFS pointer"),
        (b"hello, world", "no torch file, pickle or safetensors file: it begins with b'hello, w'"),
    ],
)
def test_other_files_are_named(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_state(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_state(tmp_path / "none")


def test_a_compressed_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "file", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 10000)
    with pytest.raises(ValueError, match="compressed zip"):
        read_state(tmp_path / "file")
