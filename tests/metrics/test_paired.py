"""PSNR and SSIM against scikit-image, pair by pair."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from steadyflow.metrics import PSNR, RMSE, SSIM
from steadyflow.metrics.paired import PairedMetric


def pairs(channels: int, height: int = 24, width: int = 33) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (5, channels, height, width), generator=g)
    noise = torch.randn(x.shape, generator=g) * torch.tensor([2.0, 10, 30, 80, 300]).view(5, 1, 1, 1)
    return x.to(torch.uint8), (x + noise).round().clamp(0, 255).to(torch.uint8)


def per_image(metric: PairedMetric, x: Tensor, y: Tensor) -> np.ndarray:
    for rows in torch.tensor([3, 0, 4, 2, 1]).split(2):
        metric.update(rows, x[rows], y[rows])
    index, values = metric.per_image()
    assert index.tolist() == [0, 1, 2, 3, 4]
    assert abs(metric.compute()[metric.keys[0]] - values.mean()) < 1e-12
    return values.numpy()


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_equals_scikit_image(channels: int) -> None:
    x, y = pairs(channels)
    theirs = [peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=255) for a, b in zip(x, y, strict=True)]
    assert np.abs(per_image(PSNR(), x, y) - theirs).max() < 1e-10


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_equals_scikit_image(channels: int) -> None:
    x, y = pairs(channels)
    theirs = [
        structural_similarity(
            a.numpy(),
            b.numpy(),
            data_range=255,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(x, y, strict=True)
    ]
    assert np.abs(per_image(SSIM(), x, y) - theirs).max() < 1e-10
    assert theirs[0] > 0.95 > 0.3 > theirs[-1]


def test_a_constant_error_and_equal_images() -> None:
    x = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    metric = PSNR()
    metric.update(torch.tensor([0]), x[:1], x[:1] + 51)
    assert abs(metric.compute()["psnr"] - 20 * np.log10(5)) < 1e-12
    metric.update(torch.tensor([1]), x[1:], x[1:])
    assert metric.compute()["psnr"] == torch.inf
    error = RMSE()
    error.update(torch.arange(2), x, torch.cat([x[:1] + 51, x[1:] - 25]))
    assert abs(error.compute()["rmse"] - (51 + 25) / 2 / 127.5) < 1e-12
    same = SSIM()
    same.update(torch.arange(2), x, x)
    assert abs(same.compute()["ssim"] - 1) < 1e-12


def test_refusals() -> None:
    small = torch.zeros(1, 1, 10, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"window is 11x11, images are only \(10, 32\)"):
        SSIM().update(torch.tensor([0]), small, small)
    with pytest.raises(ValueError, match=r"images are \(1, 10, 32\), their pairs \(1, 10, 31\)"):
        PSNR().update(torch.tensor([0]), small, small[..., :31])
