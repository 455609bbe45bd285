"""Residual networks trained to classify CIFAR-10: features of 32x32 colour images from a file of the user's."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional as F

from steadyflow.data.images import sha256_of
from steadyflow.metrics.extractor import FeatureExtractor


class ResNetCIFAR10(FeatureExtractor):
    """ResNet-20, -32, -44, -56, -110 of He et al. 2016 (Sec. 4.2): 3 stages of 16, 32, 64 channels, 64 pooled features.

        block:  x -> relu(shortcut(x) + bn2(conv2(relu(bn1(conv1(x))))))

    Shortcuts between stages are option A: every other pixel, padded with zero channels on both sides. Inputs are
    x / 255 normalised by ImageNet's mean and standard deviation. The depth is read off the file.

    Args:
        weights: safetensors file with conv1, bn1, layer1..3.<block>.{conv1,bn1,conv2,bn2}, linear.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another layout.
    """

    dim, classes, resize = 64, 10, "none"
    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | Path):
        super().__init__()
        path = Path(weights).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"no weights at {path}; set features.weights to a CIFAR-10 ResNet (safetensors)")
        state = load(path.read_bytes())
        self.sha256 = sha256_of(path)
        blocks = [block_count(state, stage) for stage in (1, 2, 3)]
        self.name = f"resnet{2 * sum(blocks) + 2}_cifar10"
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(blocks[0])))
        self.layer2 = nn.Sequential(Block(16, 32), *(Block(32, 32) for _ in range(blocks[1] - 1)))
        self.layer3 = nn.Sequential(Block(32, 64), *(Block(64, 64) for _ in range(blocks[2] - 1)))
        self.linear = nn.Linear(64, 10)
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise ValueError(f"{path} does not hold a CIFAR-10 ResNet: {reason}") from None
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None])
        self.freeze()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.dtype != torch.uint8 or images.shape[1:] != (3, 32, 32):
            raise ValueError(
                f"{self.name} features need uint8 images (B, 3, 32, 32), got {images.dtype} {tuple(images.shape)}"
            )
        x = (images.float() / 255 - self.mean) / self.std
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        features = x.mean((2, 3))
        return features, self.linear(features).softmax(1)


class Block(nn.Module):
    """Two 3x3 convolutions and the option-A shortcut."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.stride, self.padding = (1, 0) if channels == out else (2, (out - channels) // 2)
        self.conv1 = nn.Conv2d(channels, out, 3, self.stride, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


def block_count(state: Mapping[str, Tensor], stage: int) -> int:
    """How many blocks of a stage a state dict holds, at least 1."""
    return max(1, len({key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")}))
