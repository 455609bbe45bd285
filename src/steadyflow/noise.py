"""Gaussian noise keyed by (seed, index, step)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class NoiseSource:
    """Standard Gaussian noise for a batch of samples, each a function of (seed, index, step) alone.

        z[b] = Philox(key = (seed, index[b]), counter = step)        ~ N(0, I),  shape (B, *S)

    Drawn on the CPU, whatever the device, so sample i is the same image for any batch size, number of devices or
    resume point, and the same to rounding in every precision. Step 0 is the starting noise; a sampler's k-th step
    uses step k = 1, 2, ...

    Args:
        seed: the run's seed, 0 <= seed < 2^64.
        index: the global index of each sample of the batch, B integers, 0 <= index < 2^64.
        shape: the shape S of one sample.
        device, dtype: where and in which precision the noise is returned. It is drawn in float32.

    Raises:
        ValueError: a seed or an index out of range.
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
        for value in (self.seed, *self.index):
            if not 0 <= value < 2**64:
                raise ValueError(f"the seed and the sample indices must lie in [0, 2^64), got {value}")

    def __len__(self) -> int:
        return len(self.index)

    def __call__(self, step: int) -> Tensor:
        """The noise z of one step, (B, *S)."""
        z = np.empty((len(self.index), *self.shape), np.float32)
        for row, index in zip(z, self.index, strict=True):
            bits = np.random.Philox(key=np.array([self.seed, index], np.uint64), counter=[0, 0, 0, step])
            np.random.Generator(bits).standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(z).to(self.device, self.dtype)
