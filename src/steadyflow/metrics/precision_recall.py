"""Precision and recall of a set of features against another."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from steadyflow.metrics.metric import StoredMetric
from steadyflow.metrics.reference import Sources

CHUNK = 1 << 25  # distances held at once: 256 MB


class PrecisionRecall(StoredMetric):
    """Fraction of images inside the reference's manifold (precision) and of the reference inside the images' (recall).

    The manifold of a set is the union of balls around its points, each reaching to the point's k-th nearest neighbour
    within the set (itself left out); distances are Euclidean between features, in float64. Both numbers depend on the
    two counts: compare at equal counts.

    Source: Kynkaanniemi et al. 2019, Eqs. 1-3 (k = 3; VGG-16 features there, the chosen extractor's here).

    Args:
        k: which neighbour sets a ball's radius.
    """

    keys = ("precision", "recall")
    needs = ("index", "features")

    def __init__(self, k: int = 3):
        super().__init__()
        if k < 1:
            raise ValueError(f"precision: need k >= 1, got {k}")
        self.k = k
        self.reference: Tensor | None = None
        self.source = ""

    def prepare(self, sources: Sources) -> None:
        self.set_reference(sources.reference.features, f"{sources.reference.name} ({sources.reference.count})")

    def set_reference(self, features: Tensor, source: str = "given") -> None:
        """The features compared with, (N, d)."""
        self.reference, self.source = features, source

    def update(self, index: Tensor, features: Tensor) -> None:
        self.store(index, features)

    def protocol(self) -> dict[str, Any]:
        return {"reference": self.source, "k": self.k}

    def compute(self) -> dict[str, Tensor]:
        assert self.reference is not None, "prepare() or set_reference() comes first"
        x = self.rows().double()
        y = self.reference.to(x)
        if min(len(x), len(y)) <= self.k:
            raise ValueError(
                f"precision: the {self.k} nearest neighbours need more than {self.k} images on both sides, got "
                f"{len(x)} images and {len(y)} in the reference"
            )
        radius_x, radius_y = radii(x, self.k), radii(y, self.k)
        inside_y, inside_x = [], torch.zeros(len(y), dtype=torch.bool, device=x.device)
        for rows, distance in squared_distances(x, y):
            inside_y.append((distance <= radius_y).any(1))
            inside_x |= (distance <= radius_x[rows, None]).any(0)
        return {"precision": torch.cat(inside_y).double().mean(), "recall": inside_x.double().mean()}


def squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """|x_i - y_j|^2 in blocks of rows: (rows of x, distances (b, len(y)))."""
    step, norm = max(1, CHUNK // len(y)), y.square().sum(1)
    for start in range(0, len(x), step):
        rows = slice(start, min(start + step, len(x)))
        block = x[rows]
        yield rows, (block.square().sum(1, keepdim=True) + norm - 2 * block @ y.T).clamp(min=0)


def radii(x: Tensor, k: int) -> Tensor:
    """The squared distance (N,) of each point to its k-th nearest other point."""
    result = []
    for rows, distance in squared_distances(x, x):
        distance.diagonal(rows.start).fill_(torch.inf)
        result.append(distance.kthvalue(k, dim=1).values)
    return torch.cat(result)
