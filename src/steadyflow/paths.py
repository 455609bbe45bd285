"""Gaussian paths x_t = alpha(t) x_0 + sigma(t) eps with t = 0 data, t = 1 noise.

A path is evaluated in float64. All that samplers and denoisers need of it is the pair (alpha, sigma), their time
derivatives, and the time at a given noise-to-signal ratio sigma / alpha.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

Time = Tensor | float


class GaussianPath(ABC):
    """x_t = alpha(t) x_0 + sigma(t) eps, eps ~ N(0, I), t in [0, 1]; alpha falls, sigma rises.

    Every method takes a float or a tensor of any shape and returns float64 tensors of the same shape on its device.
    """

    @property
    def knots(self) -> Tensor:
        """The times (K,), rising, at which a derivative of (alpha, sigma) jumps. None on a smooth path."""
        return torch.empty(0, dtype=torch.float64)

    @abstractmethod
    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at time t."""

    @abstractmethod
    def derivative(self, t: Time) -> tuple[Tensor, Tensor]:
        """(d alpha / dt, d sigma / dt) at time t."""

    @abstractmethod
    def time_at(self, ratio: Time) -> Tensor:
        """The time t at which sigma / alpha = ratio, the inverse of the noise-to-signal ratio.

        Ratios the path never reaches give its nearest end, so an infinite ratio gives t = 1. NaN stays NaN.
        """

    def ratio(self, t: Time) -> Tensor:
        """The noise-to-signal ratio sigma / alpha at time t; infinite where alpha = 0."""
        alpha, sigma = self(t)
        return sigma / alpha

    def velocity(self, t: Time) -> tuple[Tensor, Tensor]:
        """(p, q) of the probability-flow ODE in terms of the denoiser D(x, alpha, sigma).

            dx/dt = alpha' D + sigma' (x - alpha D) / sigma = p x + q D,  p = sigma' / sigma,  q = alpha' - alpha p

        Finite at alpha = 0, infinite at sigma = 0. Source: Song et al. 2021 (score SDE), Eq. 13; Lipman et al. 2023.
        """
        (alpha, sigma), (dalpha, dsigma) = self(t), self.derivative(t)
        p = dsigma / sigma
        return p, dalpha - alpha * p


def _float64(t: Time) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)


class VariancePreserving(GaussianPath):
    """The continuous VP diffusion with linear beta(t) = beta_min + (beta_max - beta_min) t.

        alpha = exp(-B(t) / 2),  sigma = sqrt(1 - exp(-B(t))),  B(t) = beta_min t + (beta_max - beta_min) t^2 / 2

    Source: Song et al. 2021 (score SDE), Eq. 32-33.

    Raises:
        ValueError: unless 0 < beta_min <= beta_max.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"need 0 < beta_min <= beta_max, got {beta_min} and {beta_max}")
        self.beta_min, self.beta_max = float(beta_min), float(beta_max)

    def _integral(self, t: Tensor) -> Tensor:
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t * t

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        b = self._integral(_float64(t))
        return torch.exp(-b / 2), torch.sqrt(-torch.expm1(-b))

    def derivative(self, t: Time) -> tuple[Tensor, Tensor]:
        t = _float64(t)
        alpha, sigma = self(t)
        beta = self.beta_min + (self.beta_max - self.beta_min) * t
        return -0.5 * beta * alpha, 0.5 * beta * alpha**2 / sigma

    def time_at(self, ratio: Time) -> Tensor:
        slope = self.beta_max - self.beta_min
        b = torch.log1p(_float64(ratio) ** 2).clamp(max=self.beta_min + 0.5 * slope)  # B = log(1 + ratio^2)
        t = 2 * b / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * b))  # no cancellation at small B
        return t.clamp(0, 1)


class SubVariancePreserving(GaussianPath):
    """The sub-VP diffusion with the beta of VariancePreserving: the same mean, a smaller variance.

        alpha = exp(-B(t) / 2),  sigma = 1 - exp(-B(t)),  B(t) = beta_min t + (beta_max - beta_min) t^2 / 2

    so sigma / alpha = 2 sinh(B / 2). Source: Song et al. 2021 (score SDE), Eq. 12 and Appendix B.

    Raises:
        ValueError: unless 0 < beta_min <= beta_max.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        self._vp = VariancePreserving(beta_min, beta_max)
        self.beta_min, self.beta_max = self._vp.beta_min, self._vp.beta_max

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        alpha, sigma = self._vp(t)
        return alpha, sigma**2

    def derivative(self, t: Time) -> tuple[Tensor, Tensor]:
        t = _float64(t)
        alpha, _ = self._vp(t)
        beta = self.beta_min + (self.beta_max - self.beta_min) * t
        return -0.5 * beta * alpha, beta * alpha**2

    def time_at(self, ratio: Time) -> Tensor:
        half = torch.asinh(_float64(ratio) / 2)  # B / 2; the VP ratio sqrt(e^B - 1) is at the same time
        return self._vp.time_at(torch.sqrt(torch.expm1(2 * half)))


class DiscreteVariancePreserving(GaussianPath):
    """The discrete DDPM schedule, linear betas over `steps` steps, read as a continuous path.

        alpha_bar_i = prod_{j <= i} (1 - beta_j),  t_i = (i + 1) / steps,  i = 0..steps-1,  alpha_bar(0) = 1
        log alpha_bar(t) linear between the t_i,  alpha = sqrt(alpha_bar),  sigma = sqrt(1 - alpha_bar)

    so index i of a DDPM checkpoint stands at t = (i + 1) / steps, and every other time interpolates log alpha_bar.
    Source: Ho et al. 2020 (DDPM), Eq. 4.
    """

    def __init__(self, beta_start: float = 1e-4, beta_end: float = 0.02, steps: int = 1000):
        if not (0 < beta_start <= beta_end < 1 and 1 <= steps <= 10**6):
            needed = "0 < beta_start <= beta_end < 1 and steps from 1 to a million"
            raise ValueError(f"need {needed}; got {beta_start}, {beta_end}, {steps}")
        self.beta_start, self.beta_end, self.steps = float(beta_start), float(beta_end), int(steps)
        betas = torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)
        self._table = torch.cat([betas.new_zeros(1), -torch.log1p(-betas).cumsum(0)])  # B = -log alpha_bar at the knots

    @property
    def knots(self) -> Tensor:
        return torch.arange(1, self.steps, dtype=torch.float64) / self.steps

    def _integral(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """B(t) = -log alpha_bar(t) and its slope in t."""
        table = self._table.to(t.device)
        i = (t * self.steps).floor().long().clamp(0, self.steps - 1)
        slope = table[i + 1] - table[i]
        return table[i] + slope * (t * self.steps - i), slope * self.steps

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        b, _ = self._integral(_float64(t))
        return torch.exp(-b / 2), torch.sqrt(-torch.expm1(-b))

    def derivative(self, t: Time) -> tuple[Tensor, Tensor]:
        b, slope = self._integral(_float64(t))
        alpha, sigma = torch.exp(-b / 2), torch.sqrt(-torch.expm1(-b))
        return -0.5 * slope * alpha, 0.5 * slope * alpha**2 / sigma

    def time_at(self, ratio: Time) -> Tensor:
        b = torch.log1p(_float64(ratio) ** 2)  # B = log(1 + ratio^2)
        table = self._table.to(b.device)
        b = b.clamp(max=table[-1].item())
        i = (torch.searchsorted(table, b.contiguous()) - 1).clamp(0, self.steps - 1)
        return (i + (b - table[i]) / (table[i + 1] - table[i])) / self.steps


class Cosine(GaussianPath):
    """The variance-preserving cosine path, normalised so that alpha(0) = 1.

        alpha = cos(theta) / cos(theta_0),  sigma = sqrt(1 - alpha^2),  theta = pi / 2 (t + s) / (1 + s)

    theta_0 = theta(0). The ratio sigma / alpha is infinite at t = 1. The discrete schedule of the source is this path
    at t = i / T, but for its clipping of beta at 0.999, which moves the last level alone.
    Source: Nichol & Dhariwal 2021, Eq. 17.

    Args:
        s: the offset; 0.008 in the source, 0 gives alpha = cos(pi t / 2).
    """

    def __init__(self, s: float = 0.008):
        if not 0 <= s < 1:
            raise ValueError(f"need 0 <= s < 1, got {s}")
        self.s = float(s)
        self._rate = 0.5 * math.pi / (1 + self.s)
        self._start = self._rate * self.s  # theta_0

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        t = _float64(t)
        angle = self._rate * t  # theta - theta_0; sigma^2 as a product, free of cancellation at small t
        scale = 1 / math.cos(self._start)
        sigma = scale * torch.sqrt(torch.sin(angle) * torch.sin(angle + 2 * self._start))
        return scale * torch.sin(self._rate * (1 - t)), sigma  # of pi / 2 - theta: 0 at t = 1, never below

    def derivative(self, t: Time) -> tuple[Tensor, Tensor]:
        alpha, sigma = self(t)
        dalpha = -self._rate / math.cos(self._start) * torch.cos(self._rate * (1 - _float64(t)))
        at_zero = math.inf if self.s > 0 else self._rate
        return dalpha, torch.where(sigma > 0, -alpha * dalpha / sigma, at_zero)

    def time_at(self, ratio: Time) -> Tensor:
        q = _float64(ratio).clamp(1e-300, 1e100) / math.cos(self._start)
        u = math.tan(self._start)
        v = torch.hypot(q, torch.full_like(q, u))  # tan(theta); below, tan(theta - theta_0) = (v - u) / (1 + u v)
        return (torch.atan(q * (q / (u + v)) / (1 + u * v)) / self._rate).clamp(0, 1)


class VarianceExploding(GaussianPath):
    """The geometric VE diffusion: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t.

    At t = 0 the noise is sigma_min, not 0, and a sample taken on this path keeps it.
    Source: Song et al. 2021 (score SDE), Eq. 30-31.
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self._rate = math.log(self.sigma_max / self.sigma_min)

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        t = _float64(t)
        return torch.ones_like(t), self.sigma_min * torch.exp(self._rate * t)

    def derivative(self, t: Time) -> tuple[Tensor, Tensor]:
        t = _float64(t)
        return torch.zeros_like(t), self._rate * self(t)[1]

    def time_at(self, ratio: Time) -> Tensor:
        return (torch.log(_float64(ratio) / self.sigma_min) / self._rate).clamp(0, 1)


class EDM(GaussianPath):
    """The straight variance-exploding path of EDM: alpha = 1, sigma = sigma_max t (so EDM's own time is sigma).

    Source: Karras et al. 2022, Section 3 (sigma(t) = t, s(t) = 1), rescaled to t in [0, 1].
    """

    def __init__(self, sigma_max: float = 80.0):
        if not sigma_max > 0:
            raise ValueError(f"need sigma_max > 0, got {sigma_max}")
        self.sigma_max = float(sigma_max)

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        t = _float64(t)
        return torch.ones_like(t), self.sigma_max * t

    def derivative(self, t: Time) -> tuple[Tensor, Tensor]:
        t = _float64(t)
        return torch.zeros_like(t), torch.full_like(t, self.sigma_max)

    def time_at(self, ratio: Time) -> Tensor:
        return (_float64(ratio) / self.sigma_max).clamp(0, 1)


class ConditionalOT(GaussianPath):
    """The conditional optimal-transport path of flow matching: alpha = 1 - t, sigma = scale t.

    The ratio sigma / alpha is infinite at t = 1, where alpha = 0.
    Source: Lipman et al. 2023, Eq. 20-22 (their time runs the other way), with sigma_min = 0.

    Args:
        scale: the noise's; 2 for a flow trained on images in [0, 1], in the units of [-1, 1].

    Raises:
        ValueError: scale <= 0.
    """

    def __init__(self, scale: float = 1.0):
        if not scale > 0:
            raise ValueError(f"need scale > 0, got {scale}")
        self.scale = float(scale)

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        t = _float64(t)
        return 1 - t, self.scale * t

    def derivative(self, t: Time) -> tuple[Tensor, Tensor]:
        t = _float64(t)
        return -torch.ones_like(t), torch.full_like(t, self.scale)

    def time_at(self, ratio: Time) -> Tensor:
        ratio = _float64(ratio) / self.scale
        return torch.where(ratio > 1, 1 / (1 + 1 / ratio), ratio / (1 + ratio))


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """A coefficient () or (B,) made to multiply x (B, *S): cast to x's dtype and device, with trailing axes of 1.

    Scalars stay where they are: a 0-dim CPU tensor multiplies a CUDA tensor without a copy.
    """
    if coefficient.ndim == 0:
        return coefficient.to(x.dtype)
    return coefficient.to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def combine(a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """a x + b y in two passes over the data, for coefficients () or (B,) and x, y (B, *S) of one dtype."""
    return accumulate(a.item() * x if a.ndim == 0 else expand(a, x) * x, b, y)


def accumulate(x: Tensor, b: Tensor, y: Tensor) -> Tensor:
    """x + b y in place, one pass over the data, for a coefficient () or (B,) and x, y (B, *S) of one dtype."""
    return x.add_(y, alpha=b.item()) if b.ndim == 0 else x.addcmul_(expand(b, x), y)
