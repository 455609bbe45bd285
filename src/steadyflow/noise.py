"""Gaussian noise keyed by (seed, index, step)."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

STREAM = "Philox 4x64, Box-Muller"  # how noise is made: a run begun with another way is not to be continued


class NoiseSource:
    """Standard Gaussian noise for a batch of samples, each a function of (seed, index, step) alone.

        u, v = the next n/2 pairs of signed 32-bit words of Philox(key = (seed, index), counter = step n / 8),  n = |S|
        z[b] = (r cos a, r sin a) ~ N(0, I),  r = sqrt(-2 log((|u| + 1/2) / 2^31)),  a = 2 pi v / 2^32,  shape (B, *S)

    (n rounded up to a multiple of 8). Drawn on the CPU, whatever the device, so sample i is the same image, to
    rounding, for any batch size, number of devices or resume point, and in every precision. Step 0 is the starting
    noise; a sampler's k-th step uses step k = 1, 2, ... Steps taken in order cost least.
    Source: Salmon et al. 2011 (Philox 4x64); Box & Muller 1958.

    Args:
        seed: the run's seed, 0 <= seed < 2^64.
        index: the global index of each sample of the batch, B integers, 0 <= index < 2^64.
        shape: the shape S of one sample.
        device, dtype: where and in which precision the noise is returned. It is drawn in float32.
        stream: the counter's top word, for noise that is none of sampling's, whatever the steps.

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
        stream: int = 0,
    ):
        self.seed, self.index, self.shape = int(seed), [int(i) for i in index], tuple(shape)
        self.device, self.dtype, self.stream = torch.device(device), dtype, stream
        for value in (self.seed, *self.index):
            if not 0 <= value < 2**64:
                raise ValueError(f"the seed and the sample indices must lie in [0, 2^64), got {value}")
        self._streams: list[np.random.Philox] = []
        self._next = -1  # the step that the streams stand at

    def __len__(self) -> int:
        return len(self.index)

    def __call__(self, step: int) -> Tensor:
        """The noise z of one step, (B, *S)."""
        size = math.prod(self.shape)
        words = -(-size // 8) * 4  # of 64 bits; the generator makes four at a time
        if step != self._next:
            start = np.array([step * words // 4, 0, 0, self.stream], np.uint64)
            self._streams = [
                np.random.Philox(key=np.array([self.seed, i], np.uint64), counter=start) for i in self.index
            ]
        self._next = step + 1
        raw = np.empty((len(self.index), words), np.uint64)
        for row, stream in zip(raw, self._streams, strict=True):
            row[:] = stream.random_raw(words)
        bits = torch.from_numpy(raw.view(np.int32)).float()  # uniform on [-2^31, 2^31)
        u, angle = bits[:, :words], bits[:, words:].mul_(2 * math.pi / 2**32)
        r = u.abs_().add_(0.5).mul_(2.0**-31).log_().mul_(-2).sqrt_()
        z = torch.empty_like(bits)
        for half, wave in ((z[:, :words], torch.cos), (z[:, words:], torch.sin)):
            wave(angle, out=half).mul_(r)
        return z[:, :size].reshape(len(self.index), *self.shape).to(self.device, self.dtype)
