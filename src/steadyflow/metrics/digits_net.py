"""The classifier of digits that ships with the package: an in-domain feature space that needs no download."""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn

from steadyflow.data import from_uint8
from steadyflow.metrics.extractor import FeatureExtractor

FILE = Path(__file__).with_name("digits_net.safetensors")
SHA256 = "0efa31c5a90709a5d6483e8ad6ab3a270fefec6259bb1c8b9a8310b96917c8c6"


class DigitsNet(FeatureExtractor):
    """Four 3x3 convolutions (16, 32, 64, 64 channels; each with batch norm and ReLU; the last three of stride 2, 2, 1),
    a spatial mean and a linear layer to 10 classes, 61 k parameters.

        features = mean over the 8x8 positions of the last ReLU map (64,),   probabilities = softmax(linear(features))

    Trained by scripts/train_digits_classifier.py on the 1597 training images of `Digits` alone and fixed before any
    generator was judged: FIDs are comparable only while the weights stay the same, so their sha256 is in every
    `protocol` and a file with another hash is refused.

    Args:
        weights: a safetensors file; by default the one shipped.
        enlarge: take smaller square images too, by bicubic interpolation to 32 x 32.

    Raises:
        ValueError: the shipped file has another hash than the one recorded here.
    """

    name, dim, classes = "digits", 64, 10

    def __init__(self, weights: str | Path | None = None, enlarge: bool = False):
        super().__init__()
        self.resize = "bicubic" if enlarge else "none"
        self.stages = digits_stages()
        self.classifier = nn.Linear(64, 10)
        data = (FILE if weights is None else Path(weights).expanduser()).read_bytes()
        self.sha256 = hashlib.sha256(data).hexdigest()
        if weights is None and self.sha256 != SHA256:
            raise ValueError(f"{FILE} has sha256 {self.sha256}, expected {SHA256}: reinstall steadyflow")
        self.load_state_dict(load(data))
        self.freeze()

    def maps(self, images: Tensor) -> list[Tensor]:
        """The ReLU maps of the four stages, (B, 16, 32, 32), (B, 32, 16, 16), (B, 64, 8, 8), (B, 64, 8, 8)."""
        smaller = self.resize != "none" and images.ndim == 4 and images.shape[2] == images.shape[3] < 32
        shape = (1, *images.shape[2:]) if smaller else (1, 32, 32)
        if images.dtype != torch.uint8 or images.shape[1:] != shape:
            raise ValueError(
                f"digits features need uint8 images (B, 1, 32, 32), got {images.dtype} {tuple(images.shape)}; "
                "choose features=inception, or for smaller images features=digits features.enlarge=true"
            )
        x, maps = from_uint8(images), []
        if smaller:
            x = nn.functional.interpolate(x, size=(32, 32), mode="bicubic").clamp(-1, 1)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.maps(images)[-1].mean((2, 3))
        return features, self.classifier(features).softmax(1)


def digits_stages() -> nn.ModuleList:
    """The convolutional stages, untrained."""
    layers = []
    for channels, out, stride in [(1, 16, 1), (16, 32, 2), (32, 64, 2), (64, 64, 1)]:
        conv = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        layers.append(nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU()))
    return nn.ModuleList(layers)
