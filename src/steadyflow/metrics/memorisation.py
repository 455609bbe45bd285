"""Do the samples copy the training set?"""

from typing import Any

import torch
from torch import Tensor

from steadyflow.metrics.metric import StoredMetric
from steadyflow.metrics.reference import Sources

BLOCK = 4096  # images in float64 at once


class Memorisation(StoredMetric):
    """Median over the images of (distance to the nearest training image) / (distance to the nearest held-out image).

    Euclidean distance between pixels. A generator that copies its training set gives 0; one that draws from the
    distribution gives about `memorisation_held_out`, the same median for the held-out images themselves (their nearest
    held-out image being another one). The yardstick lies below 1 wherever there are more training images than held-out
    ones, and the measure needs the yardstick to be read. Infinite where the images are held-out images themselves.
    """

    keys = ("memorisation", "memorisation_held_out")
    needs = ("index", "images")

    def __init__(self) -> None:
        super().__init__()
        self.reference: tuple[Tensor, Tensor] | None = None
        self.source = ""

    def prepare(self, sources: Sources) -> None:
        train, test = sources.images("train"), sources.images("test")
        self.set_reference(train, test, f"train ({len(train)}) and test ({len(test)}) images")

    def set_reference(self, train: Tensor, held_out: Tensor, source: str = "given") -> None:
        """The images (N, C, H, W) that were and were not trained on."""
        if len(train) < 1 or len(held_out) < 2:
            raise ValueError(f"memorisation: needs training and 2 held-out images, got {len(train)}, {len(held_out)}")
        self.reference, self.source = (train, held_out), source

    def _reference(self) -> tuple[Tensor, Tensor]:
        assert self.reference is not None, "prepare() or set_reference() comes first"
        return self.reference

    def update(self, index: Tensor, images: Tensor) -> None:
        train, held_out = self._reference()
        if images.shape[1:] != train.shape[1:]:
            raise ValueError(
                f"memorisation: images are {tuple(images.shape[1:])}, the training set's {tuple(train.shape[1:])}"
            )
        x = images.flatten(1).double()
        self.store(index, nearest(x, train) / nearest(x, held_out))

    def protocol(self) -> dict[str, Any]:
        return {"reference": self.source, "distance": "Euclidean, pixels"}

    def compute(self) -> dict[str, Tensor]:
        train, held_out = self._reference()
        ratio = self.rows()
        x = held_out.to(ratio.device).flatten(1).double()
        yardstick = nearest(x, train) / nearest(x, held_out, other=True)
        return {"memorisation": median(ratio), "memorisation_held_out": median(yardstick)}


def median(x: Tensor) -> Tensor:
    """The middle of (N,), the mean of the two middle ones for an even N; infinities allowed."""
    x = x.sort().values
    return (x[(len(x) - 1) // 2] + x[len(x) // 2]) / 2


def nearest(x: Tensor, images: Tensor, other: bool = False) -> Tensor:
    """The distance (B,) from each x (B, D) to the nearest image; with `other`, to the nearest but itself.

    In float64, where sums of squares of bytes are exact: a copy is at distance 0.
    """
    best = x.new_full((len(x),), torch.inf)
    norm = x.square().sum(1, keepdim=True)
    for start in range(0, len(images), BLOCK):
        y = images[start : start + BLOCK].to(x.device).flatten(1).double()
        distance = norm + y.square().sum(1) - 2 * x @ y.T
        if other:
            distance[start : start + BLOCK].fill_diagonal_(torch.inf)
        best = torch.minimum(best, distance.amin(1))
    return best.sqrt()
