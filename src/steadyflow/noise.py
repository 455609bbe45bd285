"""Gaussian noise keyed by (seed, index, step)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class NoiseSource:
    """Standard Gaussian noise for a batch of samples, each a function of (seed, index, step) alone.

        z[b] = Philox(key = (seed, index[b]), counter = step)        ~ N(0, I),  shape (B, *S)

    Drawn on the CPU, whatever the device, so sample i is the same image for any batch size, number of devices or
    resume point. Step 0 is the starting noise; a sampler's k-th step uses step k = 1, 2, ...

    Args:
        seed: the run's seed, >= 0.
        index: the global index of each sample of the batch, B non-negative integers.
        shape: the shape S of one sample.
        device, dtype: where and in which precision the noise is returned; float64 noise is drawn in float64.
    """

    def __init__(
        self,
        seed: int,
        index: Sequence[int] | Tensor,
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.seed, self.index, self.shape = int(seed), [int(i) for i in index], tuple(shape)
        self.device, self.dtype = torch.device(device), dtype
        if self.seed < 0 or any(i < 0 for i in self.index):
            raise ValueError(f"seed and sample indices must be >= 0, got seed {seed} and indices from {min(self.index)}")

    def __len__(self) -> int:
        return len(self.index)

    def __call__(self, step: int) -> Tensor:
        """The noise z of one step, (B, *S)."""
        kind = np.float64 if self.dtype == torch.float64 else np.float32
        z = np.empty((len(self.index), *self.shape), kind)
        for row, index in zip(z, self.index, strict=True):
            bits = np.random.Philox(key=np.array([self.seed, index], np.uint64), counter=[0, 0, 0, step])
            np.random.Generator(bits).standard_normal(dtype=kind, out=row)
        return torch.from_numpy(z).to(self.device, self.dtype)
