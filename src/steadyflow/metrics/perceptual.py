"""Perceptual distance of pairs of images: LPIPS, and the same form on the digits net."""

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from steadyflow.metrics.digits_net import DigitsNet
from steadyflow.metrics.extractor import weights_file
from steadyflow.metrics.paired import PairedMetric
from steadyflow.metrics.reference import Sources

Maps = Callable[[Tensor], list[Tensor]]  # uint8 images (B, C, H, W) to feature maps (B, c_l, h_l, w_l)


class PerceptualDistance(PairedMetric):
    """A distance between the feature maps f_l of two images, unit-normalised over channels, weighted by w_l >= 0.

        d(x, y) = sum_l mean_{h, w} sum_c w_lc (f_lc(x) / |f_l(x)| - f_lc(y) / |f_l(y)|)^2,   |f|^2 = 1e-8 + sum_c f_c^2

    in float32 up to the maps, averaged over images. Source: Zhang et al. 2018, Eq. 1.
    """

    @cached_property
    @abstractmethod
    def maps(self) -> Maps:
        """The network."""

    @cached_property
    @abstractmethod
    def weights(self) -> list[Tensor]:
        """w_l (c_l,) of each map."""

    def prepare(self, sources: Sources) -> None:
        _ = self.maps, self.weights  # load now, before any image

    def compare(self, images: Tensor, target: Tensor) -> Tensor:
        total = torch.zeros(len(images), dtype=torch.float64, device=images.device)
        for x, y, weight in zip(self.maps(images), self.maps(target), self.weights, strict=True):
            difference = (unit(x.double()) - unit(y.double())).square()
            total += (difference * weight.to(difference)[:, None, None]).sum(1).mean((1, 2))
        return total


def unit(maps: Tensor) -> Tensor:
    """f / |f| over channels."""
    return maps / (1e-8 + maps.square().sum(1, keepdim=True)).sqrt()


class LPIPS(PerceptualDistance):
    """LPIPS (lower is more alike): the distance above on five ReLU maps of AlexNet or VGG-16, published weights.

    Version 0.1 of the linear weights, as shipped with torchmetrics; images in [-1, 1], then shifted and scaled; grey
    images repeated to 3 channels; no resizing. AlexNet needs images of at least 31 pixels, VGG-16 of 16.

    Args:
        net: alex (the metric's usual backbone) or vgg (usual as a training loss).
        weights_path: the backbone's file; by default where torchvision keeps it (torch.hub's checkpoints folder).

    Raises:
        FileNotFoundError: the backbone is not on this machine; says which file to put where.
    """

    keys = ("lpips", "lpips_std")

    def __init__(self, net: str = "alex", weights_path: str | Path | None = None):
        super().__init__()
        if net not in BACKBONES:
            raise ValueError(f"lpips: net must be one of {', '.join(BACKBONES)}, got {net!r}")
        self.net = net
        self.weights_path = None if weights_path is None else Path(weights_path)

    @cached_property
    def maps(self) -> Maps:
        url, size, build, ends = BACKBONES[self.net]
        name = url.rsplit("/", 1)[1]
        path = self.weights_path or Path(torch.hub.get_dir()) / "checkpoints" / name
        path = weights_file(path, url, name.rsplit("-", 1)[1].removesuffix(".pth"), size)
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):  # the classifier, most of the weights, is never made
            layers = build(weights=None).features
        layers.load_state_dict({k[9:]: v for k, v in state.items() if k.startswith("features.")}, assign=True)
        return Backbone(layers, ends).to(self.device)

    @cached_property
    def weights(self) -> list[Tensor]:
        file = files("torchmetrics") / "functional/image/lpips_models" / f"{self.net}.pth"
        state = torch.load(str(file), map_location="cpu", weights_only=True)
        return [state[f"lin{level}.model.1.weight"].flatten() for level in range(5)]

    def protocol(self) -> dict[str, Any]:
        return {"features": f"lpips {self.net} (0.1)", "resize": "none"}


class Backbone(nn.Module):
    """A convolutional network cut into stages, on uint8 images.

    Args:
        layers: of the network; in-place ReLUs are fine, each stage ends with one.
        ends: the layer after each stage's last.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, layers: nn.Sequential, ends: tuple[int, ...]):
        super().__init__()
        self.stages = nn.ModuleList(layers[a:b] for a, b in zip((0, *ends[:-1]), ends, strict=True))
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None])
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        x, maps = (images.float() / 127.5 - 1 - self.shift) / self.scale, []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


# url, size, torchvision's constructor, the layers' cuts
BACKBONES: dict[str, tuple[str, str, Callable[..., Any], tuple[int, ...]]] = {
    "alex": (
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "244 MB",
        torchvision.models.alexnet,
        (2, 5, 8, 10, 12),
    ),
    "vgg": (
        "https://download.pytorch.org/models/vgg16-397923af.pth",
        "553 MB",
        torchvision.models.vgg16,
        (4, 9, 16, 23, 30),
    ),
}


class DigitsDistance(PerceptualDistance):
    """The form of LPIPS on the four ReLU maps of DigitsNet, with w = 1: a stand-in for 1x32x32 digits, not LPIPS.

    Written as `lpips_digits`; comparable only with itself.
    """

    keys = ("lpips_digits", "lpips_digits_std")

    @cached_property
    def network(self) -> DigitsNet:
        return DigitsNet().to(self.device)

    @cached_property
    def maps(self) -> Maps:
        return self.network.maps

    @cached_property
    def weights(self) -> list[Tensor]:
        return [torch.ones(c) for c in (16, 32, 64, 64)]

    def protocol(self) -> dict[str, Any]:
        return {"features": "digits", "features_sha256": self.network.sha256, "resize": "none"}
