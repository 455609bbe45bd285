"""Convolutions against scipy.ndimage, boundary by boundary."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from steadyflow.linear import (
    Blur,
    Convolution,
    PaddedConvolution,
    disk_kernel,
    file_kernel,
    gaussian_kernel,
    motion_kernel,
)

MODES = {"reflect": "reflect", "circular": "wrap", "zero": "constant"}
X = torch.randn(1, 1, 14, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def scipy_convolve(x: Tensor, kernel: Tensor, boundary: str) -> Tensor:
    return torch.from_numpy(ndimage.convolve(x[0, 0].numpy(), kernel.numpy(), mode=MODES[boundary]))[None, None]


@pytest.mark.parametrize("boundary", MODES)
@pytest.mark.parametrize(("std", "size"), [(1.3, 9), (3.0, 61), ((0.7, 2.0), 11)])
def test_gaussian_blur_is_scipy_s(boundary: str, std: float | tuple[float, float], size: int) -> None:
    x = X[0, 0].numpy()
    radius = (size // 2,) * 2
    theirs = ndimage.gaussian_filter(x, std, mode=MODES[boundary], radius=radius)
    ours = Blur((1, 14, 20), std, size, boundary)(X)[0, 0]
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=1e-13)


@pytest.mark.parametrize("boundary", MODES)
@pytest.mark.parametrize("size", [7, 31])
def test_any_kernel_is_scipy_s(boundary: str, size: int) -> None:
    """A kernel without symmetry, so that a flip or a shift by one would show."""
    kernel = torch.rand(size, size - 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theirs = scipy_convolve(X, kernel, boundary)
    torch.testing.assert_close(PaddedConvolution((1, 14, 20), kernel, boundary)(X), theirs, rtol=0, atol=1e-11)
    if boundary == "circular":
        torch.testing.assert_close(Convolution((1, 14, 20), kernel)(X), theirs, rtol=0, atol=1e-11)


def test_a_symmetric_kernel_under_reflection_is_scipy_s() -> None:
    kernel = disk_kernel(9, 3.7)
    ours = Convolution((1, 14, 20), kernel, "reflect")(X)
    torch.testing.assert_close(ours, scipy_convolve(X, kernel, "reflect"), rtol=0, atol=1e-13)


@pytest.mark.parametrize("boundary", ["reflect", "circular"])
def test_two_ways_to_the_same_blur(boundary: str) -> None:
    """Blur by the decomposition of its sides, Convolution by a transform: the same A, A^+ and solve."""
    a = Blur((1, 14, 20), (1.5, 1.1), 9, boundary, cutoff=0.05)
    b = Convolution((1, 14, 20), gaussian_kernel(9, (1.1, 1.5)), boundary, cutoff=0.05)
    torch.testing.assert_close(a(X), b(X), rtol=0, atol=1e-13)
    torch.testing.assert_close(a.pinv(X), b.pinv(X), rtol=0, atol=1e-11)
    torch.testing.assert_close(a.solve(X, 0.3, 1e-3), b.solve(X, 0.3, 1e-3), rtol=0, atol=1e-10)


def test_the_cutoff_bounds_what_an_error_grows_to() -> None:
    """|A^+| <= 1 / (cutoff s_max), and a lower cutoff keeps more and comes nearer to x."""
    errors, x = [], torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(1, 1, 1, 64).expand(1, 1, 64, 64) + 0.1
    x = x + torch.randn(1, 1, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1
    for cutoff in (0.3, 0.03, 0.003):
        operator = Blur((1, 64, 64), 1.0, 61, cutoff=cutoff)
        y = torch.randn(1, 1, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        assert operator.pinv(y).norm() <= y.norm() / (cutoff * operator.singular.max()) * (1 + 1e-9)
        errors.append(float((operator.project(x) - x).norm()))
    assert errors[0] > errors[1] > errors[2]
    assert torch.isfinite(Blur((1, 64, 64), 3.0, cutoff=0.0).pinv(y)).all()  # a cutoff of 0 keeps s > 0


def test_kernels_sum_to_one_and_are_centred() -> None:
    kernels = [
        gaussian_kernel(9, (2.0, 0.7), 30.0),
        disk_kernel(9, 3.3),
        motion_kernel(15, 9.0, 40.0),
        motion_kernel(31, 20.0, 10.0, shake=80.0, seed=3),
    ]
    for kernel in kernels:
        r = torch.arange(len(kernel)).double() - len(kernel) // 2
        assert kernel.min() >= 0
        torch.testing.assert_close(kernel.sum(), torch.ones(()).double())
        assert abs((kernel.sum(0) * r).sum()) < 1e-9
        assert abs((kernel.sum(1) * r).sum()) < 1e-9


def test_the_turned_gaussian_has_its_moments() -> None:
    """Covariance R diag(std^2) R^T, in (column, -row): counter-clockwise on screen."""
    kernel, r = gaussian_kernel(61, (4.0, 1.5), 30.0), torch.arange(61).double() - 30
    row, column = -r[:, None], r[None, :]
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    assert float((kernel * column**2).sum()) == pytest.approx(16 * c**2 + 2.25 * s**2, abs=1e-6)
    assert float((kernel * row**2).sum()) == pytest.approx(16 * s**2 + 2.25 * c**2, abs=1e-6)
    assert float((kernel * row * column).sum()) == pytest.approx((16 - 2.25) * c * s, abs=1e-6)


def test_a_straight_motion_lies_on_its_line() -> None:
    kernel = motion_kernel(15, 8.0, 0.0)
    assert kernel[7].sum() == pytest.approx(1)
    torch.testing.assert_close(kernel[7, 4:11], torch.full((7,), 1 / 8).double(), rtol=0, atol=1e-3)
    torch.testing.assert_close(motion_kernel(15, 8.0, 90.0), kernel.mT, rtol=0, atol=1e-12)
    up = motion_kernel(15, 8.0, 45.0)  # to the upper right
    assert up[5, 9] > 0.05
    assert up[5, 5] == 0
    assert torch.equal(motion_kernel(31, 20.0, 0.0, 60.0, 5), motion_kernel(31, 20.0, 0.0, 60.0, 5))
    assert not torch.equal(motion_kernel(31, 20.0, 0.0, 60.0, 5), motion_kernel(31, 20.0, 0.0, 60.0, 6))


def test_a_kernel_from_a_file(tmp_path: Path) -> None:
    kernel = np.arange(15.0).reshape(3, 5)
    np.save(tmp_path / "kernel.npy", kernel)
    torch.testing.assert_close(file_kernel(tmp_path / "kernel.npy"), torch.from_numpy(kernel / kernel.sum()))


def test_bad_kernels() -> None:
    shape = (1, 16, 16)
    with pytest.raises(ValueError, match="std of a blur is in pixels and must be positive, got 0"):
        Blur(shape, 0.0)
    with pytest.raises(ValueError, match="odd and positive, so that it has a middle, got 60"):
        Blur(shape, 3.0, 60)
    with pytest.raises(ValueError, match="odd and positive, so that it has a middle, got -3"):
        motion_kernel(-3, 1.0)
    with pytest.raises(ValueError, match="one of reflect, circular, zero, got 'mirror'"):
        Blur(shape, boundary="mirror")
    with pytest.raises(ValueError, match="odd sizes"):
        Convolution(shape, torch.ones(4, 3))
    with pytest.raises(ValueError, match="0 everywhere"):
        Convolution(shape, torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"boundary=reflect with this kernel PaddedConvolution has A and A\^T"):
        Convolution(shape, motion_kernel(7, 3.0, 45.0), "reflect")
    with pytest.raises(ValueError, match="boundary=zero"):
        Convolution(shape, disk_kernel(5, 2.0), "zero")
    with pytest.raises(ValueError, match="leaves a kernel of 7 x 7"):
        motion_kernel(7, 9.0)
    with pytest.raises(ValueError, match="0 < radius"):
        disk_kernel(5, 4.0)
    with pytest.raises(FileNotFoundError, match="no file"):
        file_kernel("nowhere.npy")
