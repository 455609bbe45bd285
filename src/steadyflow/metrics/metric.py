"""What a metric of an evaluation is: a torchmetrics.Metric fed with named tensors of a batch of images."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from steadyflow.metrics.reference import Sources


class EvaluationMetric(Metric, ABC):
    """A number, or a few, about a set of images.

    States are float64 sums or stored rows, so they are the same for any batch size; torchmetrics synchronises them over
    the processes of a run when `compute` is called. Where a random draw enters (subsets, bootstrap), it comes from the
    metric's own seed and from rows sorted by image index, so the number does not depend on who held which image.

    Attributes:
        keys: the numbers `compute` returns, the main one first.
        needs: which tensors of a batch `update` takes, by name, among
            index (B,) int64; images (B, C, H, W) uint8; features (B, dim); probabilities (B, K); label (B,) int64;
            target (B, C, H, W) uint8, the paired images.
    """

    full_state_update: ClassVar[bool] = False  # type: ignore[misc]
    keys: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]]

    def prepare(self, sources: Sources) -> None:
        """Takes what the metric compares with; called once, before the first update.

        Raises:
            FileNotFoundError: weights or data that are not on this machine.
            ValueError: a reference this metric cannot use.
        """

    def protocol(self) -> dict[str, Any]:
        """What a reader must know to compare the number with another, beside the feature net and the count."""
        return {}

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """The numbers under `keys`, float64 scalars.

        Raises:
            ValueError: too few images for the metric.
        """


class StoredMetric(EvaluationMetric, ABC):
    """A metric that keeps a row per image, in the dtype given, and sees the rows in the order of the images' index."""

    row_state: list[Tensor] | Tensor
    index_state: list[Tensor] | Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("row_state", default=[], dist_reduce_fx="cat")
        self.add_state("index_state", default=[], dist_reduce_fx="cat")

    def store(self, index: Tensor, rows: Tensor) -> None:
        """Adds rows (B, ...) of the images `index` (B,)."""
        assert isinstance(self.row_state, list)
        assert isinstance(self.index_state, list)
        self.row_state.append(rows.detach())
        self.index_state.append(index.detach().to(rows.device))

    def rows(self) -> Tensor:
        """All rows (N, ...), sorted by index. Raises ValueError when an image was given twice or none was."""
        if len(self.row_state) == 0:
            raise ValueError(f"{self.keys[0]}: no images were given")
        index, order = dim_zero_cat(self.index_state).sort()
        if (index.diff() == 0).any():
            raise ValueError(f"{self.keys[0]}: image {int(index[:-1][index.diff() == 0][0])} was given twice")
        return dim_zero_cat(self.row_state)[order]

    def indices(self) -> Tensor:
        """The index (N,) of each row, sorted."""
        return dim_zero_cat(self.index_state).sort().values


class PerImageMetric(StoredMetric, ABC):
    """The mean over images of a number that each image has by itself, and its standard deviation.

    `keys` are the number's name and name_std: over the images (divided by N - 1), absent for a single one.
    """

    def per_image(self) -> tuple[Tensor, Tensor]:
        """The index (N,) and the number (N,) of each image of this process, sorted by index."""
        return self.indices(), self.rows()

    def compute(self) -> dict[str, Tensor]:
        rows = self.rows()
        spread = {self.keys[1]: rows.std()} if len(rows) > 1 else {}
        return {self.keys[0]: rows.mean()} | spread


def generator(seed: int) -> torch.Generator:
    """A CPU generator: the same draws on every device."""
    return torch.Generator().manual_seed(seed)
