"""Blurs with any kernel: anisotropic, out of focus, motion."""

import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from steadyflow.linear.constants import Constants, keyed
from steadyflow.linear.diagonal import Basis, CosineBasis, Diagonal, FourierBasis, border
from steadyflow.linear.masks import image_array
from steadyflow.linear.operator import Operator, Shape, image_shape
from steadyflow.linear.separable import check_size


class Convolution(Diagonal):
    """y_i = sum_a h_a x_{i - a} with any kernel h, on each channel (scipy.ndimage.convolve: h is turned round).

        circular: A = F^* diag(g) F, g the Fourier transform of h, any kernel
        reflect:  A = D^T diag(g) D, D the DCT-II, g its cosine sums, kernels symmetric about both axes

    Exact A, A^T, A^+ and solve in both cases. Any other kernel, and a zero boundary, have no fast transform that
    diagonalises A: `PaddedConvolution` gives their A and A^T. A Gaussian along the axes is a `Blur` at any boundary.

    Args:
        kernel: (h, w), odd sizes, the middle its origin; see the makers below. Used as it is, not normalised.
        boundary: circular, or reflect (d c b a | a b c d).
        cutoff: relative to the largest singular value; the reasons for 0.03 are `Blur`'s.

    Raises:
        ValueError: a kernel of even size, not finite or all 0; a boundary the kernel does not allow.
    """

    def __init__(self, shape: Shape, kernel: Tensor, boundary: str = "circular", cutoff: float = 0.03):
        (_, h, w), kernel = image_shape(shape), check_kernel(kernel)
        if boundary == "circular":
            basis: Basis = FourierBasis(h, w)
            gain = torch.fft.rfft2(_centred(kernel, h, w))
        elif boundary == "reflect" and _symmetric(kernel):
            basis = CosineBasis(h, w)
            gain = _cosines(kernel.shape[0], h) @ kernel @ _cosines(kernel.shape[1], w).mT
        else:
            raise ValueError(
                "a convolution is inverted exactly for boundary=circular, or reflect with a kernel symmetric about "
                f"both axes; for boundary={boundary} with this kernel PaddedConvolution has A and A^T"
            )
        super().__init__(shape, basis, gain[None, None], cutoff)


def _symmetric(kernel: Tensor) -> bool:
    """Whether a kernel is its mirror image about both axes, to rounding."""
    tolerance = 1e-12 * float(kernel.abs().max())
    return all(torch.allclose(kernel, kernel.flip(axis), rtol=0, atol=tolerance) for axis in (0, 1))


def _centred(kernel: Tensor, h: int, w: int) -> Tensor:
    """The kernel on an (h, w) torus with its middle at 0; taps that meet are added."""
    rows = (torch.arange(kernel.shape[0]) - kernel.shape[0] // 2) % h
    columns = (torch.arange(kernel.shape[1]) - kernel.shape[1] // 2) % w
    index = (rows[:, None].expand_as(kernel), columns[None, :].expand_as(kernel))
    return kernel.new_zeros(h, w).index_put_(index, kernel, accumulate=True)


def _cosines(taps: int, n: int) -> Tensor:
    """(n, taps): cos(pi k a / n), the gains of a shift by +-a on the DCT-II of n points."""
    a = torch.arange(taps, dtype=torch.float64) - taps // 2
    return torch.cos(math.pi * torch.arange(n, dtype=torch.float64)[:, None] * a / n)


class PaddedConvolution(Operator):
    """The convolution of `Convolution` for any kernel and boundary: A and A^T alone, exact.

        A = C H E,   E continues the image by half a kernel on each side, H convolves circularly, C cuts the middle out

    Args:
        kernel: (h, w), odd sizes.
        boundary: reflect (d c b a | a b c d), circular or zero.
    """

    refusal = (
        "PaddedConvolution has A and A^T alone; a pseudo-inverse or solve needs Convolution (circular, or a symmetric "
        "kernel under reflect) or Blur"
    )

    def __init__(self, shape: Shape, kernel: Tensor, boundary: str = "reflect"):
        super().__init__(shape, shape)
        (c, h, w), kernel = self.shape, check_kernel(kernel)
        self._pad = kernel.shape[0] // 2, kernel.shape[1] // 2
        (rows, row_inside), (columns, column_inside) = (
            border(torch.arange(-p, n + p), n, boundary) for p, n in zip(self._pad, (h, w), strict=True)
        )
        inside = (row_inside[:, None] & column_inside[None, :]).double()
        self._continued = Constants(rows=rows, columns=columns, inside=inside)
        self._inner = Convolution((c, *inside.shape), kernel, "circular")

    @property
    def singular(self) -> Tensor:
        raise ValueError(self.refusal)

    def _apply(self, x: Tensor) -> Tensor:
        k, (p, q), (_, h, w) = self._continued(x.device, x.dtype), self._pad, self.shape
        z = x.index_select(-2, k.rows).index_select(-1, k.columns) * k.inside
        return self._inner(z)[..., p : p + h, q : q + w]

    def _adjoint(self, y: Tensor) -> Tensor:
        k, (p, q), (c, h, w) = self._continued(y.device, y.dtype), self._pad, self.shape
        z = self._inner.adjoint(functional.pad(y, (q, q, p, p))) * k.inside
        z = z.new_zeros(len(y), c, h, z.shape[-1]).index_add(-2, k.rows, z)
        return z.new_zeros(len(y), c, h, w).index_add(-1, k.columns, z)

    def vt(self, x: Tensor) -> Tensor:
        raise ValueError(self.refusal)

    def v(self, c: Tensor) -> Tensor:
        raise ValueError(self.refusal)

    def ut(self, y: Tensor) -> Tensor:
        raise ValueError(self.refusal)

    def u(self, c: Tensor) -> Tensor:
        raise ValueError(self.refusal)


def check_kernel(kernel: Tensor) -> Tensor:
    """The kernel as float64 on the CPU, or a ValueError."""
    kernel = torch.as_tensor(kernel).to("cpu", torch.float64)
    if kernel.ndim != 2 or not (kernel.shape[0] % 2 and kernel.shape[1] % 2):
        raise ValueError(f"a kernel is (h, w) with odd sizes, so that it has a middle, got {tuple(kernel.shape)}")
    if not kernel.isfinite().all() or not kernel.any():
        raise ValueError("the kernel is not finite, or 0 everywhere")
    return kernel


def gaussian_kernel(size: int, std: tuple[float, float], angle: float = 0.0) -> Tensor:
    """(size, size), sum 1: a Gaussian of two widths, its first axis turned by `angle` degrees against the horizontal.

    h(r) ~ exp(-(r . e)^2 / 2 std[0]^2 - (r . e')^2 / 2 std[1]^2),   e = (cos, -sin) in (column, row)
    """
    check_size(size)
    first, second = std
    if not (first > 0 and second > 0):
        raise ValueError(f"the stds of a blur are in pixels and must be positive, got {first} and {second}")
    along, across = _turned(size, angle)
    kernel = torch.exp(-0.5 * ((along / first) ** 2 + (across / second) ** 2))
    return kernel / kernel.sum()


def disk_kernel(size: int, radius: float) -> Tensor:
    """(size, size), sum 1: a lens out of focus, the share of each pixel within `radius` of the middle."""
    check_size(size)
    if not 0 < radius <= size / 2:
        raise ValueError(f"need 0 < radius <= size / 2 = {size / 2}, got {radius}")
    fine = (torch.arange(8 * size, dtype=torch.float64) + 0.5) / 8 - size / 2
    inside = (fine[:, None] ** 2 + fine[None, :] ** 2 <= radius**2).double()
    kernel = functional.avg_pool2d(inside[None, None], 8)[0, 0]
    return kernel / kernel.sum()


def motion_kernel(size: int, length: float, angle: float = 0.0, shake: float = 0.0, seed: int = 0) -> Tensor:
    """(size, size), sum 1: the path of a camera that moves `length` pixels at constant speed.

        p' = (cos theta, -sin theta) in (column, row),   theta(tau) = angle + shake W(tau),   tau in [0, 1]

    W is Brownian motion from the seed, so shake = 0 is a straight line and a larger one (degrees) a curled path. The
    path is centred on its mean and each of its points is shared among the four pixels around it.

    Raises:
        ValueError: length < 0, or a path that leaves the kernel.
    """
    check_size(size)
    if not length >= 0:
        raise ValueError(f"the length of a motion is in pixels and cannot be negative, got {length}")
    n = 64 * size  # points of the path: many a pixel
    walk = torch.from_numpy(keyed(seed).standard_normal(n)).cumsum(0) / math.sqrt(n)
    theta = torch.deg2rad(angle + shake * walk)
    steps = torch.stack([-theta.sin(), theta.cos()]) * length / n
    path = steps.cumsum(1)
    path = path - path.mean(1, keepdim=True) + size // 2  # (row, column)
    low = path.floor()
    if low.min() < 0 or low.max() + 1 > size - 1:
        raise ValueError(f"a motion of {length} pixels leaves a kernel of {size} x {size}: make it larger")
    kernel, at, part = torch.zeros(size, size, dtype=torch.float64), low.long(), path - low
    for i, row in enumerate((1 - part[0], part[0])):
        for j, column in enumerate((1 - part[1], part[1])):
            kernel.index_put_((at[0] + i, at[1] + j), row * column / n, accumulate=True)
    return kernel


def file_kernel(file: str | Path) -> Tensor:
    """A kernel from an image or a .npy file, normalised to sum 1."""
    kernel = check_kernel(image_array(file))
    if not kernel.sum() > 0:
        raise ValueError(f"the kernel in {file} must have a positive sum to be normalised, got {kernel.sum().item():g}")
    return kernel / kernel.sum()


def _turned(size: int, angle: float) -> tuple[Tensor, Tensor]:
    """Coordinates of the pixels along and across an axis turned by `angle` degrees, counter-clockwise on screen."""
    r, theta = torch.arange(size, dtype=torch.float64) - size // 2, math.radians(angle)
    row, column = r[:, None], r[None, :]
    along = column * math.cos(theta) - row * math.sin(theta)
    return along, column * math.sin(theta) + row * math.cos(theta)
