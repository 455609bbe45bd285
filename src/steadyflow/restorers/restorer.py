"""What a restorer is: a measurement and noise in, an image that fits both the measurement and the prior out."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.noise import NoiseSource
from steadyflow.paths import expand
from steadyflow.samplers.sampler import Progress

VARIANCES = {"vp": 1, "ve": 2}  # the names of r^2, and the weight of sigma^2 in it


class Operator(Protocol):
    """What a restorer asks of A, `steadyflow.linear.Operator` in this project."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def adjoint(self, y: Tensor) -> Tensor: ...

    def pinv(self, y: Tensor) -> Tensor: ...

    def project(self, x: Tensor) -> Tensor: ...

    def solve(self, y: Tensor, r2: Tensor | float, noise2: Tensor | float) -> Tensor: ...

    def spectral(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor: ...


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

    @cached_property
    def back(self) -> Tensor:
        """A^+ y (B, *S)."""
        return self.operator.pinv(self.y)

    def residual(self, x0: Tensor, y: Tensor | None = None) -> Tensor:
        """A^+ y - A^+ A x_0 (B, *S): what is missing of the measured part of x_0. x0, y: see `correction`."""
        return (self.back if y is None or y is self.y else self.operator.pinv(y)) - self.operator.project(x0)

    def correction(self, x0: Tensor, r2: Tensor, y: Tensor | None = None) -> Tensor:
        """r2 A^T (r2 A A^T + sigma_y^2 I)^-1 (y - A x_0), without noise A^+ y - A^+ A x_0 (B, *S):

        what moves x_0 to E[x_0 | y] if x_0 was known to be N(x_0, r2 I). The noiseless form is defined for operators
        that are not linear too.

        Args:
            x0: (B, *S).
            r2: () or (B,), float64.
            y: measurements of the rows of x0, where they are not those of the whole batch.

        Raises:
            ValueError: noise and an operator that is not linear; measurements of another number than x0.
        """
        y = self.y if y is None else y
        if len(y) != len(x0):
            raise ValueError(f"{len(y)} measurements for {len(x0)} images: each image needs its own")
        if self.sigma_y == 0:
            return self.residual(x0, y)
        if not hasattr(self.operator, "solve"):
            kind = type(self.operator).__name__
            raise ValueError(f"{kind} is not linear, and this method knows it without noise alone; set sigma_y=0")
        weighted = self.operator.solve(y - self.operator(x0), r2, self.sigma_y**2)
        return expand(r2, x0) * self.operator.adjoint(weighted)

    def misfit(self, x0: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """|y - A x_0| of each sample (B,), and its gradient in x_0, -A^T (y - A x_0) / |y - A x_0| (B, *S).

        Raises:
            ValueError: an operator that is not linear and whose gradient is 0, as that of rounding.
        """
        y = self.y if y is None else y
        with torch.enable_grad():
            x0 = x0.detach().requires_grad_()
            norm = torch.linalg.vector_norm((y - self.operator(x0)).flatten(1), dim=1)
            with torch.autocast(x0.device.type, enabled=False):  # A leaves it out forwards; so must A^T
                (slope,) = torch.autograd.grad(norm.sum(), x0)
        if not hasattr(self.operator, "adjoint") and not slope.any() and bool(norm.any()):
            kind = type(self.operator).__name__
            raise ValueError(f"the gradient of {kind} is 0 everywhere: DPS learns nothing of it; use sampler=pigdm")
        return norm.detach(), slope

    def require_noiseless(self, method: str) -> None:
        """Raises a ValueError if the measurement has noise, which the method named would reproduce."""
        if self.sigma_y > 0:
            raise ValueError(f"{method} reproduces y, its noise too; it needs sigma_y=0, got {self.sigma_y}")


def require_variance(name: str) -> str:
    """The name of an r^2, or a ValueError."""
    if name not in VARIANCES:
        raise ValueError(f"r2 is one of {', '.join(VARIANCES)}, got '{name}'")
    return name


def posterior_variance(alpha: Tensor, sigma: Tensor, of: str = "vp") -> Tensor:
    """r^2 of the approximation p(x_0 | x) = N(D, r^2 I), of the shape of alpha and sigma:

        vp   sigma^2 / (alpha^2 + sigma^2)      exact for x_0 ~ N(m, I)
        ve   sigma^2 / (alpha^2 + 2 sigma^2)    smaller, so that y counts for less where it is noisy

    The second is Song et al.'s sigma^2 / (1 + sigma^2), of a state x_0 + sigma z, at the sigma of a VP state, as Pokle
    et al. compare it (thesis Section 5.12.1, Tables 5.22 to 5.24); at that of x / alpha it is the first.
    """
    return sigma**2 / (alpha**2 + VARIANCES[of] * sigma**2)


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
