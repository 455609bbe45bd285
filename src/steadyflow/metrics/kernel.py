"""Kernel distance between two sets of features (KID)."""

from typing import Any

import torch
from torch import Tensor

from steadyflow.metrics.metric import StoredMetric, generator
from steadyflow.metrics.reference import Sources


class KernelDistance(StoredMetric):
    """Squared maximum mean discrepancy between features x of the images and y of the reference, kernel of degree 3.

        k(a, b) = (a . b / d + 1)^3
        MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

    averaged over `subsets` random subsets of `subset_size` images of each side (drawn without replacement within a
    subset). Unbiased at any count. `kid_std` is the standard deviation over the subsets, as usual, not the standard
    error of their mean; where a subset is all there is on both sides it is 0.

    Source: Binkowski et al. 2018, Sec. 4.

    Args:
        subsets: number of subsets.
        subset_size: m; by default min(1000, images, reference), clean-fid's rule.
        seed: of the draws.

    Raises:
        ValueError: a subset_size larger than either side, or fewer than 2 images.
    """

    keys = ("kid", "kid_std")
    needs = ("index", "features")

    def __init__(self, subsets: int = 100, subset_size: int | None = None, seed: int = 0):
        super().__init__()
        if subsets < 1 or (subset_size is not None and subset_size < 2):
            raise ValueError(f"kid: need subsets >= 1 and subset_size >= 2, got {subsets} and {subset_size}")
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed
        self.reference: Tensor | None = None
        self.source = ""
        self.used: int | None = None  # the subset size of the last computation

    def prepare(self, sources: Sources) -> None:
        self.set_reference(sources.reference.features, f"{sources.reference.name} ({sources.reference.count})")

    def set_reference(self, features: Tensor, source: str = "given") -> None:
        """The features compared with, (N, d)."""
        self.reference, self.source = features, source

    def update(self, index: Tensor, features: Tensor) -> None:
        self.store(index, features)

    def protocol(self) -> dict[str, Any]:
        return {"reference": self.source, "subsets": self.subsets, "subset_size": self.used, "seed": self.seed}

    def compute(self) -> dict[str, Tensor]:
        assert self.reference is not None, "prepare() or set_reference() comes first"
        x = self.rows()
        y = self.reference.to(x.device)
        fewest = min(len(x), len(y))
        size = min(1000, fewest) if self.subset_size is None else self.subset_size
        if not 2 <= size <= fewest:
            raise ValueError(
                f"kid: subset_size {size} needs as many images on both sides (at least 2), got {len(x)} images and "
                f"{len(y)} in the reference; set callbacks.evaluation.metrics.kid.subset_size"
            )
        self.used, random, values = size, generator(self.seed), []
        for _ in range(self.subsets):
            of_y = torch.randperm(len(y), generator=random)[:size].to(y.device)
            of_x = torch.randperm(len(x), generator=random)[:size].to(x.device)
            values.append(squared_mmd(x[of_x].double(), y[of_y].double()))
        kid = torch.stack(values)
        return {"kid": kid.mean(), "kid_std": kid.std(correction=0)}


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate of MMD^2 under k(a, b) = (a . b / d + 1)^3, for x and y (m, d)."""
    m, d = x.shape
    within = ((x @ x.T) / d + 1) ** 3 + ((y @ y.T) / d + 1) ** 3
    across = ((x @ y.T) / d + 1) ** 3
    return (within.sum() - within.trace()) / (m * (m - 1)) - 2 * across.mean()
