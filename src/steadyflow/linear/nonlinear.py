"""Non-linear measurements with a heuristic inverse, for guidance that asks no more than h and h^+ of an operator."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from steadyflow.linear.constants import Constants
from steadyflow.linear.diagonal import cosine_matrix
from steadyflow.linear.operator import Shape, image_shape


class NonlinearOperator(ABC):
    """y = h(x) and an h^+ with h(h^+(h(x))) = h(x) and h^+(h(h^+(y))) = h^+(y), so that h^+(h(.)) may stand for A^+ A.

    Images (B, C, H, W) in [-1, 1]. Each class says where the two identities hold and what its gradient is.
    Source: Song et al. 2023 (PiGDM), Section 3.2.
    """

    def __init__(self, shape: Shape):
        self.shape = self.measured_shape = image_shape(shape)

    def __call__(self, x: Tensor) -> Tensor:
        """h(x)."""
        return self._apply(self._checked(x))

    def pinv(self, y: Tensor) -> Tensor:
        """h^+(y)."""
        return self._inverse(self._checked(y))

    def project(self, x: Tensor) -> Tensor:
        """h^+(h(x)), in the place of A^+ A x."""
        return self.pinv(self(x))

    @abstractmethod
    def _apply(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _inverse(self, y: Tensor) -> Tensor: ...

    def _checked(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1:] != self.shape:
            raise ValueError(
                f"{type(self).__name__} takes a batch (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}: "
                "build it with the shape (C, H, W) of the image"
            )
        return x


class Clip(NonlinearOperator):
    """An overexposed image, y = clip(gain x, -1, 1), as of a camera with too small a range; h^+(y) = clip(y) / gain.

    Both identities hold for every x and y, to rounding. The gradient is gain where nothing is clipped, else 0.

    Args:
        gain: > 0; 2 is usual (Mardani et al. 2023, HDR).
    """

    def __init__(self, shape: Shape, gain: float = 2.0):
        if not gain > 0:
            raise ValueError(f"the gain must be positive, got {gain}")
        super().__init__(shape)
        self.gain = float(gain)

    def _apply(self, x: Tensor) -> Tensor:
        return (self.gain * x).clamp(-1, 1)

    def _inverse(self, y: Tensor) -> Tensor:
        return y.clamp(-1, 1) / self.gain


class Quantise(NonlinearOperator):
    """The nearest of 2^bits levels from -1 to 1, both ends among them; h^+ = h, the projection on the levels.

    Both identities hold exactly. The gradient is 0 wherever there is one.

    Args:
        bits: 1 to 16.
    """

    def __init__(self, shape: Shape, bits: int = 2):
        if bits not in range(1, 17):
            raise ValueError(f"need 1 to 16 bits, got {bits}")
        super().__init__(shape)
        self.steps = 2**bits - 1

    def _apply(self, x: Tensor) -> Tensor:
        return ((x.clamp(-1, 1) + 1) * (self.steps / 2)).round() * (2 / self.steps) - 1

    def _inverse(self, y: Tensor) -> Tensor:
        return self._apply(y)


# Quantisation tables of ITU-T T.81 (JPEG), Annex K, Tables K.1 and K.2.
LUMINANCE = """16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56  14 17 22 29 51 87 80 62
18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92  49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99"""
CHROMINANCE = """17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99  47 66 99 99 99 99 99 99
99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99  99 99 99 99 99 99 99 99"""
YCBCR = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]  # JFIF, of RGB


class JPEG(NonlinearOperator):
    """JPEG compression: y is the decoded image, h^+ = h.

        y = decode(round(DCT(x) / q) q) of 8 x 8 blocks in YCbCr,   q = max(1, floor((table scale + 50) / 100))
        scale = 5000 / quality below 50, 200 - 2 quality from 50 up (libjpeg)

    The decoded image is neither rounded nor clipped to 8 bits, and halved colours are repeated rather than smoothed,
    so that h h = h and both identities hold to rounding. The gradient is 0 wherever there is one.

    Args:
        quality: 1 to 100.
        halve_colours: averages Cb and Cr over 2 x 2 pixels (4:2:0), as most encoders do.

    Raises:
        ValueError: a quality out of range; channels other than 1 (grey) or 3 (RGB); sides that are not multiples of 8,
            or of 16 with halved colours.
    """

    def __init__(self, shape: Shape, quality: int = 10, halve_colours: bool = True):
        super().__init__(shape)
        c, h, w = self.shape
        if quality not in range(1, 101):
            raise ValueError(f"the quality of a JPEG is 1 to 100, got {quality}")
        if c not in (1, 3):
            raise ValueError(f"a JPEG has 1 or 3 channels, the image has {c}")
        block = 16 if halve_colours and c == 3 else 8
        if h % block or w % block:
            raise ValueError(f"JPEG needs sides that are multiples of {block}, got {h} x {w}: crop the image")
        self.halve_colours = halve_colours and c == 3
        scale = 5000 // quality if quality < 50 else 200 - 2 * quality
        tables = torch.tensor([[int(n) for n in table.split()] for table in (LUMINANCE, CHROMINANCE)])
        tables = ((tables * scale + 50) // 100).clamp(1, 255).double().reshape(2, 8, 8)
        to_ycc = torch.tensor(YCBCR, dtype=torch.float64)
        self._constants = Constants(
            luma=tables[0], chroma=tables[1], dct=cosine_matrix(8), to_ycc=to_ycc, to_rgb=torch.linalg.inv(to_ycc)
        )

    def _apply(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            k = self._constants(x.device, x.dtype)
            levels = 127.5 * (x + 1) - 128
            if self.shape[0] == 1:
                return (self._blocks(levels, k.luma) + 128) / 127.5 - 1
            ycc = torch.einsum("ij,bjhw->bihw", k.to_ycc, levels + 128)
            y, colours = self._blocks(ycc[:, :1] - 128, k.luma) + 128, ycc[:, 1:]
            if self.halve_colours:
                colours = torch.nn.functional.avg_pool2d(colours, 2)
            colours = self._blocks(colours, k.chroma)
            if self.halve_colours:
                colours = colours.repeat_interleave(2, -2).repeat_interleave(2, -1)
            return torch.einsum("ij,bjhw->bihw", k.to_rgb, torch.cat([y, colours], 1)) / 127.5 - 1

    def _inverse(self, y: Tensor) -> Tensor:
        return self._apply(y)

    def _blocks(self, x: Tensor, table: Tensor) -> Tensor:
        """Each 8 x 8 block with its DCT coefficients rounded to multiples of the table."""
        d = self._constants(x.device, x.dtype).dct
        b, c, h, w = x.shape
        blocks = x.reshape(b, c, h // 8, 8, w // 8, 8).transpose(3, 4)
        coefficients = (d @ blocks @ d.mT / table).round() * table
        return (d.mT @ coefficients @ d).transpose(3, 4).reshape(b, c, h, w)
