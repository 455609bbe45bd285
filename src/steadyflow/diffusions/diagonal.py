"""Linear diffusions that are diagonal in an orthonormal basis: any Gaussian path, and blurring."""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from steadyflow.diffusions.linear import LinearDiffusion, float64
from steadyflow.linear.diagonal import CosineBasis
from steadyflow.paths import GaussianPath, Time

LARGEST = 4096  # side of an image: its basis is a dense matrix


class Diagonal(LinearDiffusion):
    """u_t = alpha_f(t) u_0 + sigma(t) eps at frequency f:  F = alpha' / alpha,  G^2 = (sigma^2)' - 2 F sigma^2.

    Psi(t, s) = alpha(t) / alpha(s),  R = L = sigma,  B = sigma' - F sigma
    Psi^(t, s) = (alpha_s / alpha_t)^(lambda^2) (sigma_t / sigma_s)^(1 + lambda^2)
    """

    path: GaussianPath  # of what is not blurred

    @property
    def knots(self) -> Tensor:
        return self.path.knots

    @abstractmethod
    def signal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and its derivative (*T, *F)."""

    @abstractmethod
    def level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sigma and its derivative (*T, *F)."""

    def drift(self, t: Time) -> Tensor:
        alpha, dalpha = self.signal(float64(t))
        return _block(dalpha / alpha)

    def noise(self, t: Time) -> Tensor:
        (alpha, dalpha), (sigma, dsigma) = self.signal(float64(t)), self.level(float64(t))
        return _block((2 * sigma * (dsigma - dalpha / alpha * sigma)).clamp(min=0).sqrt())

    def transition(self, t: Time, s: Time) -> Tensor:
        return _block(self.signal(float64(t))[0] / self.signal(float64(s))[0])

    def covariance(self, t: Time) -> Tensor:
        return _block(self.level(float64(t))[0] ** 2)

    def cholesky(self, t: Time) -> Tensor:
        return _block(self.level(float64(t))[0])

    def rotation(self, t: Time) -> Tensor:
        return torch.ones_like(self.cholesky(t))

    def rate(self, t: Time) -> Tensor:
        (alpha, dalpha), (sigma, dsigma) = self.signal(float64(t)), self.level(float64(t))
        return _block(dsigma - dalpha / alpha * sigma)

    def damped_transition(self, t: Time, s: Time, lambda_: float) -> Tensor:
        power = lambda_**2
        return self.transition(s, t) ** power * (self.cholesky(t) / self.cholesky(s)) ** (1 + power)


class Isotropic(Diagonal):
    """A Gaussian path x_t = alpha(t) x_0 + sigma(t) eps as a linear diffusion, VP for one: k = 1, no frequencies.

    Args:
        path: with alpha > 0 at every time it is used at.
    """

    def __init__(self, path: GaussianPath):
        self.path = path

    def signal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.path(t)[0], self.path.derivative(t)[0]

    def level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.path(t)[1], self.path.derivative(t)[1]


class BDM(Diagonal):
    """Blurring diffusion: each frequency of the discrete cosine transform fades at its own pace.

        alpha_ij(t) = a(t) d_ij(t),  sigma(t) = s(t),  d = (1 - floor) exp(-Lambda_ij blur(t)^2 / 2) + floor
        blur(t) = blur_max sin^2(pi t / 2),  Lambda_ij = pi^2 (i^2 / H^2 + j^2 / W^2)

    with (a, s) a Gaussian path. The frequencies F are (H, W); the basis is the orthonormal DCT-II of the last two axes.
    Source: Hoogeboom & Salimans 2023, Section 4.2, Eq. 23-25 (thesis Eq. 7.11).

    Args:
        path: (a, s), with a > 0 up to t = 1, as VP; on a cosine path start a little before t = 1.
        size: of the images, H = W or (H, W).
        blur_max: the standard deviation of the blur at t = 1, in pixels.
        floor: what is left of the highest frequencies.

    Raises:
        ValueError: blur_max < 0, a floor outside (0, 1], a size above 4096, or, in use, images of another size.
    """

    def __init__(self, path: GaussianPath, size: int | Sequence[int], blur_max: float = 20.0, floor: float = 0.001):
        if not (blur_max >= 0 and 0 < floor <= 1):
            raise ValueError(f"need blur_max >= 0 and 0 < floor <= 1, got {blur_max} and {floor}")
        self.path, self.blur_max, self.floor = path, float(blur_max), float(floor)
        h, w = (size, size) if isinstance(size, int) else size
        self.size = (int(h), int(w))
        if not all(1 <= n <= LARGEST for n in self.size):
            raise ValueError(f"need images of a size from 1 to {LARGEST}, got {self.size}")
        squares = [(torch.arange(n, dtype=torch.float64) / n) ** 2 for n in self.size]
        self._lambda = math.pi**2 * (squares[0][:, None] + squares[1])
        self._basis = CosineBasis(*self.size)

    @property
    def frequencies(self) -> tuple[int, ...]:
        return self.size

    def signal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        a, da = (v[..., None, None] for v in (self.path(t)[0], self.path.derivative(t)[0]))
        t = t[..., None, None]
        lam, angle = self._lambda.to(t.device), 0.5 * math.pi * t
        blur = self.blur_max * torch.sin(angle) ** 2
        dblur = self.blur_max * 0.5 * math.pi * torch.sin(2 * angle)
        fade = (1 - self.floor) * torch.exp(-0.5 * lam * blur**2)
        d = fade + self.floor
        return a * d, da * d - a * fade * lam * blur * dblur

    def level(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma, dsigma = self.path(t)[1], self.path.derivative(t)[1]
        shape = (*t.shape, *self.size)
        return sigma[..., None, None].expand(shape), dsigma[..., None, None].expand(shape)

    def to_basis(self, u: Tensor) -> Tensor:
        with self._exact(u):
            return self._basis(u)

    def from_basis(self, y: Tensor) -> Tensor:
        with self._exact(y):
            return self._basis.inverse(y)

    def _exact(self, u: Tensor) -> torch.autocast:
        """Checks the size, and keeps autocast away from the products."""
        if u.ndim != 4 or tuple(u.shape[2:]) != self.size:
            h, w = self.size
            raise ValueError(f"this blurring diffusion is of {h} x {w} images, got {tuple(u.shape)}; set path.size")
        return torch.autocast(u.device.type, enabled=False)


def _block(value: Tensor) -> Tensor:
    return value[..., None, None]
