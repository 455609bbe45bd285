"""Checkpoints of other projects, converted to ours: one module a format, each with

    read(file, ...) -> Converted

whose arguments are what the format does not say itself: the architecture's, the path's. `read` looks at plain data
alone (`pickles.read_state`), renames the weights to those of our network, and says which network, path and prediction
they belong to. Whether the weights fit that network is checked by whoever saves or loads it.
"""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from steadyflow.checkpoints.nodes import nearest, shown
from steadyflow.checkpoints.pickles import read_state, tensors_of

MARKS = {  # part of a weight's name -> the format it belongs to
    "input_blocks.0.0.weight": "adm",
    "temb.dense.0.weight": "ddpm",
    "all_modules.0.": "score_sde",
    "time_embedding.linear_1.weight": "diffusers",
    "_modules.enc._modules": "edm",
}

LARGEST = 2**14  # side of an image


@dataclass(frozen=True)
class Converted:
    """A checkpoint of another project as ours.

    Attributes:
        nodes: plain data {"network", "path", "denoiser"}, each {"_target_": ..., arguments}, as `save` takes them.
        state: the network's weights under our names; they may be views of the mapped file: read, do not write.
        shape: S of one sample, (C, H, W).
        num_classes: 0 without labels.
        card: plain data for people: what the file is, its architecture's name, what was left out of it.
    """

    nodes: Mapping[str, Any]
    state: Mapping[str, Tensor]
    shape: tuple[int, ...]
    num_classes: int = 0
    card: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_sizes(self.shape, self.num_classes)


def check_sizes(shape: Any, num_classes: Any) -> None:
    """That a file's shape of samples and number of classes are such.

    Raises:
        ValueError: they are not, or so large that a sample of them takes the memory.
    """
    whole = isinstance(shape, list | tuple) and all(isinstance(n, int) and 0 < n <= LARGEST for n in shape)
    if not whole or not isinstance(num_classes, int) or num_classes < 0:
        found = f"{shown(shape)} and {shown(num_classes)}"
        raise ValueError(f"a shape is of numbers from 1 to {LARGEST}, num_classes is 0 or more; found {found}")


def multiples(widths: Sequence[int], base: int) -> list[int | float]:
    """`channel_mult` of levels of these widths: whole numbers where they are."""
    return [w // base if w % base == 0 else w / base for w in widths]


def format_names() -> list[str]:
    """The formats there are."""
    return sorted(file.stem for file in Path(__file__).parent.glob("[a-z]*.py"))


def convert(file: str | Path, format: str, arguments: Mapping[str, Any]) -> Converted:
    """A file of another project as one of ours.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such format, arguments that it does not take, or another kind of file: which kind it looks like.
    """
    if format not in format_names():
        raise ValueError(
            f"no format {format!r}: there are {', '.join(format_names())}{nearest(format, format_names())}"
        )
    read = importlib.import_module(f"{__name__}.{format}").read
    known = {k: p for k, p in inspect.signature(read).parameters.items() if k != "file"}
    if wrong := sorted(arguments.keys() - known.keys()):
        raise ValueError(f"format {format} takes no argument {wrong[0]!r}{nearest(wrong[0], known)}")
    if lacking := [k for k, p in known.items() if p.default is p.empty and k not in arguments]:
        raise ValueError(
            f"format {format} needs the arguments {', '.join(lacking)}: +checkpoint.arguments.{lacking[0]}=..."
        )
    try:
        return read(Path(file), **arguments)
    except OSError:
        raise
    except Exception as error:  # whatever a damaged file, or one of another kind, leads to
        named = isinstance(error, ValueError) and str(file) in str(error)
        said = shown(str(error) if named else f"{file} does not read as {format}: {error!r}", 1000)
        try:
            like = looks_like(Path(file))
        except ValueError:  # said already
            like = None
        raise ValueError(said if like in (None, format) else f"{said}; it looks like format={like}") from error


def looks_like(file: Path) -> str | None:
    """The format that the names of a file's weights remind of, if any."""
    if not file.is_file():
        return "diffusers" if (file / "model_index.json").exists() or (file / "config.json").exists() else None
    names = tensors_of(read_state(file))
    return next((format for mark, format in MARKS.items() if any(mark in name for name in names)), None)
