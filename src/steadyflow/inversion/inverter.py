"""What an inversion method is: image in, noise out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.noise import NoiseSource
from steadyflow.samplers import DDIM, Sampler
from steadyflow.samplers.sampler import Progress


@dataclass(frozen=True)
class Inversion:
    """What a method found for a batch of B images. NaN in a curve: the image had left by then.

    Attributes:
        latent: x_T (B, *S); of EDICT the pair (B, 2, *S).
        epochs: (B,) int64, gradients computed until the image left; 0 for a method that needs none.
        seconds: (B,) float64, each image's share of the time: an epoch's seconds are shared by the images in it.
        curve: (E, B) float64, the loss at each epoch, as the method sees it.
        clock: (E, B) float64, each image's `seconds` at the end of each epoch.
    """

    latent: Tensor
    epochs: Tensor
    seconds: Tensor
    curve: Tensor
    clock: Tensor


class Inverter(ABC):
    """Finds the noise that a sampler turns into given images. Each image's result does not depend on its batch.

    How good it is: |image(latent) - target|^2, the squared Frobenius norm, targets in [-1, 1].
    """

    @abstractmethod
    def __call__(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        target: Tensor,
        noise: NoiseSource,
        *,
        progress: Progress | None = None,
        **condition: Tensor,
    ) -> Inversion:
        """The inversion of a batch.

        Args:
            denoiser: E[x_0 | x]; of a network, its parameters should not require gradients.
            sampler: what is to be inverted.
            target: the images (B, *S) in [-1, 1], in the precision to compute in.
            noise: of the batch: step 0 is where a search starts, the others a stochastic sampler's own.
            progress: called with the fraction done.
            condition: passed on to the denoiser, each leading with B.

        Raises:
            ValueError: a sampler that the method cannot invert.
            FloatingPointError: a loss that is not finite.
        """

    @abstractmethod
    def image(
        self, denoiser: Denoiser, sampler: Sampler, latent: Tensor, noise: NoiseSource, **condition: Tensor
    ) -> Tensor:
        """The image (B, *S) that a latent stands for. Arguments as above."""


def direct(x: Tensor, seconds: float) -> Inversion:
    """The inversion of a method without epochs, that took `seconds` for the batch."""
    nothing = torch.empty(0, len(x), dtype=torch.float64)
    each = torch.full((len(x),), seconds / len(x), dtype=torch.float64)
    return Inversion(x, torch.zeros(len(x), dtype=torch.int64), each, nothing, nothing)


def deterministic_ddim(sampler: Sampler, method: str) -> DDIM:
    """The sampler, which has to be DDIM with eta = 0.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(sampler, DDIM) or sampler.stochastic:
        found = f"eta={sampler.eta}" if isinstance(sampler, DDIM) else type(sampler).__name__
        raise ValueError(f"{method} inverts deterministic DDIM, got {found}; set sampler=ddim sampler.eta=0")
    return sampler
