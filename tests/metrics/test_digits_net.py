"""The shipped classifier: the very weights every number is quoted with, and that it knows digits."""

import hashlib
from pathlib import Path

import pytest
import torch

from steadyflow.data import Digits
from steadyflow.metrics import DigitsNet
from steadyflow.metrics import digits_net as module


def test_the_weights_are_the_fixed_ones() -> None:
    data = module.FILE.read_bytes()
    fixed = "0efa31c5a90709a5d6483e8ad6ab3a270fefec6259bb1c8b9a8310b96917c8c6"
    assert hashlib.sha256(data).hexdigest() == module.SHA256 == DigitsNet().sha256 == fixed
    assert len(data) < 300_000


def test_other_weights_are_refused_in_their_place_and_taken_by_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load, save

    other = tmp_path / "other.safetensors"
    other.write_bytes(save({k: v + 1 for k, v in load(module.FILE.read_bytes()).items()}))
    assert DigitsNet(other).sha256 == hashlib.sha256(other.read_bytes()).hexdigest() != module.SHA256
    monkeypatch.setattr(module, "FILE", other)
    with pytest.raises(ValueError, match=f"has sha256 .* expected {module.SHA256}"):
        DigitsNet()


def test_it_classifies_digits_it_has_never_seen() -> None:
    test = Digits("test")
    features, probabilities = DigitsNet()(test.images)
    assert (probabilities.argmax(1) == test.labels).double().mean() >= 0.98
    assert torch.allclose(probabilities.sum(1), torch.ones(200), atol=1e-6)
    assert features.shape == (200, DigitsNet.dim)
    assert (features.amax(0) > 0).all()  # no dead feature


def test_it_stays_in_evaluation_mode_and_a_batch_is_its_images_one_by_one() -> None:
    net = DigitsNet().train()
    images = Digits("test").images[:4]
    assert not any(module.training for module in net.modules())
    assert not any(p.requires_grad for p in net.parameters())
    singles = torch.cat([net(image[None])[0] for image in images])
    assert torch.allclose(net(images)[0], singles, atol=1e-5)


def test_other_images_are_refused() -> None:
    for images in (torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.zeros(2, 1, 32, 32)):
        with pytest.raises(ValueError, match=r"digits features need uint8 images \(B, 1, 32, 32\)"):
            DigitsNet()(images)


def test_smaller_images_are_enlarged_on_demand() -> None:
    """16 x 16 digits are classified as the 32 x 32 ones they become; without being asked to, they are refused."""
    small = Digits("test", size=16)
    _, probabilities = DigitsNet(enlarge=True)(small.images)
    assert (probabilities.argmax(1) == small.labels).double().mean() > 0.97
    same = DigitsNet(enlarge=True)(Digits("test").images[:8])[0]
    torch.testing.assert_close(same, DigitsNet()(Digits("test").images[:8])[0], rtol=0, atol=0)
    with pytest.raises(ValueError, match="enlarge=true"):
        DigitsNet()(small.images)
