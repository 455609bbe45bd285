"""Denoisers D(x, alpha, sigma) = E[x_0 | alpha x_0 + sigma eps = x]: checkpoints in their wrapper.

Once wrapped, nobody asks what a network predicts or which path it was trained on. Every denoiser obeys
D(c x, c alpha, c sigma) = D(x, alpha, sigma). The exact ones, in closed form, stand in `exact.py`.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from steadyflow.paths import GaussianPath, expand


class Denoiser(nn.Module, ABC):
    """The posterior mean of the clean sample, E[x_0 | x], for x = alpha x_0 + sigma eps."""

    @abstractmethod
    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        """E[x_0 | x].

        Args:
            x: (B, *S).
            alpha, sigma: () or (B,), float64.
            condition: what the denoiser is conditioned on, each leading with B (`label`: (B,) int64 class indices).

        Returns:
            x_0: (B, *S) in x's dtype.
        """


class NetworkDenoiser(Denoiser):
    """A network trained on a path, wrapped by what it predicts.

        t = time_at(sigma / alpha),  x' = x (alpha' + sigma') / (alpha + sigma)  with (alpha', sigma') = path(t)
        D(x, alpha, sigma) = to_x0(network(x', t), x', t)

    so any path with the same noise-to-signal ratio can be sampled. A ratio beyond the path's range is evaluated at
    its nearest end. Source: time and scale change of a Gaussian path, e.g. Karras et al. 2022, Eq. 4.

    Args:
        network: module called as network(x (B, *S), t (B,), **condition) -> (B, *S); a network that also predicts a
            variance returns (B, 2 C, ...), of which the first C channels are used.
        path: the path it was trained on.
    """

    def __init__(self, network: nn.Module, path: GaussianPath):
        super().__init__()
        self.network, self.path = network, path

    @abstractmethod
    def to_x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x_0 from the network's output at x on the training path, time t () or (B,)."""

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should return for x_t = alpha x0 + sigma eps at time t (B,): the regression target."""

    def output(self, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """The raw prediction (B, *S) for x on the training path at time t () or (B,)."""
        return self._call(x, t, **condition)

    def _call(self, x: Tensor, time: Tensor, **condition: Tensor) -> Tensor:
        parameter = next(self.network.parameters(), x)
        time = time.to(x.device, torch.float32 if parameter.dtype != torch.float64 else torch.float64)
        out = self.network(x.to(parameter.dtype), time.expand(len(x)), **condition)
        return out.narrow(1, 0, x.shape[1]).to(x.dtype)

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        t = self.path.time_at(sigma / alpha)
        a, s = self.path(t)
        x = x * expand((a + s) / (alpha + sigma), x)
        return self.to_x0(self.output(x, t, **condition), x, t)


class EpsDenoiser(NetworkDenoiser):
    """The network predicts the noise: x_0 = (x - sigma eps) / alpha. Source: Ho et al. 2020, Eq. 15."""

    def to_x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.path(t)
        return (x - expand(sigma, x) * output) / expand(alpha, x)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps


class X0Denoiser(NetworkDenoiser):
    """The network predicts the clean sample x_0 itself."""

    def to_x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return output

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return x0


class VDenoiser(NetworkDenoiser):
    """The network predicts v = alpha eps - sigma x_0: x_0 = (alpha x - sigma v) / (alpha^2 + sigma^2).

    Source: Salimans & Ho 2022, Appendix D.
    """

    def to_x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.path(t)
        norm = alpha**2 + sigma**2
        return expand(alpha / norm, x) * x - expand(sigma / norm, x) * output

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.path(t)
        return expand(alpha, x0) * eps - expand(sigma, x0) * x0


class ScoreDenoiser(NetworkDenoiser):
    """The network predicts the score grad log p_t = -eps / sigma: x_0 = (x + sigma^2 score) / alpha (Tweedie)."""

    def to_x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.path(t)
        return (x + expand(sigma**2, x) * output) / expand(alpha, x)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return -eps / expand(self.path(t)[1], eps)


class VelocityDenoiser(NetworkDenoiser):
    """The network predicts the velocity v = alpha' x_0 + sigma' eps of the path (' = d/dt).

        x_0 = (sigma' x - sigma v) / (sigma' alpha - sigma alpha')

    On conditional OT, v = eps - x_0 and x_0 = x - t v. Source: Lipman et al. 2023, Eq. 13.
    """

    def to_x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        (alpha, sigma), (dalpha, dsigma) = self.path(t), self.path.derivative(t)
        norm = dsigma * alpha - sigma * dalpha
        return expand(dsigma / norm, x) * x - expand(sigma / norm, x) * output

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        dalpha, dsigma = self.path.derivative(t)
        return expand(dalpha, x0) * x0 + expand(dsigma, x0) * eps


class EDMDenoiser(NetworkDenoiser):
    """EDM preconditioning: with rho = sigma / alpha and y = x / alpha,

        x_0 = c_skip y + c_out F(c_in y, c_noise)
        c_skip = s^2 / (rho^2 + s^2),  c_out = rho s / sqrt(rho^2 + s^2),  c_in = 1 / sqrt(rho^2 + s^2),
        c_noise = log(rho) / 4,  s = sigma_data

    Source: Karras et al. 2022, Table 1 (last column).
    """

    def __init__(self, network: nn.Module, path: GaussianPath, sigma_data: float = 0.5):
        super().__init__(network, path)
        if not sigma_data > 0:
            raise ValueError(f"need sigma_data > 0, got {sigma_data}")
        self.sigma_data = float(sigma_data)

    def output(self, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        alpha, sigma = self.path(t)
        c_in = 1 / (alpha * torch.sqrt((sigma / alpha) ** 2 + self.sigma_data**2))
        c_noise = torch.log((sigma / alpha).clamp(min=1e-20)) / 4
        return self._call(expand(c_in, x) * x, c_noise, **condition)

    def to_x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.path(t)
        c_skip, c_out = self._skip_out(sigma / alpha)
        return expand(c_skip / alpha, x) * x + expand(c_out, x) * output

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.path(t)
        c_skip, c_out = self._skip_out(sigma / alpha)
        return (x0 - expand(c_skip, x0) * (x0 + expand(sigma / alpha, x0) * eps)) / expand(c_out, x0)

    def _skip_out(self, rho: Tensor) -> tuple[Tensor, Tensor]:
        s = self.sigma_data
        return s**2 / (rho**2 + s**2), rho * s / torch.sqrt(rho**2 + s**2)


class CountedDenoiser(Denoiser):
    """Counts the network evaluations of another denoiser, a row of a batch being one: nfe = rows / samples."""

    def __init__(self, denoiser: Denoiser):
        super().__init__()
        self.denoiser, self.rows = denoiser, 0

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        self.rows += len(x)
        return self.denoiser(x, alpha, sigma, **condition)
