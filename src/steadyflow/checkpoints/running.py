"""How a loaded network runs: its precision, its memory, its speed; what it computes stays the same."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


@dataclass(frozen=True)
class Running:
    """Options of a network, whatever precision its file has.

    Attributes:
        precision: of the weights and the work inside the network: fp32, bf16, fp16 or fp64; states and coefficients of
            a sampler stay float32 and float64. None: as loaded.
        channels_last: memory format of the convolutions: faster on tensor cores.
        compile: by torch.compile, at the first call.
        checkpoint_activations: recompute activations in the backward pass: for guidance that differentiates a large
            network.
        max_batch: rows that the network takes at a time, so that a large batch of a sampler fits; None: all; "auto":
            all, and half as many whenever a GPU's memory does not suffice. Under guidance that differentiates the
            network the activations of all rows are kept: that takes checkpoint_activations, or a smaller batch.

    Raises:
        ValueError: a value of another kind; in the call, a network that cannot recompute activations.
    """

    precision: str | None = None
    channels_last: bool = False
    compile: bool = False
    checkpoint_activations: bool = False
    max_batch: int | str | None = None

    def __post_init__(self) -> None:
        if self.precision not in (None, *PRECISIONS):
            raise ValueError(f"precision must be {', '.join(PRECISIONS)} or null, got {self.precision!r}")
        for name in ("channels_last", "compile", "checkpoint_activations"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {value!r}")
        if not (self.max_batch in (None, "auto") or (type(self.max_batch) is int and self.max_batch >= 1)):
            raise ValueError(f"max_batch must be at least 1, auto or null, got {self.max_batch}")

    def __call__(self, network: nn.Module) -> None:
        """Sets a network up, in place."""
        if self.precision is not None:
            network.to(PRECISIONS[self.precision])
        if self.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.checkpoint_activations:
            able = [module for module in network.modules() if hasattr(module, "checkpoint_activations")]
            if not able:
                raise ValueError(
                    f"{type(network).__name__} cannot recompute activations; set checkpoint_activations=false, and "
                    "max_batch to what fits"
                )
            for module in able:
                module.checkpoint_activations = cast(Any, True)
        if self.max_batch is not None:
            network.max_batch = cast(Any, self.max_batch)
        if self.compile:
            network.compile()
