"""KID: against torchmetrics on the same subsets, and its expectation."""

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.image.kid import KernelInceptionDistance

from steadyflow.metrics import KernelDistance
from steadyflow.metrics.kernel import squared_mmd


def features(n: int, seed: int, shift: float = 0.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 12, generator=g, dtype=torch.float64) + shift


def of(x: Tensor, y: Tensor, batch: int = 40, **settings: int) -> dict[str, Tensor]:
    metric = KernelDistance(**settings)
    metric.set_reference(y)
    for rows in torch.randperm(len(x)).split(batch):
        metric.update(rows, x[rows])
    return metric.compute()


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save all:UserWarning")
def test_equals_torchmetrics_on_the_same_subsets() -> None:
    x, y = features(150, 0, 0.3), features(120, 1)
    theirs = KernelInceptionDistance(feature=nn.Identity(), subsets=7, subset_size=50)
    theirs.update(y, real=True)
    theirs.update(x, real=False)
    ours = of(x, y, subsets=7, subset_size=50, seed=5)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        mean, std = theirs.compute()
    assert mean > 0.01
    assert abs(ours["kid"] - mean) < 1e-12
    assert abs(ours["kid_std"] - std) < 1e-12


def test_unbiased_and_the_kernel_mean_of_a_shift() -> None:
    """For two points a != b repeated, MMD^2 = k(a, a) + k(b, b) - 2 k(a, b); for one distribution its mean is 0."""
    a, b = torch.tensor([1.0, 2.0]).double(), torch.tensor([0.0, -1.0]).double()
    exact = (5 / 2 + 1) ** 3 + (1 / 2 + 1) ** 3 - 2 * (-2 / 2 + 1) ** 3
    assert abs(squared_mmd(a.expand(9, 2), b.expand(9, 2)) - exact) < 1e-12
    x = features(60000, 3).view(3000, 20, 12)
    draws = torch.stack([squared_mmd(*pair) for pair in x.view(1500, 2, 20, 12)])
    assert abs(draws.mean()) < 4 * draws.std() / 1500**0.5
    assert draws.mean() + 4 * draws.std() / 1500**0.5 < draws.std() / 5  # sharp enough to see a bias


def test_subsets_take_what_there_is_unless_a_size_is_asked_for() -> None:
    x, y = features(30, 0, 0.5), features(20, 1)
    metric = KernelDistance(subsets=3)
    metric.set_reference(y)
    metric.update(torch.arange(30), x)
    metric.compute()
    assert metric.protocol()["subset_size"] == 20
    whole = of(x[:20], y, subsets=4)
    assert whole["kid_std"] < 1e-12  # every subset is everything
    assert abs(whole["kid"] - squared_mmd(x[:20], y)) < 1e-12


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"subset_size 25 needs as many images on both sides .* got 30 images and 20"):
        of(features(30, 0), features(20, 1), subset_size=25)
    with pytest.raises(ValueError, match="got 1 images and 20 in the reference"):
        of(features(1, 0), features(20, 1))
    with pytest.raises(ValueError, match="subset_size >= 2"):
        KernelDistance(subset_size=1)
