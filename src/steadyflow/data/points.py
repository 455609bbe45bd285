"""Synthetic sets of points, each point a function of (seed, split, i)."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from steadyflow.data.images import SPLITS, check_split, content_hash


class InMemoryPoints(Dataset[tuple[Tensor, int]]):
    """Unlabelled vectors. Item i is (x (D,) float32 in the set's own units, 0).

    Attributes: `name`, `split`, `points` (N, D) float32, `num_classes` = 0, `shape` = (D,), and `fingerprint`, the
    sha256 of the points.
    """

    def __init__(self, name: str, split: str, points: Tensor):
        self.name, self.split, self.points, self.num_classes = name, check_split(split), points.to(torch.float32), 0
        self.shape = tuple(points.shape[1:])

    @cached_property
    def fingerprint(self) -> str:
        return content_hash(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.points[index], 0

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """The items of a batch (the data loader calls this where it exists)."""
        return [(x, 0) for x in self.points[torch.as_tensor(indices)].unbind()]


def uniforms(seed: int, split: str, count: int, columns: int, start: int = 0) -> np.ndarray:
    """Uniform numbers in the open interval (0, 1), (count, columns) float64, of the samples from `start` on.

        sample i = Philox(key = (seed, split), counter from i ceil(columns / 4))

    All are drawn in one call, four numbers of 64 bits a counter, and sample i's do not depend on `count`.
    """
    if seed < 0 or count < 1:
        raise ValueError(f"need seed >= 0 and a count >= 1, got seed {seed} and count {count}")
    blocks = -(-columns // 4)
    key = np.array([seed, SPLITS.index(check_split(split))], np.uint64)
    bits = np.random.Philox(key=key, counter=start * blocks).random_raw(count * blocks * 4)
    return ((bits >> np.uint64(12)).astype(np.float64).reshape(count, -1)[:, :columns] + 0.5) * 2.0**-52


def normals(u: np.ndarray) -> np.ndarray:
    """Standard Gaussian numbers from uniform ones, z = Phi^-1(u), in float64."""
    return torch.special.ndtri(torch.from_numpy(u)).numpy()
