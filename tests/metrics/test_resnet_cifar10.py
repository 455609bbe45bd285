"""The CIFAR-10 residual networks on real images."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steadyflow.data import ImageFolder, to_uint8
from steadyflow.metrics import ResNetCIFAR10

SHARED = Path(__file__).resolve().parents[3] / "shared/data"
needs_data = pytest.mark.skipif(not (SHARED / "resnet_cifar10").is_dir(), reason=f"no networks in {SHARED}")


@needs_data
@pytest.mark.parametrize(("file", "count", "accuracy"), [("resnet20", 400, 0.80), ("resnet56", 100, 0.84)])
def test_it_classifies_real_images(file: str, count: int, accuracy: float) -> None:
    """On the JPEG test images, whose accuracy on all 10,000 is known, within 3 standard errors of `count` of them."""
    data = ImageFolder(SHARED / "cifar10_jpeg", split="test", class_folders=True)
    images, labels = zip(*(data[i] for i in range(0, 10000, 10000 // count)), strict=True)
    net = ResNetCIFAR10(SHARED / f"resnet_cifar10/{file}.safetensors")
    features, probabilities = net(to_uint8(torch.stack(images)))
    right = probabilities.argmax(1) == torch.tensor(labels)
    assert net.name == f"{file}_cifar10"
    assert abs(right.double().mean() - accuracy) < 3 * (accuracy * (1 - accuracy) / count) ** 0.5
    assert torch.allclose(net.linear(features).softmax(1), probabilities)


@needs_data
def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"set features\.weights"):
        ResNetCIFAR10(tmp_path / "absent.safetensors")
    state = load_file(SHARED / "resnet_cifar10/resnet20.safetensors")
    del state["layer2.1.bn1.weight"]
    save_file(state, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"does not hold a CIFAR-10 ResNet: Missing.*layer2\.1\.bn1\.weight"):
        ResNetCIFAR10(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match=r"need uint8 images \(B, 3, 32, 32\), got torch.uint8 \(1, 1, 32, 32\)"):
        ResNetCIFAR10(SHARED / "resnet_cifar10/resnet20.safetensors")(torch.zeros(1, 1, 32, 32, dtype=torch.uint8))
