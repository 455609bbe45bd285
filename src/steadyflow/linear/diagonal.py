"""Operators that a unitary transform of the image diagonalises: identity, masks, convolutions."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from steadyflow.linear.constants import Constants
from steadyflow.linear.operator import Operator, Shape, image_shape
from steadyflow.linear.rows import binary_mask


class Basis(Protocol):
    """A unitary transform T of the last two axes."""

    def __call__(self, x: Tensor) -> Tensor:
        """T x."""

    def inverse(self, c: Tensor) -> Tensor:
        """T^* c."""


class Pixels:
    """T = I."""

    def __call__(self, x: Tensor) -> Tensor:
        return x

    def inverse(self, c: Tensor) -> Tensor:
        return c


class FourierBasis:
    """The orthonormal Fourier transform of a real image, of which the half plane of `rfft2` is kept."""

    def __init__(self, h: int, w: int):
        self.size = (h, w)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.fft.rfft2(x, norm="ortho")

    def inverse(self, c: Tensor) -> Tensor:
        return torch.fft.irfft2(c, s=self.size, norm="ortho")


class CosineBasis:
    """The orthonormal DCT-II of both axes: T x = D_H x D_W^T. It diagonalises convolutions with a kernel symmetric
    about both axes on images continued by reflection about the edges of the border pixels (Strang 1999)."""

    def __init__(self, h: int, w: int):
        self._matrices = Constants(h=cosine_matrix(h), w=cosine_matrix(w))

    def __call__(self, x: Tensor) -> Tensor:
        d = self._matrices(x.device, x.dtype)
        return d.h @ (x @ d.w.mT)

    def inverse(self, c: Tensor) -> Tensor:
        d = self._matrices(c.device, c.dtype)
        return d.h.mT @ (c @ d.w)


def cosine_matrix(n: int) -> Tensor:
    """The orthonormal DCT-II matrix (n, n): row k is sqrt(2 / n) cos(pi k (j + 1/2) / n), row 0 sqrt(1 / n)."""
    k, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)[None, :]
    d = math.sqrt(2 / n) * torch.cos(math.pi * k * (j + 0.5) / n)
    d[0] /= math.sqrt(2)
    return d


class Diagonal(Operator):
    """A = T^* diag(g) T with a unitary transform T and a gain g, real or complex.

        s = |g|,   V^T = T,   U^T = conj(g / |g|) T

    Args:
        basis: T.
        gain: g, float64 or complex128, (1, *, *, *), which multiplies T x.
    """

    v_complete = u_complete = True

    def __init__(self, shape: Shape, basis: Basis, gain: Tensor, cutoff: float = 1e-6):
        super().__init__(shape, shape, cutoff)
        self.basis, self.gain = basis, gain
        phase = torch.where(gain.abs() > 0, gain / gain.abs().clamp(min=torch.finfo(torch.float64).tiny), 1.0)
        self._constants = Constants(gain=gain, phase=phase)
        self._turns = bool((phase != 1).any())  # a gain that is not negative has U = V

    @property
    def singular(self) -> Tensor:
        return self.gain.abs()

    def _apply(self, x: Tensor) -> Tensor:
        return self.basis.inverse(self._constants(x.device, x.dtype).gain * self.basis(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.basis.inverse(self._constants(y.device, y.dtype).gain.conj() * self.basis(y))

    def vt(self, x: Tensor) -> Tensor:
        return self.basis(x)

    def v(self, c: Tensor) -> Tensor:
        return self.basis.inverse(c)

    def ut(self, y: Tensor) -> Tensor:
        c = self.basis(y)
        return self._constants(y.device, y.dtype).phase.conj() * c if self._turns else c

    def u(self, c: Tensor) -> Tensor:
        if self._turns:
            c = self._constants(c.device, c.real.dtype).phase * c
        return self.basis.inverse(c)


class Denoising(Diagonal):
    """The identity: y = x, of which only the noise is to be removed."""

    def __init__(self, shape: Shape):
        super().__init__(shape, Pixels(), torch.ones(1, 1, 1, 1, dtype=torch.float64))


class Inpainting(Diagonal):
    """Keeps the pixels where the mask is 1: y = m x, an image that is 0 where pixels are missing.

    Noise added to the missing pixels of y is never read by adjoint or pinv.

    Args:
        mask: (H, W), (1, H, W) or (C, H, W) of 0 (missing) and 1 (known), the same for every image; or what makes one
            of (H, W), such as `box_mask` and its neighbours with their options bound.

    Raises:
        ValueError: a mask of another size, of other values, or of all zeros.
    """

    def __init__(self, shape: Shape, mask: Tensor | Callable[[tuple[int, int]], Tensor]):
        self.mask = binary_mask(mask, image_shape(shape))  # (1 or C, H, W), float64
        super().__init__(shape, Pixels(), self.mask[None])


BOUNDARIES = ("reflect", "circular", "zero")


def border(index: Tensor, n: int, boundary: str) -> tuple[Tensor, Tensor]:
    """Where a continued image of n pixels has its pixel `index`: (the pixel, whether there is one).

    reflect is half-sample symmetric, d c b a | a b c d | d c b a: scipy.ndimage's "reflect", Matlab's "symmetric",
    and not torch's "reflect". circular is periodic, zero is 0 outside. Kernels may be longer than the image.
    """
    if boundary not in BOUNDARIES:
        raise ValueError(f"the boundary is one of {', '.join(BOUNDARIES)}, got '{boundary}'")
    if boundary == "zero":
        return index.clamp(0, n - 1), (index >= 0) & (index < n)
    if boundary == "circular":
        return index % n, torch.ones_like(index, dtype=torch.bool)
    index = index % (2 * n)
    return torch.minimum(index, 2 * n - 1 - index), torch.ones_like(index, dtype=torch.bool)
