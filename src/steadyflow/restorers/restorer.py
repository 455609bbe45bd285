"""What a restorer is: a measurement and noise in, an image that fits both the measurement and the prior out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.noise import NoiseSource
from steadyflow.samplers.sampler import Progress


class Operator(Protocol):
    """What a restorer asks of A, `steadyflow.linear.Operator` in this project."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def adjoint(self, y: Tensor) -> Tensor: ...

    def pinv(self, y: Tensor) -> Tensor: ...

    def project(self, x: Tensor) -> Tensor: ...

    def solve(self, y: Tensor, r2: Tensor | float, noise2: Tensor | float) -> Tensor: ...


@dataclass(frozen=True)
class Measurement:
    """y = A x_0 + sigma_y n, n ~ N(0, I): what is known of a batch of images.

    Attributes:
        y: (B, *measured shape).
        operator: A, the same for the whole batch.
        sigma_y: standard deviation of the noise, in units of the [-1, 1] image; 0 is without.

    Raises:
        ValueError: sigma_y < 0.
    """

    y: Tensor
    operator: Operator
    sigma_y: float = 0.0

    def __post_init__(self) -> None:
        if not self.sigma_y >= 0:
            raise ValueError(f"sigma_y is a standard deviation, at least 0; got {self.sigma_y}")


class Restorer(ABC):
    """Draws, or approximates, x_0 ~ p(x_0 | y) with a denoiser of the prior p(x_0)."""

    @abstractmethod
    def __call__(
        self,
        denoiser: Denoiser,
        measurement: Measurement,
        noise: NoiseSource,
        *,
        progress: Progress | None = None,
        **condition: Tensor,
    ) -> Tensor:
        """Restored images (B, *S).

        Args:
            denoiser: E[x_0 | x] of the prior; its evaluations are counted by a CountedDenoiser around its network.
            measurement: what is known of the B images.
            noise: the keyed noise of the batch; step 0 is the starting point, step k the k-th step's.
            progress: called with the fraction done after each step.
            condition: passed on to the denoiser.

        Raises:
            FloatingPointError: when the state stops being finite; says at which step.
        """
