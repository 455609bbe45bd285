"""Operators whose rows are orthogonal, A A^T = diag(s^2): block averages, colour to grey, Walsh-Hadamard, Fourier."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from steadyflow.linear.constants import Constants, keyed
from steadyflow.linear.operator import Operator, Shape, image_shape


class RowOrthogonal(Operator):
    """A whose A A^T = diag(s^2) in the measurement's own coordinates, so that U = I and V^T = diag(1 / s) A.

        A^+ y = A^T (y / s^2),   A^+ A x = A^T (A x / s^2),   (r2 A A^T + n2 I)^-1 y = y / (r2 s^2 + n2)

    Coordinates with s = 0 measure nothing.
    """

    u_complete = True

    def __init__(self, shape: Shape, measured_shape: Shape, singular: Tensor):
        super().__init__(shape, measured_shape)
        self._singular = singular
        self._reciprocal = Constants(value=torch.where(singular > 0, 1 / singular, 0.0))

    @property
    def singular(self) -> Tensor:
        return self._singular

    def vt(self, x: Tensor) -> Tensor:
        return self._apply(x) * self._reciprocal(x.device, x.dtype).value

    def v(self, c: Tensor) -> Tensor:
        return self._adjoint(c * self._reciprocal(c.device, c.dtype).value)

    def ut(self, y: Tensor) -> Tensor:
        return y

    def u(self, c: Tensor) -> Tensor:
        return c


class SuperResolution(RowOrthogonal):
    """Averages over blocks of factor x factor pixels: A A^T = I / factor^2, A^+ repeats each pixel.

    Args:
        factor: the sides of a block; divides H and W.

    Raises:
        ValueError: a factor that does not divide the size.
    """

    def __init__(self, shape: Shape, factor: int):
        (c, h, w), self.factor = image_shape(shape), factor
        check_factor(shape, factor)
        one = torch.full((1, 1, 1, 1), 1 / factor, dtype=torch.float64)
        super().__init__(shape, (c, h // factor, w // factor), one)

    def _apply(self, x: Tensor) -> Tensor:
        return functional.avg_pool2d(x, self.factor)

    def _adjoint(self, y: Tensor) -> Tensor:
        (b, c, h, w), f = y.shape, self.factor
        rows = (y / f**2)[..., None].expand(b, c, h, w, f).reshape(b, c, h, 1, w * f)
        return rows.expand(b, c, h, f, w * f).reshape(b, c, h * f, w * f)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        mean = torch.full((1, self.factor), 1 / self.factor, dtype=torch.float64)
        _, h, w = self.measured_shape
        return torch.kron(torch.eye(h, dtype=mean.dtype), mean), torch.kron(torch.eye(w, dtype=mean.dtype), mean)


def check_factor(shape: Shape, factor: int) -> None:
    """Raises a ValueError unless the factor divides both sides of an image."""
    _, h, w = shape
    if not (isinstance(factor, int) and factor >= 1 and h % factor == w % factor == 0):
        raise ValueError(f"the factor {factor} does not divide an image of {h} x {w}: crop it, or choose a divisor")


class Colorization(RowOrthogonal):
    """A weighted sum over the channels: one grey channel, A A^T = |weights|^2 I.

    Args:
        weights: "mean" (1/C each), "luma" (0.299, 0.587, 0.114: ITU-R BT.601) or C numbers.

    Raises:
        ValueError: weights that are not C finite numbers, or all 0.
    """

    def __init__(self, shape: Shape, weights: str | Sequence[float] = "mean"):
        c, h, w = image_shape(shape)
        named = {"mean": [1 / c] * c, "luma": [0.299, 0.587, 0.114]}
        if isinstance(weights, str) and weights not in named:
            raise ValueError(f"the weights are 'mean', 'luma' or one number a channel, got '{weights}'")
        row = torch.tensor(named[weights] if isinstance(weights, str) else list(weights), dtype=torch.float64)
        if row.shape != (c,) or not row.isfinite().all() or not row.any():
            raise ValueError(f"an image of {c} channels needs {c} weights, not all 0, got {row.tolist()}")
        super().__init__(shape, (1, h, w), row.norm().reshape(1, 1, 1, 1))
        self._weights = Constants(row=row.reshape(1, c, 1, 1))

    def _apply(self, x: Tensor) -> Tensor:
        return (self._weights(x.device, x.dtype).row * x).sum(1, keepdim=True)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._weights(y.device, y.dtype).row * y


class WalshHadamard(RowOrthogonal):
    """Compressed sensing: M of the N = H W rows of the orthonormal Walsh-Hadamard matrix, on each channel. A A^T = I.

        A x = (W_N x)[rows],   W_2 = [[1, 1], [1, -1]] / sqrt(2),  W_2N = W_2 (x) W_N  (natural order)

    Row 0, the mean, is always measured; the others are drawn without replacement from the seed. y is (B, C, 1, M).
    The transform is a product with Hadamard matrices of side 16 at most along each digit of the pixel's number.

    Args:
        ratio: M / N, in (0, 1].
        seed: of the rows.

    Raises:
        ValueError: H W not a power of two, or a ratio out of range.
    """

    RADIX = 16

    def __init__(self, shape: Shape, ratio: float = 0.25, seed: int = 0):
        c, h, w = image_shape(shape)
        n = h * w
        if n & (n - 1):
            raise ValueError(f"the Walsh-Hadamard transform needs H W a power of two, got {h} x {w}: crop or pad")
        if not 0 < ratio <= 1:
            raise ValueError(f"need 0 < ratio <= 1, got {ratio}")
        m = max(1, round(ratio * n))
        super().__init__(shape, (c, 1, m), torch.ones(1, 1, 1, 1, dtype=torch.float64))
        rows = torch.from_numpy(keyed(seed).permutation(n - 1)[: m - 1] + 1)
        self.rows = torch.cat([rows.new_zeros(1), rows.sort().values])  # which rows are measured, rising
        self._constants = Constants(rows=self.rows, full=_hadamard(self.RADIX), rest=_hadamard(self._rest(n)))

    def _rest(self, n: int) -> int:
        while n >= self.RADIX:
            n //= self.RADIX
        return n

    def transform(self, x: Tensor) -> Tensor:
        """W_N on the last axis of x (*, N). Each pass transforms the lowest digit and moves it to the front."""
        k, n = self._constants(x.device, x.dtype), x.shape[-1]
        z = x.reshape(-1, n)
        while n > 1:
            side = self.RADIX if n >= self.RADIX else n
            z = (z.reshape(len(z), -1, side) @ (k.full if side == self.RADIX else k.rest)).mT.reshape(len(z), -1)
            n //= side
        return z.reshape(x.shape)

    def _apply(self, x: Tensor) -> Tensor:
        return self.transform(x.flatten(2)).index_select(-1, self._constants(x.device, x.dtype).rows).unsqueeze(2)

    def _adjoint(self, y: Tensor) -> Tensor:
        (c, h, w), rows = self.shape, self._constants(y.device, y.dtype).rows
        full = y.new_zeros(len(y), c, h * w).index_copy(-1, rows, y.squeeze(2))
        return self.transform(full).reshape(-1, c, h, w)


def _hadamard(n: int) -> Tensor:
    """W_n, orthonormal, for a power of two n."""
    two, w = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2), torch.ones(1, 1).double()
    while len(w) < n:
        w = torch.kron(two, w)
    return w


class Fourier(RowOrthogonal):
    """Undersampled Fourier measurements of a real image (magnetic resonance), orthonormal transform F.

        y = [Re(m F x), Im(m F x)]  over the half plane of frequencies k that `rfft2` returns:  (B, 2 C, H, W // 2 + 1)

    A real image has (F x)(-k) = conj (F x)(k), so k and -k carry the same numbers: a pair is measured once, where the
    mask holds either, and y is 0 elsewhere. Real and imaginary part of a pair each have s = 1 / sqrt(2), a frequency
    that is its own partner (such as the mean) s = 1 and no imaginary part. sigma_y is the standard deviation of each
    part; noise added where nothing is measured (s = 0) is never read.

    Args:
        mask: (H, W), 1 where a frequency is measured, k = 0 first as `fft2` has it; or what makes one of (H, W), such
            as `cartesian_lines`.

    Raises:
        ValueError: a mask of another size, of other values than 0 and 1, or of all zeros.
    """

    def __init__(self, shape: Shape, mask: Tensor | Callable[[tuple[int, int]], Tensor]):
        c, h, w = image_shape(shape)
        mask = binary_mask(mask, (1, h, w)).expand(1, h, w)[0].bool()
        row, column = torch.arange(h)[:, None], torch.arange(w // 2 + 1)[None, :]
        mask = mask[:, : w // 2 + 1] | mask[-row % h, -column % w]
        alone = (column == -column % w) & (row == -row % h)
        second = (column == -column % w) & (row > -row % h)  # the later one of a pair that lies in the half plane
        real = (mask & ~second).double() * ((1 + alone.double()) / 2).sqrt()
        both = torch.stack([real, torch.where(alone, 0.0, real)])  # (2, H, W // 2 + 1)
        super().__init__(shape, (2 * c, h, w // 2 + 1), both.repeat_interleave(c, 0)[None])

    def _apply(self, x: Tensor) -> Tensor:
        z = torch.fft.rfft2(x, norm="ortho")
        return torch.cat([z.real, z.imag], 1) * self._spectrum(x.device, x.dtype).kept

    def _adjoint(self, y: Tensor) -> Tensor:
        (c, _, w), y = self.shape, y * self._spectrum(y.device, y.dtype).kept
        z = torch.complex(y[:, :c], y[:, c:])
        full = torch.cat([z, z.new_zeros(*z.shape[:-1], w - z.shape[-1])], -1)  # one of each pair: no Hermitian half
        return torch.fft.ifft2(full, norm="ortho").real


def binary_mask(mask: Tensor | Callable[[tuple[int, int]], Tensor], shape: Shape) -> Tensor:
    """A mask of (H, W), (1, H, W) or (C, H, W), made by a function of (H, W) or given, as float64 (1 or C, H, W).

    Raises:
        ValueError: another size, values other than 0 and 1, or a mask of all zeros.
    """
    c, h, w = shape
    made = torch.as_tensor(mask((h, w)) if callable(mask) else mask).to("cpu", torch.float64)
    made = made[None] if made.ndim == 2 else made
    if made.ndim != 3 or made.shape[0] not in (1, c) or made.shape[1:] != (h, w):
        raise ValueError(f"the mask must be of shape ({h}, {w}) or ({c}, {h}, {w}), got {tuple(made.shape)}")
    if not bool(((made == 0) | (made == 1)).all()):
        raise ValueError("a mask holds 0 (missing) and 1 (measured) only: threshold it first")
    if not made.any():
        raise ValueError("the mask is 0 everywhere: nothing is measured")
    return made
