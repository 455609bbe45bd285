"""What an operator knows once: tensors copied to each device and precision, and randomness keyed by a seed."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor


class Constants:
    """Named tensors, kept as they are given (float64, CPU) and copied once to each (device, dtype) that asks.

    Real tensors are cast to the dtype asked for, complex ones to its complex partner, indices and masks not at all.
    """

    def __init__(self, **tensors: Tensor):
        # A tensor born in inference mode could never be used under autograd, so neither these nor the copies are.
        with torch.inference_mode(False):
            self._tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._copies: dict[tuple[torch.device, torch.dtype], SimpleNamespace] = {}

    def __call__(self, device: torch.device, dtype: torch.dtype) -> SimpleNamespace:
        key = (device, dtype)
        if key not in self._copies:
            with torch.inference_mode(False):
                copies = {name: t.to(device, _partner(t, dtype)) for name, t in self._tensors.items()}
            self._copies[key] = SimpleNamespace(**copies)
        return self._copies[key]


def _partner(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    if tensor.is_complex():
        return dtype.to_complex()
    return dtype if tensor.is_floating_point() else tensor.dtype


def keyed(seed: int) -> np.random.Generator:
    """Random numbers that depend on the seed alone, on every machine: Philox with key (seed, 0).

    Raises:
        ValueError: unless 0 <= seed < 2^64.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"the seed must lie in [0, 2^64), got {seed}")
    return np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64)))
