"""Networks as denoisers: a checkpoint is wrapped once by what it predicts.

Once wrapped, nobody asks what a network predicts or which path it was trained on.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from steadyflow.denoisers.denoiser import Denoiser
from steadyflow.paths import GaussianPath, combine, expand


class NetworkDenoiser(Denoiser):
    """A network trained on a path, wrapped by what it predicts.

        t = time_at(sigma / alpha),  x' = x (alpha' + sigma') / (alpha + sigma)  with (alpha', sigma') = path(t)
        D(x, alpha, sigma) = a x' + b network(x', t)

    with weights (a, b) that say what the network predicts, so any path with the same noise-to-signal ratio can be
    sampled. A ratio beyond the path's range is evaluated at its nearest end. Source: time and scale change of a
    Gaussian path, e.g. Karras et al. 2022, Eq. 4.

    Args:
        network: module called as network(x (B, *S), t (B,), **condition) -> (B, *S), in the precision of its own
            parameters; a network that also predicts a variance returns (B, 2 C, ...), of which `with_variance` alone
            uses the last C channels.
        path: the path it was trained on.
        clock: (a, b); the network's own time is max(a t + b, 0), computed in float64. (1000, -1) gives the index of a
            chain of 1000 steps, whose index i stands at t = (i + 1) / 1000; (-1, 1) runs the other way.
    """

    max_ratio = math.inf  # larger noise-to-signal ratios are evaluated here

    def __init__(self, network: nn.Module, path: GaussianPath, clock: tuple[float, float] = (1.0, 0.0)):
        super().__init__()
        if not isinstance(path, GaussianPath):
            raise ValueError(
                f"this prediction is of a Gaussian path, not of {type(path).__name__}; on a linear diffusion set "
                "prediction=noise"
            )
        self.network, self.path = network, path
        rate, start = clock
        self.clock = (float(rate), float(start))

    @abstractmethod
    def weights(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of x_0 = a x + b output on the training path, where path(t) = (alpha, sigma)."""

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should return for x_t = alpha x0 + sigma eps at time t (B,): the regression target."""

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps, t (B,)."""
        alpha, sigma = self.path(t)
        return expand(alpha, x0) * x0 + expand(sigma, x0) * eps

    def inputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The state and the time as the network takes them; a preconditioned network scales them."""
        rate, start = self.clock
        return x, (rate * t + start).clamp(min=0)

    def output(self, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """The raw prediction (B, *S) for x on the training path at time t () or (B,)."""
        state, time = self.inputs(x, t)
        return call(self.network, state, time, **condition).to(x.dtype)

    def to_x0(self, output: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x_0 from the network's output at x on the training path, time t () or (B,)."""
        a, b = self.weights(t, *self.path(t))
        return combine(a, x, b, output)

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        x, t, own = self._on_training_path(x, alpha, sigma)
        a, b = self.weights(t, *own)
        return combine(a, x, b, self.output(x, t, **condition))

    def with_variance(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> tuple[Tensor, Tensor]:
        x, t, own = self._on_training_path(x, alpha, sigma)
        state, time = self.inputs(x, t)
        output = call_whole(self.network, state, time, **condition).to(x.dtype)
        if output.shape[1] != 2 * x.shape[1]:
            raise ValueError("this checkpoint's network predicts no variance; choose variance=small or large")
        (output, v), (a, b) = output.chunk(2, 1), self.weights(t, *own)
        return combine(a, x, b, output), (v + 1) / 2

    def _on_training_path(
        self, x: Tensor, alpha: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """x' on the training path with x's ratio of noise to signal, its time and its (alpha', sigma')."""
        t = self.path.time_at((sigma / alpha).clamp(max=self.max_ratio))
        own = self.path(t)
        scale = (own[0] + own[1]) / (alpha + sigma)
        if scale.ndim or abs(scale.item() - 1) > 1e-12:  # 1 to rounding on the training path: spare the pass
            x = x * expand(scale, x)
        return x, t, own


class EpsDenoiser(NetworkDenoiser):
    """The network predicts the noise: x_0 = (x - sigma eps) / alpha. Source: Ho et al. 2020, Eq. 15.

    The noise says nothing of x_0 where alpha = 0, so ratios sigma / alpha beyond 1000 are evaluated at 1000.
    """

    max_ratio = 1e3

    def weights(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / alpha, -sigma / alpha

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps


class X0Denoiser(NetworkDenoiser):
    """The network predicts the clean sample x_0 itself."""

    def weights(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), torch.ones_like(alpha)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return x0


class VDenoiser(NetworkDenoiser):
    """The network predicts v = alpha eps - sigma x_0: x_0 = (alpha x - sigma v) / (alpha^2 + sigma^2).

    Source: Salimans & Ho 2022, Appendix D.
    """

    def weights(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        norm = alpha**2 + sigma**2
        return alpha / norm, -sigma / norm

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.path(t)
        return combine(alpha, eps, -sigma, x0)


class ScoreDenoiser(NetworkDenoiser):
    """The network predicts the score grad log p_t = -eps / sigma: x_0 = (x + sigma^2 score) / alpha (Tweedie).

    Like the noise, it says nothing of x_0 where alpha = 0: ratios beyond 1000 are evaluated at 1000.
    """

    max_ratio = 1e3

    def weights(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 1 / alpha, sigma**2 / alpha

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return -eps / expand(self.path(t)[1], eps)


class VelocityDenoiser(NetworkDenoiser):
    """The network predicts the velocity v = alpha' x_0 + sigma' eps of the path (' = d/dt).

        x_0 = (sigma' x - sigma v) / (alpha sigma' - sigma alpha')

    On conditional OT, v = eps - x_0 and x_0 = x - t v. Source: Lipman et al. 2023, Eq. 13.
    """

    def weights(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        dalpha, dsigma = self.path.derivative(t)
        dsigma = dsigma.clamp(max=1e150)  # it may be infinite where sigma = 0
        norm = alpha * dsigma - sigma * dalpha
        return dsigma / norm, -sigma / norm

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        dalpha, dsigma = self.path.derivative(t)
        return combine(dalpha, x0, dsigma, eps)


class EDMDenoiser(NetworkDenoiser):
    """EDM preconditioning: with rho = sigma / alpha and y = x / alpha,

        x_0 = c_skip y + c_out F(c_in y, c_noise)
        c_skip = s^2 / (rho^2 + s^2),  c_out = rho s / sqrt(rho^2 + s^2),  c_in = 1 / sqrt(rho^2 + s^2),
        c_noise = log(rho) / 4,  s = sigma_data

    written with alpha multiplied through, so that it stands at alpha = 0. Source: Karras et al. 2022, Table 1.

    Args:
        network, path: see NetworkDenoiser; the network gets c_noise as its time.
        sigma_data: the data's standard deviation s.

    Raises:
        ValueError: sigma_data <= 0.
    """

    def __init__(self, network: nn.Module, path: GaussianPath, sigma_data: float = 0.5):
        super().__init__(network, path)
        if not sigma_data > 0:
            raise ValueError(f"need sigma_data > 0, got {sigma_data}")
        self.sigma_data = float(sigma_data)

    def inputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.path(t)
        c_noise = torch.log((sigma / alpha).clamp(1e-20, 1e20)) / 4
        return expand(1 / torch.hypot(sigma, alpha * self.sigma_data), x) * x, c_noise

    def weights(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        norm = torch.hypot(sigma, alpha * self.sigma_data)
        return alpha * (self.sigma_data / norm) ** 2, sigma * self.sigma_data / norm

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.path(t)
        a, b = self.weights(t, alpha, sigma)
        return combine((1 - a * alpha) / b, x0, -a * sigma / b, eps)


class ConsistencyDenoiser(EDMDenoiser):
    """A consistency function: with rho, y and c_in, c_noise of EDM preconditioning,

        f = c_skip y + c_out F(c_in y, c_noise)
        c_skip = s^2 / ((rho - m)^2 + s^2),  c_out = (rho - m) s / sqrt(rho^2 + s^2)

    is not E[x_0 | x] but where the probability flow through x ends, at noise m, and so f = y at rho = m. Samplers that
    take it for a denoiser make images, but theirs are those of sampler=consistency.
    Source: Song et al. 2023 (consistency models), Eq. 5 and Appendix C.

    Args:
        network, path, sigma_data: see EDMDenoiser.
        sigma_min: m, as a ratio of noise to signal; smaller ones are taken for it.

    Raises:
        ValueError: sigma_data <= 0 or sigma_min < 0.
    """

    def __init__(self, network: nn.Module, path: GaussianPath, sigma_data: float = 0.5, sigma_min: float = 0.002):
        super().__init__(network, path, sigma_data)
        if sigma_min < 0:
            raise ValueError(f"need sigma_min >= 0, got {sigma_min}")
        self.sigma_min = float(sigma_min)

    def weights(self, t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        noise = (sigma - alpha * self.sigma_min).clamp(min=0)
        skip = alpha * (self.sigma_data / torch.hypot(noise, alpha * self.sigma_data)) ** 2
        return skip, noise * self.sigma_data / torch.hypot(sigma, alpha * self.sigma_data)


def call(network: nn.Module, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
    """network(x (B, *S), t (B,)) -> (B, *S) in the network's precision, t () or (B,); a variance is left out."""
    return call_whole(network, x, t, **condition).narrow(1, 0, x.shape[1])


def call_whole(network: nn.Module, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
    """All the channels that the network gives.

    A network with an attribute `max_batch` gets no more rows than that at a time. Where that is "auto" it gets all, and
    half of them whenever the device's memory does not suffice; the number that did is remembered as `fitting_batch`.

    Raises:
        torch.OutOfMemoryError: not even one row fits, or `max_batch` is a number or None.
    """
    parameter = next(network.parameters(), x)
    time = t.to(x.device, torch.float64 if parameter.dtype == torch.float64 else torch.float32).expand(len(x))
    whole, most = x.to(parameter.dtype), max(len(x), 1)
    limit = getattr(network, "max_batch", None)
    auto = limit == "auto"
    rows = min(most, (getattr(network, "fitting_batch", None) if auto else limit) or most)
    while True:
        try:
            parts = [slice(start, start + rows) for start in range(0, most, rows)]
            outs: list[Tensor] = [network(whole[p], time[p], **{k: v[p] for k, v in condition.items()}) for p in parts]
            return outs[0] if len(outs) == 1 else torch.cat(outs)
        except torch.OutOfMemoryError:
            if not auto or rows == 1:
                raise
        rows = network.fitting_batch = -(-rows // 2)  # type: ignore[assignment]
        torch.cuda.empty_cache()  # outside the handler, whose traceback holds what the failed call had made
