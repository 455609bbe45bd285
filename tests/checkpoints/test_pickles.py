"""Weights of strangers are read as data: equal to what was written, and nothing in them runs."""

import argparse
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

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
        "tied": [half, half.T, half[1:, ::2], torch.randn(2, 0, 3), torch.tensor(2.5)],
        "more": (torch.arange(5), torch.tensor([True, False]), torch.randn(3).bfloat16(), nn.Parameter(torch.ones(2))),
        "args": argparse.Namespace(lr=1e-4, name="x"),
        "plain": {"step": 3, "on": True, "none": None, "text": "ü", "shape": torch.Size([2, 3])},
    }
    WRITERS[kind](written, tmp_path / "file")
    found = read_state(tmp_path / "file")
    assert list(found) == list(written)
    for key, value in net.state_dict().items():
        assert torch.equal(found["ema"][key], value)
    for key in ("tied", "more"):
        for a, b in zip(found[key], written[key], strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
    assert found["args"].name == "argparse.Namespace"
    assert found["args"].state == vars(written["args"])
    assert found["plain"] == written["plain"]


def test_safetensors_and_numpy(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a.b": torch.arange(6.0)}, tmp_path / "file")
    assert torch.equal(read_state(tmp_path / "file")["a.b"], torch.arange(6.0))
    array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    plain({"a": array, "b": np.float32(2.5), "c": np.arange(3, dtype=">i4")}, tmp_path / "file")
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
