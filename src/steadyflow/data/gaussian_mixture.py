"""Samples of a Gaussian mixture, whose denoiser is known in closed form."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from steadyflow.data.points import InMemoryPoints, normals, uniforms


class GaussianMixtureSamples(InMemoryPoints):
    """x = mean_k + L_k z with k drawn by weight, L_k L_k^T = covariance_k, z ~ N(0, I); any dimension D.

    Sample i is a function of (seed, split, i). The mixture itself stays with the set, so that `checkpoint=analytic` has
    the exact denoiser of it.

    Args:
        means: (K, D).
        covariances: (K, D, D), or (K, D) for diagonal ones, or (K,) for isotropic ones, or one variance for all.
        weights: (K,), positive; brought to sum 1. None: equal.
        split: train or test, of independent samples.
        count: how many samples.
        seed: >= 0.

    Attributes: those of InMemoryPoints; `means`, `covariances` (K, D) or (K, D, D), `weights`, all float64; `component`
    (N,) int64, where each sample comes from.

    Raises:
        ValueError: shapes that do not fit, a weight that is not positive, a covariance that is not positive definite.
    """

    def __init__(
        self,
        means: Sequence[Sequence[float]] | Tensor,
        covariances: Sequence[object] | Tensor | float,
        weights: Sequence[float] | Tensor | None = None,
        split: str = "train",
        count: int = 10_000,
        seed: int = 0,
    ):
        self.means = torch.as_tensor(means, dtype=torch.float64)
        if self.means.ndim != 2:
            raise ValueError(f"means must be (K, D), got {tuple(self.means.shape)}")
        modes, dim = self.means.shape
        covariances = torch.as_tensor(covariances, dtype=torch.float64)
        if covariances.shape in ((), (modes,)):
            covariances = covariances.expand(modes)[:, None].expand(modes, dim)
        self.covariances = covariances
        self.weights = torch.ones(modes) if weights is None else torch.as_tensor(weights)
        self.weights = self.weights.double() / self.weights.double().sum()
        if self.covariances.shape not in ((modes, dim), (modes, dim, dim)) or self.weights.shape != (modes,):
            raise ValueError(
                f"for means {modes, dim} covariances must be a number, ({modes},), {modes, dim} or {modes, dim, dim} "
                f"and weights ({modes},); got {tuple(self.covariances.shape)} and {tuple(self.weights.shape)}"
            )
        full = self.covariances if self.covariances.ndim == 3 else torch.diag_embed(self.covariances)
        roots, failed = torch.linalg.cholesky_ex(full)
        if failed.any() or not torch.equal(full, full.mT) or not (self.weights > 0).all():
            raise ValueError("each covariance must be symmetric and positive definite and each weight positive")
        u = uniforms(seed, split, count, dim + 1)
        edges = self.weights.cumsum(0).numpy()
        component = np.searchsorted(edges[:-1], u[:, 0], side="right")
        self.component = torch.from_numpy(component)
        z = torch.from_numpy(normals(u[:, 1:]))
        points = torch.empty(count, dim, dtype=torch.float64)
        for k in range(modes):
            rows = self.component == k
            points[rows] = self.means[k] + z[rows] @ roots[k].mT
        super().__init__("gaussian_mixture", split, points)
