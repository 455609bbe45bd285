"""Memorisation: the ratio where it is known."""

import pytest
import torch

from steadyflow.data import Digits
from steadyflow.metrics import Memorisation
from steadyflow.metrics import memorisation as module


@pytest.mark.parametrize("block", [4096, 2])
def test_known_distances(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constant images are points on a line: train at 0 and 100, held out at 60, 80, 200."""
    train, held_out, x = (torch.tensor(v, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) for v in (
        [0, 100], [60, 80, 200], [10, 90, 62]
    ))  # fmt: skip
    monkeypatch.setattr(module, "BLOCK", block)
    metric = Memorisation()
    metric.set_reference(train, held_out)
    metric.update(torch.tensor([0, 1]), x[:2])
    metric.update(torch.tensor([2]), x[2:])
    result = metric.compute()
    assert abs(result["memorisation"] - 1) < 1e-12  # of 10/50, 10/10, 38/2
    assert abs(result["memorisation_held_out"] - 1) < 1e-12  # of 40/20, 20/20, 100/120


def test_copies_are_found_and_fresh_images_are_not() -> None:
    train, test = Digits("train").images, Digits("test").images
    ratios = []
    for images, held_out in ((train[::80], test), (test[::2], test[1::2])):
        metric = Memorisation()
        metric.set_reference(train, held_out)
        metric.update(torch.arange(len(images)), images)
        ratios.append({k: float(v) for k, v in metric.compute().items()})
    assert ratios[0]["memorisation"] == 0
    assert abs(ratios[1]["memorisation"] / ratios[1]["memorisation_held_out"] - 1) < 0.05


def test_the_held_out_images_themselves_are_infinitely_far_from_memorised() -> None:
    train, test = Digits("train").images, Digits("test").images
    metric = Memorisation()
    metric.set_reference(train, test)
    metric.update(torch.arange(100), test[:100])
    assert metric.compute()["memorisation"] == torch.inf


def test_other_shape() -> None:
    metric = Memorisation()
    metric.set_reference(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images are \(3, 8, 8\), the training set's \(1, 8, 8\)"):
        metric.update(torch.tensor([0]), torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
