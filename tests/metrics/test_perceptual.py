"""LPIPS against torchmetrics' on one backbone, and its form on the digits net by hand."""

import hashlib
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor
from torchmetrics.functional.image.lpips import _LPIPS

from steadyflow.data import Digits
from steadyflow.metrics import LPIPS, DigitsDistance, DigitsNet
from steadyflow.metrics import perceptual as module


def pair(channels: int, size: int = 40) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shape = (3, channels, size, size)
    return tuple(torch.randint(256, shape, generator=g).to(torch.uint8) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_equals_torchmetrics(net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a random backbone of the published architecture and the published linear weights."""
    _, size, build, ends = module.BACKBONES[net]
    monkeypatch.setattr(torchvision.models, build.__name__, lambda weights=None: Small(build))
    torch.manual_seed(0)
    theirs = _LPIPS(net=net, pnet_rand=True)
    slices = [getattr(theirs.net, f"slice{i}") for i in range(1, 6)]
    state = {f"features.{k}": v for part in slices for k, v in part.state_dict().items()}
    torch.save(state, tmp_path / "weights")
    name = f"{build.__name__}-{hashlib.sha256((tmp_path / 'weights').read_bytes()).hexdigest()[:8]}.pth"
    (tmp_path / "weights").rename(tmp_path / name)
    monkeypatch.setitem(module.BACKBONES, net, (f"https://example.org/{name}", size, build, ends))

    for channels in (1, 3):
        x, y = pair(channels)
        ours = LPIPS(net, tmp_path / name).compare(x, y)
        rgb = [(v.float() / 127.5 - 1).expand(-1, 3, -1, -1) for v in (x, y)]
        expected = theirs(*rgb).flatten().double()
        assert expected.min() > 1e-3
        assert torch.allclose(ours, expected, rtol=1e-4)


class Small(torch.nn.Module):
    """A torchvision classifier without its classifier, which is most of its weights."""

    def __init__(self, build: module.Callable[..., torch.nn.Module]):
        super().__init__()
        with torch.device("meta"):
            features = build(weights=None).features
        self.features = features.to_empty(device="cpu")
        for layer in self.features:
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight)
                torch.nn.init.normal_(layer.bias, std=0.1)


def test_absent_or_wrong_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints/alexnet-owt-7be5be79.pth"
    with pytest.raises(FileNotFoundError) as error:
        _ = LPIPS().maps
    for part in (f"no weights at {path}", module.BACKBONES["alex"][0], "244 MB", "sha256 7be5be79..."):
        assert part in str(error.value)
    path.parent.mkdir()
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"has sha256 .* expected 7be5be79"):
        _ = LPIPS().maps
    with pytest.raises(ValueError, match="net must be one of alex, vgg, got 'squeeze'"):
        LPIPS("squeeze")


def test_digits_distance_by_hand() -> None:
    images = Digits("test").images
    x, y = images[:6], images[6:12]
    expected = torch.zeros(6)
    for a, b in zip(DigitsNet().maps(x), DigitsNet().maps(y), strict=True):
        a, b = (v / v.norm(dim=1, keepdim=True).clamp(min=1e-4) for v in (a, b))
        expected += (2 - 2 * (a * b).sum(1)).mean((1, 2))  # |a - b|^2 of unit vectors
    metric = DigitsDistance()
    ours = metric.compare(x, y)
    assert torch.allclose(ours, expected.double(), rtol=2e-2)  # maps of norm 0 are left out by hand
    assert metric.keys == ("lpips_digits", "lpips_digits_std")
    assert metric.compare(x, x).abs().max() == 0


def test_digits_distance_grows_with_the_damage() -> None:
    x, g = Digits("test").images[:50], torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=g)
    levels = [(x + s * noise).clamp(0, 255).to(torch.uint8) for s in (5, 20, 80)]
    distances = [float(DigitsDistance().compare(level, x).mean()) for level in levels]
    assert 0 < distances[0] < distances[1] < distances[2]
