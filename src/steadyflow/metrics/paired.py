"""Metrics of pairs of images: RMSE, PSNR and SSIM."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from steadyflow.metrics.metric import PerImageMetric


class PairedMetric(PerImageMetric, ABC):
    """A number that compares an image with its target: its mean and standard deviation over images."""

    needs = ("index", "images", "target")

    @abstractmethod
    def compare(self, images: Tensor, target: Tensor) -> Tensor:
        """The number (B,) of each pair, float64, of uint8 images (B, C, H, W)."""

    def update(self, index: Tensor, images: Tensor, target: Tensor) -> None:
        if images.shape != target.shape:
            raise ValueError(
                f"{self.keys[0]}: images are {tuple(images.shape[1:])}, their pairs {tuple(target.shape[1:])}; a pair "
                "needs one shape"
            )
        self.store(index, self.compare(images, target))


class RMSE(PairedMetric):
    """Root mean square difference of each image from its pair, on images in [-1, 1], then averaged over images.

        RMSE = sqrt(mean (x - y)^2) / 127.5

    of uint8 images, so that rounding alone gives up to 0.0032. Paired with samples of the same noise by a much finer
    sampler, it is the error of a sampler.
    """

    keys = ("rmse", "rmse_std")

    def compare(self, images: Tensor, target: Tensor) -> Tensor:
        return (images.double() - target.double()).square().flatten(1).mean(1).sqrt() / 127.5

    def protocol(self) -> dict[str, Any]:
        return {"data_range": 2}


class PSNR(PairedMetric):
    """Peak signal-to-noise ratio in dB, of each image, then averaged over images.

        PSNR = 10 log10(255^2 / mean (x - y)^2)

    on uint8 images (data range 255), the mean squared error over all channels and pixels; infinite for equal images.
    Equal to scikit-image's peak_signal_noise_ratio(data_range=255).
    """

    keys = ("psnr", "psnr_std")

    def compare(self, images: Tensor, target: Tensor) -> Tensor:
        error = (images.double() - target.double()).square().flatten(1).mean(1)
        return 10 * torch.log10(255**2 / error)

    def protocol(self) -> dict[str, Any]:
        return {"data_range": 255}


class SSIM(PairedMetric):
    """Structural similarity of each image, then averaged over images.

        SSIM = (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x^2 + s_y^2 + C2)),  C = (0.01, 0.03)^2 255^2

    on uint8 images (data range 255); moments under an 11x11 Gaussian window of standard deviation 1.5, covariances
    without sample correction, averaged over the positions where the window fits and over channels. Equal to
    scikit-image's structural_similarity(data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    channel_axis=...).

    Source: Wang et al. 2004, Eq. 13.

    Raises:
        ValueError: an image smaller than the window.
    """

    keys = ("ssim", "ssim_std")

    def compare(self, images: Tensor, target: Tensor) -> Tensor:
        if min(images.shape[2:]) < 11:
            raise ValueError(f"ssim: the window is 11x11, images are only {tuple(images.shape[2:])}")
        x, y = images.double(), target.double()
        mx, my, xx, yy, xy = (blur(v) for v in (x, y, x * x, y * y, x * y))
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        top = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
        bottom = (mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2)
        return (top / bottom).flatten(1).mean(1)

    def protocol(self) -> dict[str, Any]:
        return {"data_range": 255, "window": "Gaussian 11x11, standard deviation 1.5, no padding"}


def blur(x: Tensor) -> Tensor:
    """Each channel of (B, C, H, W) under the 11x11 Gaussian window, (B, C, H - 10, W - 10)."""
    taps = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=x.dtype, device=x.device) / 1.5) ** 2)
    taps, (b, c, h, w) = taps / taps.sum(), x.shape
    x = F.conv2d(x.reshape(b * c, 1, h, w), taps.view(1, 1, 11, 1))
    return F.conv2d(x, taps.view(1, 1, 1, 11)).view(b, c, h - 10, w - 10)
