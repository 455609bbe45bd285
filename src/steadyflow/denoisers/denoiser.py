"""What a denoiser is: E[x_0 | x]."""

from abc import ABC, abstractmethod
from typing import cast

from torch import Tensor, nn


class Denoiser(nn.Module, ABC):
    """The posterior mean of the clean sample, E[x_0 | x], for x = alpha x_0 + sigma eps.

    Every denoiser obeys D(c x, c alpha, c sigma) = D(x, alpha, sigma): only the pair (alpha, sigma) matters, not the
    path it lies on.
    """

    @abstractmethod
    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        """E[x_0 | x].

        Args:
            x: (B, *S).
            alpha, sigma: () or (B,), float64, not both 0.
            condition: what the denoiser is conditioned on, each leading with B (`label`: (B,) int64 class indices).

        Returns:
            x_0: (B, *S) in x's dtype.
        """

    def with_variance(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> tuple[Tensor, Tensor]:
        """E[x_0 | x] and v (B, *S), what a network that was trained to says of the variance of a DDPM step:

            log std^2 = v log(large) + (1 - v) log(small),  v in [0, 1] for most inputs

        Source: Nichol & Dhariwal 2021, Eq. 15.

        Raises:
            ValueError: it says nothing of it.
        """
        raise ValueError(f"{type(self).__name__} predicts no variance; choose variance=small or large")


class CountedDenoiser(Denoiser):
    """Counts the evaluations of another denoiser: `rows` grows by B a call, so nfe = rows / number of samples.

    Put inside a guidance that calls the network twice, it counts both. A noise model (u, t) is counted as well.
    """

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser, self.rows = denoiser, 0

    def forward(self, x: Tensor, *at: Tensor, **condition: Tensor) -> Tensor:
        self.rows += len(x)
        return cast(Tensor, self.denoiser(x, *at, **condition))

    def with_variance(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> tuple[Tensor, Tensor]:
        self.rows += len(x)
        return cast(Denoiser, self.denoiser).with_variance(x, alpha, sigma, **condition)
