"""model.safetensors, written and read a tensor at a time: neither takes memory beyond the tensor in hand."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from steadyflow.data.image_writing import whole_file

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped: a page is read when it is first used, and shared while it is not
    written to.

    Raises:
        ValueError: another kind of file.
    """
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        with file.open("rb") as stream:
            head = stream.read(4)
        pickled = head == b"PK\x03\x04" or head[:1] == b"\x80"
        kind = "a pickle, which can hold code and is never loaded" if pickled else str(error)
        raise ValueError(f"{file} is no safetensors file: {kind}") from error


def write_weights(file: Path, state: Mapping[str, Tensor], kinds: Mapping[str, torch.dtype]) -> str:
    """Writes a state dict, whole or not at all.

    Args:
        file: of the format of huggingface.co/docs/safetensors: length of the header, header, tensors.
        state: tensors, mapped ones too.
        kinds: of those that have another precision in the file, by name.

    Returns:
        sha256 of the file.
    """
    digest = hashlib.sha256()
    with whole_file(file) as temporary, temporary.open("wb") as stream:
        for part in _parts(state, {key: kinds.get(key, value.dtype) for key, value in state.items()}):
            digest.update(part)
            stream.write(part)
    return digest.hexdigest()


def _parts(state: Mapping[str, Tensor], kinds: Mapping[str, torch.dtype]) -> Iterator[bytes | memoryview]:
    if unknown := [key for key, kind in kinds.items() if kind not in NAMES]:
        raise ValueError(f"weight {unknown[0]} is of {kinds[unknown[0]]}, which is not written; give a dtype")
    order = sorted(state, key=lambda key: (-kinds[key].itemsize, key))  # wide numbers first: all are aligned
    header, end = {}, 0
    for key in order:
        begin, end = end, end + state[key].numel() * kinds[key].itemsize
        header[key] = {"dtype": NAMES[kinds[key]], "shape": list(state[key].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for key in order:
        value = state[key].detach().to("cpu", kinds[key]).contiguous()
        yield value.reshape(-1).view(torch.uint8).numpy().data
