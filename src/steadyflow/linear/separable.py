"""Operators that act on rows and columns alike, A X = K_h X K_w^T: Gaussian blur and bicubic downsampling."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from steadyflow.linear.constants import Constants
from steadyflow.linear.diagonal import border
from steadyflow.linear.operator import Operator, Shape, image_shape
from steadyflow.linear.rows import check_factor


class Separable(Operator):
    """A X = K_h X K_w^T on each channel: two products with the matrices of one side.

        K = U S V^T of each side,   s_ij = S_h,i S_w,j,   V^T X = V_h^T X V_w,   U^T Y = U_h^T Y U_w

    The two small decompositions (n^3 work, once, float64) are made at the first use that needs them.

    Args:
        rows, columns: K_h (h, H) and K_w (w, W), float64.
        cutoff: see `Operator`.
    """

    def __init__(self, shape: Shape, rows: Tensor, columns: Tensor, cutoff: float = 1e-6):
        c, h, w = image_shape(shape)
        if rows.shape[1] != h or columns.shape[1] != w:
            raise ValueError(f"matrices of {rows.shape[1]} and {columns.shape[1]} columns cannot act on {h} x {w}")
        super().__init__(shape, (c, rows.shape[0], columns.shape[0]), cutoff)
        self._matrices = Constants(h=rows, w=columns)
        self.v_complete = rows.shape[0] >= h and columns.shape[0] >= w
        self.u_complete = rows.shape[0] <= h and columns.shape[0] <= w

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        k = self._matrices(torch.device("cpu"), torch.float64)
        return k.h, k.w

    @cached_property
    def singular(self) -> Tensor:
        k = self._decomposition(torch.device("cpu"), torch.float64)
        return torch.outer(k.s_h, k.s_w)[None, None]

    @cached_property
    def _decomposition(self) -> Constants:
        rows, columns = self.factors
        u_h, s_h, vt_h = torch.linalg.svd(rows, full_matrices=False)
        u_w, s_w, vt_w = (u_h, s_h, vt_h) if torch.equal(rows, columns) else torch.linalg.svd(columns, False)
        return Constants(u_h=u_h, u_w=u_w, vt_h=vt_h, vt_w=vt_w, s_h=s_h, s_w=s_w)

    def _apply(self, x: Tensor) -> Tensor:
        k = self._matrices(x.device, x.dtype)
        return k.h @ (x @ k.w.mT)

    def _adjoint(self, y: Tensor) -> Tensor:
        k = self._matrices(y.device, y.dtype)
        return (k.h.mT @ y) @ k.w

    def vt(self, x: Tensor) -> Tensor:
        k = self._decomposition(x.device, x.dtype)
        return k.vt_h @ (x @ k.vt_w.mT)

    def v(self, c: Tensor) -> Tensor:
        k = self._decomposition(c.device, c.dtype)
        return (k.vt_h.mT @ c) @ k.vt_w

    def ut(self, y: Tensor) -> Tensor:
        k = self._decomposition(y.device, y.dtype)
        return k.u_h.mT @ (y @ k.u_w)

    def u(self, c: Tensor) -> Tensor:
        k = self._decomposition(c.device, c.dtype)
        return (k.u_h @ c) @ k.u_w.mT


class Blur(Separable):
    """Gaussian blur with the kernel of size x size taps, normalised to sum 1.

        h(a, b) ~ exp(-a^2 / 2 std_h^2 - b^2 / 2 std_w^2),   |a|, |b| <= (size - 1) / 2

    A blur has singular values near 0 (3 pixels on 256: down to rounding), so its pseudo-inverse is what the cutoff
    makes it. The default keeps the directions that return at least 3% of their amplitude, and so magnifies an error
    of y at most 33 times; Kawar et al. 2022 (DDRM) cut their deblurring at the same 0.03. A measurement with noise
    needs no cutoff: `solve` uses all of the spectrum. Under a circular boundary `Convolution` with a Gaussian kernel
    is the same operator by Fourier transforms, 2 to 4 times as fast at 256 x 256 (scripts/bench/operators.py).

    Args:
        std: of the Gaussian in pixels, one number or (vertical, horizontal).
        size: the taps along a side, odd. May exceed the image.
        boundary: how the image goes on beyond its edges: reflect (d c b a | a b c d), circular or zero.
        cutoff: relative to the largest singular value.

    Raises:
        ValueError: std <= 0, a size that is not odd and positive, an unknown boundary.
    """

    def __init__(
        self,
        shape: Shape,
        std: float | Sequence[float] = 3.0,
        size: int = 61,
        boundary: str = "reflect",
        cutoff: float = 0.03,
    ):
        _, h, w = image_shape(shape)
        std_h, std_w = (std, std) if isinstance(std, int | float) else std
        rows = convolution_matrix(gaussian_taps(std_h, size), h, boundary)
        columns = convolution_matrix(gaussian_taps(std_w, size), w, boundary)
        super().__init__(shape, rows, columns, cutoff)


def gaussian_taps(std: float, size: int) -> Tensor:
    """(size,): exp(-a^2 / 2 std^2), normalised to sum 1."""
    if not std > 0:
        raise ValueError(f"the std of a blur is in pixels and must be positive, got {std}")
    check_size(size)
    a = torch.arange(size, dtype=torch.float64) - size // 2
    taps = torch.exp(-0.5 * (a / std) ** 2)
    return taps / taps.sum()


def check_size(size: int) -> None:
    """Raises a ValueError unless a kernel of this many taps has a middle."""
    if not (isinstance(size, int) and size > 0 and size % 2):
        raise ValueError(f"the size of a kernel must be odd and positive, so that it has a middle, got {size}")


def convolution_matrix(taps: Tensor, n: int, boundary: str) -> Tensor:
    """K (n, n): (K x)_i = sum_a taps[a] x_{i - a} with a from the middle of the taps, float64."""
    i, a = torch.arange(n)[:, None], torch.arange(len(taps))[None, :] - len(taps) // 2
    j, inside = border(i - a, n, boundary)
    return taps.new_zeros(n, n).index_put_((i.expand_as(j), j), taps * inside, accumulate=True)


class BicubicDownsampling(Separable):
    """Bicubic downsampling with antialiasing, as Matlab's imresize (and torch away from the borders) has it.

        (K x)_i = sum_j k((c_i - j) / f) x_j / sum_j k((c_i - j) / f),   c_i = (i + 1/2) f - 1/2,   a = -1/2
        k(u) = (a + 2) |u|^3 - (a + 3) |u|^2 + 1  (|u| <= 1),   a |u|^3 - 5 a |u|^2 + 8 a |u| - 4 a  (1 < |u| < 2)

    The image is continued by reflection, d c b a | a b c d | d c b a. Source: Keys 1981, Eq. 15, the kernel stretched
    by the factor.

    Args:
        factor: f; divides H and W. Singular values of x4 lie in [0.12, 0.25], so nothing is cut off.

    Raises:
        ValueError: a factor that does not divide the size.
    """

    def __init__(self, shape: Shape, factor: int = 4):
        _, h, w = image_shape(shape)
        check_factor(shape, factor)
        self.factor = factor
        super().__init__(shape, bicubic_matrix(h, factor), bicubic_matrix(w, factor))


def bicubic_matrix(n: int, factor: int) -> Tensor:
    """K (n / factor, n) of `BicubicDownsampling`, float64."""
    centre = (torch.arange(n // factor, dtype=torch.float64) + 0.5) * factor - 0.5
    j = centre.floor().long()[:, None] + torch.arange(-2 * factor, 2 * factor + 2)[None, :]
    u = ((centre[:, None] - j) / factor).abs()
    weight = torch.where(u <= 1, 1.5 * u**3 - 2.5 * u**2 + 1, -0.5 * u**3 + 2.5 * u**2 - 4 * u + 2)
    weight = torch.where(u < 2, weight, 0.0)
    weight = weight / weight.sum(1, keepdim=True)
    i, (pixel, _) = torch.arange(n // factor)[:, None], border(j, n, "reflect")
    return weight.new_zeros(n // factor, n).index_put_((i.expand_as(j), pixel), weight, accumulate=True)
