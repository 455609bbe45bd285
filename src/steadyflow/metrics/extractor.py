"""What a feature extractor is: images in, feature vectors and class probabilities out; and its weights file."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from steadyflow.data.images import sha256_of

WEIGHTS = Path("~/.cache/steadyflow/weights")  # where weights files are looked for by default


class FeatureExtractor(nn.Module, ABC):
    """A frozen network, always in evaluation mode, that maps images to the space where sets of images are compared.

    Attributes:
        name: how `protocol` calls it.
        dim: length of a feature vector.
        classes: number K of the classifier's outputs, 0 without a classifier.
        resize: how an image is brought to the network's input size ("none" where it is taken as it is).
        sha256: of the weights file, so that statistics made with other weights are never mixed in.
    """

    name: str
    dim: int
    classes: int
    resize: str
    sha256: str

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features and class probabilities of a batch.

        Args:
            images: (B, C, H, W) uint8.

        Returns:
            features: (B, dim) float32.
            probabilities: (B, K) float32 summing to 1, or None where the network has no classifier.

        Raises:
            ValueError: images of a dtype or shape the network cannot take.
        """

    def freeze(self) -> Self:
        """Evaluation mode, no gradients; called at the end of a constructor."""
        return self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode whatever a trainer asks."""
        return super().train(False)

    def check(self, images: Tensor) -> None:
        """Raises ValueError unless images are uint8 (B, 1 or 3, H, W)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"{self.name} features need uint8 images (B, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )


def weights_file(path: Path, url: str, sha256: str, size: str) -> Path:
    """`path`, once it is known to be the file meant.

    Args:
        path: where the file should be.
        url: where it comes from.
        sha256: its hash, or the first digits of it.
        size: for the message, e.g. "96 MB".

    Raises:
        FileNotFoundError: not there; says which file to put where.
        ValueError: another file is there.
    """
    path = path.expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"no weights at {path}; fetch {url} ({size}, sha256 {sha256}{'...' if len(sha256) < 64 else ''}) to that "
            f"path: curl -L --create-dirs -o {path} {url}"
        )
    found = sha256_of(path)
    if not found.startswith(sha256):
        raise ValueError(f"{path} has sha256 {found}, expected {sha256}: fetch it again from {url}")
    return path
