"""Inception Score against torchmetrics and closed forms; class accuracy by counting."""

import math

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore as Theirs

from steadyflow.metrics import ClassAccuracy, InceptionScore


def score(p: Tensor, splits: int = 10, seed: int = 0) -> dict[str, Tensor]:
    metric = InceptionScore(splits, seed)
    for rows in torch.randperm(len(p)).split(17):
        metric.update(rows, p[rows])
    return metric.compute()


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save all:UserWarning")
def test_equals_torchmetrics_on_the_same_splits() -> None:
    logits = 2 * torch.randn(200, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = Theirs(feature=nn.Identity(), splits=10)
    theirs.update(logits)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        mean, std = theirs.compute()
    ours = score(logits.softmax(1), 10, 4)
    assert abs(ours["inception_score"] - mean) < 1e-12
    assert abs(ours["inception_score_std"] - std) < 1e-12


def test_closed_forms() -> None:
    sure = torch.eye(5).repeat(40, 1)  # balanced and certain: as many as there are classes
    assert abs(score(sure, 1)["inception_score"] - 5) < 1e-12
    assert abs(score(torch.full((50, 5), 0.2))["inception_score"] - 1) < 1e-7  # 0.2 in float32
    half = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).repeat(50, 1)
    exact = 2 * 0.75**0.75 * 0.25**0.25  # exp(log 2 - H(3/4))
    assert abs(score(half, 1)["inception_score"] - exact) < 1e-12


def test_blocks_of_one_class_do_not_fool_the_splits() -> None:
    """Samples numbered class by class: contiguous parts would each hold one class and score 1."""
    sure = torch.eye(5).repeat_interleave(40, 0)
    assert score(sure, 4)["inception_score"] > 4.5


def test_accuracy_counts_the_right_ones_over_batches() -> None:
    p = torch.eye(4)[torch.tensor([0, 1, 2, 3, 0, 1, 2])]
    label = torch.tensor([0, 1, 2, 0, 0, 3, 2])
    metric = ClassAccuracy()
    metric.update(label[:3], p[:3])
    metric.update(label[3:], p[3:])
    assert math.isclose(metric.compute()["accuracy"], 5 / 7)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="10 splits need as many images, got 4"):
        score(torch.eye(4))
    with pytest.raises(ValueError, match="label 4 is none of the classifier's 4 classes"):
        ClassAccuracy().update(torch.tensor([0, 4]), torch.eye(4)[:2])
