"""The denoising loss of any (path, prediction, loss weight): how times are drawn and how the error is weighted."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from steadyflow.denoisers import NetworkDenoiser, NetworkNoise
from steadyflow.paths import GaussianPath

Trainable = NetworkDenoiser | NetworkNoise


def denoising_loss(
    denoiser: Trainable, x0: Tensor, eps: Tensor, t: Tensor, weight: "Weight", **condition: Tensor
) -> Tensor:
    """w(t) mean |network(x_t, t) - target|^2 of each sample, (B,) float32, x_t = alpha(t) x0 + sigma(t) eps.

    On a linear diffusion u_t = Psi(t, 0) lift(x0) + K_t eps, the target eps (thesis Eq. 7.5), for CLD with v_0
    integrated out (hybrid score matching, Dockhorn et al. 2022, Eq. 8).

    The mean runs over the entries of a sample. The network may run in lower precision; the error is taken in float32
    (float64 for float64 data). With a velocity prediction on conditional OT and weight 1 this is flow matching (Lipman
    et al. 2023, Eq. 23); with an eps prediction on VP, DDPM's simple loss (Ho et al. 2020, Eq. 14).

    Args:
        x0: (B, *S). eps: of the state, (B, *S) or (B, k C, *rest). t: (B,) float64, path time.
        condition: what the network is conditioned on.
    """
    x = denoiser.noised(x0, eps, t)
    error = denoiser.output(x, t, **condition).to(x0.dtype) - denoiser.target(x0, eps, t)
    return weight(denoiser, t).to(x0.device, x0.dtype) * error.square().flatten(1).mean(1)


class Times(ABC):
    """How training times are drawn: the quantile function of their distribution."""

    @abstractmethod
    def __call__(self, path: GaussianPath, u: Tensor) -> Tensor:
        """t (B,) float64 of u (B,) uniform on [0, 1)."""


class UniformTimes(Times):
    """t = start + u (end - start), 0 <= start < end <= 1."""

    def __init__(self, start: float = 1e-3, end: float = 1.0):
        if not 0 <= start < end <= 1:
            raise ValueError(f"need 0 <= start < end <= 1, got start {start} and end {end}")
        self.start, self.end = float(start), float(end)

    def __call__(self, path: GaussianPath, u: Tensor) -> Tensor:
        return self.start + u.double() * (self.end - self.start)


class LogitNormalTimes(Times):
    """t = sigmoid(mean + std Phi^-1(u)): more of the middle. Source: Esser et al. 2024 (SD3), Eq. 19."""

    def __init__(self, mean: float = 0.0, std: float = 1.0):
        if not std > 0:
            raise ValueError(f"need std > 0, got {std}")
        self.mean, self.std = float(mean), float(std)

    def __call__(self, path: GaussianPath, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * _normal_quantile(u))


class LogNormalRatioTimes(Times):
    """log(sigma / alpha) = mean + std Phi^-1(u), within the path's range. Source: Karras et al. 2022, Table 1.

    On the EDM path the ratio is their sigma: mean = P_mean = -1.2, std = P_std = 1.2.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2):
        if not std > 0:
            raise ValueError(f"need std > 0, got {std}")
        self.mean, self.std = float(mean), float(std)

    def __call__(self, path: GaussianPath, u: Tensor) -> Tensor:
        return path.time_at(torch.exp(self.mean + self.std * _normal_quantile(u)))


def _normal_quantile(u: Tensor) -> Tensor:
    """Phi^-1(u), finite for u in [0, 1]."""
    return math.sqrt(2) * torch.erfinv((2 * u.double() - 1).clamp(-1 + 1e-12, 1 - 1e-12))


class Weight(ABC):
    """The weight w(t) of the squared error of the network's own output."""

    @abstractmethod
    def __call__(self, denoiser: Trainable, t: Tensor) -> Tensor:
        """w (B,) float64 at times t (B,)."""


class Constant(Weight):
    """w = 1 on whatever the network predicts: eps-, x0-, v- or velocity-loss, and EDM's loss for an EDM prediction."""

    def __call__(self, denoiser: Trainable, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float64)


class X0Weight(Weight):
    """A weight given for the error of x_0, and turned into that of the network's output: the loss is then the same
    function of the implied denoiser whatever the network predicts.

        w(t) = on_x0(t) (d x_0 / d output)^2

    to_x0 is affine in the output, so the derivative is a difference. Needs alpha > 0 where it is not x_0 that is
    predicted: end the times before t = 1 on a path whose alpha(1) = 0.
    """

    def __call__(self, denoiser: Trainable, t: Tensor) -> Tensor:
        if not isinstance(denoiser, NetworkDenoiser):
            raise ValueError(
                f"{type(self).__name__} weighs the error of x_0; on a linear diffusion set weight=constant"
            )
        t = t.double()
        one, zero = torch.ones_like(t).unsqueeze(1), torch.zeros_like(t).unsqueeze(1)
        slope = denoiser.to_x0(one, zero, t) - denoiser.to_x0(zero, zero, t)
        return self.on_x0(denoiser.path, t) * slope.squeeze(1) ** 2

    @abstractmethod
    def on_x0(self, path: GaussianPath, t: Tensor) -> Tensor:
        """The weight (B,) of |x_0 - D|^2."""


class SNR(X0Weight):
    """|x_0 - D|^2 alpha^2 / sigma^2: the eps-loss."""

    def on_x0(self, path: GaussianPath, t: Tensor) -> Tensor:
        alpha, sigma = path(t)
        return (alpha / sigma) ** 2


class MinSNR(X0Weight):
    """|x_0 - D|^2 min(alpha^2 / sigma^2, gamma). Source: Hang et al. 2023, Section 3.4. gamma = inf is SNR."""

    def __init__(self, gamma: float = 5.0):
        if not gamma > 0:
            raise ValueError(f"need gamma > 0, got {gamma}")
        self.gamma = float(gamma)

    def on_x0(self, path: GaussianPath, t: Tensor) -> Tensor:
        alpha, sigma = path(t)
        return ((alpha / sigma) ** 2).clamp(max=self.gamma)


class EDMWeight(X0Weight):
    """|x_0 - D|^2 (rho^2 + s^2) / (rho s)^2, rho = sigma / alpha, s = sigma_data. Source: Karras et al. 2022, Table 1.

    On an EDMDenoiser of the same sigma_data it is the Constant weight.
    """

    def __init__(self, sigma_data: float = 0.5):
        if not sigma_data > 0:
            raise ValueError(f"need sigma_data > 0, got {sigma_data}")
        self.sigma_data = float(sigma_data)

    def on_x0(self, path: GaussianPath, t: Tensor) -> Tensor:
        alpha, sigma = path(t)
        return 1 / self.sigma_data**2 + (alpha / sigma) ** 2


class Likelihood(X0Weight):
    """|x_0 - D|^2 times -1/2 d SNR / dt = SNR (sigma'/sigma - alpha'/alpha): the integrand of the variational bound.

    Up to a constant, the loss in nats per entry of a sample when times are uniform; its variance is large near t = 0.
    Source: Kingma et al. 2021, Eq. 17; Song et al. 2021 (maximum likelihood training), Eq. 7.
    """

    def on_x0(self, path: GaussianPath, t: Tensor) -> Tensor:
        (alpha, sigma), (dalpha, dsigma) = path(t), path.derivative(t)
        return (alpha / sigma) ** 2 * (dsigma / sigma - dalpha / alpha)
