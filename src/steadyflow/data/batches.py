"""Training batches as a pure function of (seed, step): what makes a killed run resume exactly.

Everything random about a training step (which images, how noisy, which noise, which labels are dropped) is keyed by the
seed and the position of the sample in the endless stream of training samples, with numpy's counter-based Philox. So the
numbers do not depend on the number of processes, of loader workers or of accumulated micro-batches, nor on whether the
run was interrupted.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

# Top counter words: separate streams, none of them a step that sampling's noise uses (those count from 0).
NOISE, COINS, ORDER, OFFSET = (2**32 + i for i in range(4))


class Batch(NamedTuple):
    """The samples of one micro-batch on one process, and all the randomness their loss needs.

    x0 (B, *S) and its label (B,) int64; eps ~ N(0, I), (B, *S), or (B, k C, *rest) for a state of k variables; u (B,)
    float64, uniform on [0, 1): the quantile of the time; drop (B,) float64, uniform: the label is dropped where drop <
    its probability; step: the micro-step.
    """

    x0: Tensor
    label: Tensor
    eps: Tensor
    u: Tensor
    drop: Tensor
    step: int


def philox(seed: int, key: int, stream: int) -> np.random.Generator:
    """The generator of (seed, key) in one stream."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, key], np.uint64), counter=[0, 0, 0, stream]))


class TrainingBatches:
    """The micro-batches of a training run, to be iterated once; an endless shuffled pass cut at `steps`.

    Position p = k B + j is sample j of optimiser step k. It shows item perm_e[p mod N] of the dataset, with perm_e the
    permutation of epoch e = p div N, so each item comes once an epoch and no remainder is dropped. The quantile of its
    time is u = (o_k + j / B) mod 1, o_k uniform: one stratified draw for the whole step (Kingma et al. 2021, App. I.1).

    Micro-batch a of A of a step takes the samples j = a mod A; of these, process r of R takes every R-th.

    The state is the number of micro-batches given out: `state_dict`, `load_state_dict`, which Lightning calls.

    Args:
        dataset: items (x, label).
        batch_size: B, samples of one optimiser step, over all processes and micro-batches.
        steps: optimiser steps of the run.
        seed: >= 0.
        accumulate: A.
        rank, world: r and R.
        workers: loader processes; 0 loads in this one.
        flip: mirror each image left to right with probability 1/2.
        pin: pin the memory of a batch, for copies to a GPU.
        variables: k of the state that eps is for.

    Raises:
        ValueError: an empty dataset, no steps, or a batch size that A x R does not divide.
    """

    def __init__(
        self,
        dataset: Dataset[tuple[Tensor, int]],
        batch_size: int,
        steps: int,
        seed: int,
        *,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        flip: bool = False,
        pin: bool = False,
        variables: int = 1,
    ):
        self.size = len(dataset)  # type: ignore[arg-type]
        if self.size == 0:
            raise ValueError("the training set is empty")
        if steps < 1:
            raise ValueError(f"max_steps must be a positive integer, got {steps}")
        if batch_size < 1 or batch_size % (accumulate * world):
            raise ValueError(
                f"batch_size {batch_size} must be a positive multiple of {accumulate * world}: it counts the samples "
                f"of a step over {world} process(es) and {accumulate} accumulated micro-batch(es)"
            )
        self.dataset, self.batch_size, self.steps, self.seed = dataset, batch_size, steps, seed
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.workers, self.flip, self.pin, self.variables = workers, flip, pin, variables
        self.given = 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            _Micro(self),
            sampler=range(self.given, len(self)),
            batch_size=None,
            num_workers=self.workers,
            pin_memory=self.pin,
        )
        for batch in loader:
            self.given += 1
            yield batch

    def batch(self, step: int) -> Batch:
        """The micro-batch of one micro-step on this process."""
        k, a = divmod(step, self.accumulate)
        j = np.arange(self.batch_size)[a :: self.accumulate][self.rank :: self.world]
        positions = k * self.batch_size + j
        x0, label = collate([self.dataset[self._item(int(p))] for p in positions])
        offset = philox(self.seed, k, OFFSET).random()
        coins = np.stack([philox(self.seed, int(p), COINS).random(2) for p in positions])
        if self.flip:
            x0 = torch.where(torch.from_numpy(coins[:, 1] < 0.5).view(-1, *[1] * (x0.ndim - 1)), x0.flip(-1), x0)
        u = (offset + j / self.batch_size) % 1.0
        eps = noise(self.seed, positions, state_shape(x0, self.variables))
        return Batch(x0, label, eps, torch.from_numpy(u), torch.from_numpy(coins[:, 0].copy()), step)

    def _item(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        if self._order[0] != epoch:
            self._order = (epoch, philox(self.seed, epoch, ORDER).permutation(self.size))
        return int(self._order[1][place])


class _Micro(Dataset[Batch]):
    """Micro-batches as the items of a map-style dataset, so that loader processes can make them ahead of time."""

    def __init__(self, batches: TrainingBatches):
        self.batches = batches

    def __getitem__(self, step: int) -> Batch:
        return self.batches.batch(step)


class HeldOutBatches:
    """Every item of a dataset once, in order, with noise and times that are the same each pass.

    Item i has quantile u = (i + 1/2) g mod 1, g the golden ratio (evenly spread over any range of items), and noise
    keyed by (seed, i). No label is dropped. Arguments as of TrainingBatches; `step` of the batches is 0.
    """

    def __init__(
        self,
        dataset: Dataset[tuple[Tensor, int]],
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        variables: int = 1,
    ):
        self.dataset, self.seed, self.batch_size, self.variables = dataset, seed, batch_size, variables
        self.index = np.arange(len(dataset))[rank::world]  # type: ignore[arg-type]

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self.index), self.batch_size):
            index = self.index[first : first + self.batch_size]
            x0, label = collate([self.dataset[int(i)] for i in index])
            u = torch.from_numpy(((index + 0.5) * 0.6180339887498949) % 1.0)
            eps = noise(self.seed, index, state_shape(x0, self.variables))
            yield Batch(x0, label, eps, u, torch.ones(len(index)).double(), 0)


def collate(items: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor]:
    """(x (B, *S), label (B,) int64) of a list of items (x, label)."""
    return torch.stack([x for x, _ in items]), torch.tensor([int(label) for _, label in items])


def state_shape(x0: Tensor, variables: int) -> tuple[int, ...]:
    """The shape (k C, *rest) of a state of k variables of the data's shape, stacked on the channels."""
    return (variables * x0.shape[1], *x0.shape[2:])


def noise(seed: int, keys: Sequence[int] | np.ndarray, shape: Sequence[int]) -> Tensor:
    """Standard Gaussian noise (B, *S), float32, each row a function of (seed, key) alone."""
    z = np.empty((len(keys), *shape), np.float32)
    for row, key in zip(z, keys, strict=True):
        philox(seed, int(key), NOISE).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(z)
