"""Inception-v3 as clean-fid uses it: the features behind published FIDs."""

from pathlib import Path

import torch
import torchvision
from cleanfid.inception_pytorch import FIDInceptionA, FIDInceptionC, FIDInceptionE_1, FIDInceptionE_2
from torch import Tensor, nn
from torch.nn import functional as F

from steadyflow.data.images import sha256_of
from steadyflow.metrics.extractor import WEIGHTS, FeatureExtractor, weights_file

# file, url, sha256 (or its first digits), size
TORCHSCRIPT = (
    "inception-2015-12-05.pt",
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
    "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    "96 MB",
)
PYTORCH = (
    "pt_inception-2015-12-05-6726825d.pth",
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    "6726825d",
    "96 MB",
)
MODES = ("clean", "legacy_tensorflow", "legacy_pytorch")


class Inception(FeatureExtractor):
    """Inception-v3 of 2015-12-05 (TensorFlow's weights), its 2048 pooled features and 1008 class probabilities.

    Images are resized to 299x299 by one of clean-fid's modes, grey ones repeated to 3 channels; FIDs of different modes
    cannot be compared:

        clean               Pillow's bicubic filter (antialiased) on floats, clipped to [0, 255]; then (x - 128) / 128
        legacy_tensorflow   TensorFlow's bilinear resize (inside the network), not antialiased; then (x - 128) / 128
        legacy_pytorch      torch's bilinear resize, not antialiased; then 2 x / 255 - 1, pytorch-fid's weights

    Probabilities leave the last layer's bias out, as the Inception Score's original code does. The first two modes run
    a TorchScript file, which can hold code, so a file whose sha256 is not the known one is refused.

    Source: Parmar et al. 2022.

    Args:
        resize: one of the modes; legacy_tf is short for legacy_tensorflow.
        weights: path of the file; by default ~/.cache/steadyflow/weights/ with the file's own name.
        sha256: of the file; another value trusts another file.

    Raises:
        FileNotFoundError: the file is not there; says where it comes from and where to put it.
        ValueError: another mode, or a file with another hash.
    """

    name, dim, classes = "inception", 2048, 1008

    def __init__(self, resize: str = "clean", weights: str | Path | None = None, sha256: str | None = None):
        super().__init__()
        resize = "legacy_tensorflow" if resize == "legacy_tf" else resize
        if resize not in MODES:
            raise ValueError(f"resize must be one of {', '.join(MODES)}, got {resize!r}")
        self.resize = resize
        name, url, known, size = PYTORCH if resize == "legacy_pytorch" else TORCHSCRIPT
        path = weights_file(Path(weights or WEIGHTS / name), url, sha256 or known, size)
        self.sha256 = sha256_of(path)
        if resize == "legacy_pytorch":
            self.base = fid_inception()
            self.base.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            self.output, self.base.fc = self.base.fc, nn.Identity()
        else:
            self.base = torch.jit.load(str(path), map_location="cpu")
            self.output = self.base.output
        self.freeze()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.check(images)
        x = images.float().expand(-1, 3, -1, -1)
        if self.resize == "legacy_pytorch":
            features = self.base(2 * (resized(images, self.resize) / 255) - 1)
        elif self.resize == "legacy_tensorflow":
            features = self.base(x, return_features=True)
        else:
            features = self.base.layers((resized(images, self.resize) - 128) / 128)
        features = features.reshape(len(images), self.dim)
        return features, (features @ self.output.weight.T).softmax(1)


def resized(images: Tensor, mode: str) -> Tensor:
    """uint8 images (B, 1 or 3, H, W) to float32 (B, 3, 299, 299) in [0, 255], as clean-fid's resizers do.

    Antialiased bicubic in float64 is Pillow's filter on float images to float32's rounding (2e-5 of 255).
    """
    if mode == "clean":
        x = F.interpolate(images.double(), (299, 299), mode="bicubic", antialias=True, align_corners=False).float()
    else:
        x = F.interpolate(images.float(), (299, 299), mode="bilinear", align_corners=False)
    return x.clamp(0, 255).expand(-1, 3, -1, -1)


def fid_inception() -> torchvision.models.Inception3:
    """torchvision's Inception-v3 with the blocks in which TensorFlow's differs, untrained (pytorch-fid's network)."""
    net = torchvision.models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    net.Mixed_5b = FIDInceptionA(192, pool_features=32)
    net.Mixed_5c = FIDInceptionA(256, pool_features=64)
    net.Mixed_5d = FIDInceptionA(288, pool_features=64)
    net.Mixed_6b = FIDInceptionC(768, channels_7x7=128)
    net.Mixed_6c = FIDInceptionC(768, channels_7x7=160)
    net.Mixed_6d = FIDInceptionC(768, channels_7x7=160)
    net.Mixed_6e = FIDInceptionC(768, channels_7x7=192)
    net.Mixed_7b = FIDInceptionE_1(1280)
    net.Mixed_7c = FIDInceptionE_2(2048)
    return net
