"""Checkpoints of other projects, converted to ours: one module a format, each with

    read(file, ...) -> Converted

whose arguments are what the format does not say itself: the architecture's, the path's. `read` looks at plain data
alone (`pickles.read_state`), renames the weights to those of our network, and says which network, path and prediction
they belong to. Whether the weights fit that network is checked by whoever saves or loads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


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
