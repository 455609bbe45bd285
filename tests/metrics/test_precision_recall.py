"""Precision and recall against their definition, pair by pair."""

import numpy as np
import pytest
import torch
from torch import Tensor

from steadyflow.metrics import PrecisionRecall
from steadyflow.metrics import precision_recall as module


def of(x: Tensor, y: Tensor, k: int = 3) -> tuple[float, float]:
    metric = PrecisionRecall(k)
    metric.set_reference(y)
    for rows in torch.randperm(len(x)).split(16):
        metric.update(rows, x[rows])
    result = metric.compute()
    return float(result["precision"]), float(result["recall"])


def by_definition(points: Tensor, manifold: Tensor, k: int) -> float:
    """The fraction of points within some manifold point's distance to its k-th nearest other manifold point."""
    inside, centres = 0, manifold.numpy()
    for p in points.numpy():
        for i, m in enumerate(centres):
            radius = sorted(np.linalg.norm(np.delete(centres, i, 0) - m, axis=1))[k - 1]
            if np.linalg.norm(p - m) <= radius:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("chunk", [1 << 25, 50])
def test_equals_the_definition(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)  # 50 distances: blocks of 2 rows
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(23, 3, generator=g).double() * 0.6 + 0.5, torch.randn(19, 3, generator=g).double()
    for k in (1, 3):
        assert of(x, y, k) == (by_definition(x, y, k), by_definition(y, x, k))
    assert 0.05 < by_definition(x, y, 1) < 0.95


def test_a_dropped_mode_costs_recall_and_an_invented_one_precision() -> None:
    g = torch.Generator().manual_seed(0)
    left, right = torch.randn(200, 2, generator=g), torch.randn(200, 2, generator=g) + 50
    precision, recall = of(left[:100], torch.cat([left[100:], right[:100]]))
    assert precision > 0.85
    assert 0.4 < recall <= 0.5
    precision, recall = of(torch.cat([left[:100], right[:100]]), left[100:])
    assert 0.4 < precision <= 0.5
    assert recall > 0.85


def test_too_few_images() -> None:
    with pytest.raises(ValueError, match="need more than 3 images on both sides, got 3 images and 10"):
        of(torch.randn(3, 2), torch.randn(10, 2))
