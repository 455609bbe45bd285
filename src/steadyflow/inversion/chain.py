"""A sampler as a function of its starting noise."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.samplers import OneStepSampler


class Chain:
    """x_0 as a function of x_T: the N steps of a one-step sampler, with noises and condition held fixed.

        x^(k+1) = step_k(x^(k); z_k),  k = 0..N-1,  x^(0) = x_T,  x^(N) = x_0

    Args:
        denoiser: E[x_0 | x].
        sampler: any one-step sampler; its coefficients are computed once.
        noises: (B, N, *S), the noises z of a stochastic sampler, or None.
        condition: passed on to the denoiser, each leading with B.
    """

    def __init__(
        self, denoiser: Denoiser, sampler: OneStepSampler, noises: Tensor | None, condition: Mapping[str, Tensor]
    ):
        self.denoiser, self.sampler, self.noises, self.condition = denoiser, sampler, noises, dict(condition)
        table = sampler.coefficients(sampler.times[:-1], sampler.times[1:])
        self._table = list(zip(*(c.unbind() for c in table), strict=True))

    def __len__(self) -> int:
        return self.sampler.steps

    def rows(self, keep: Tensor) -> "Chain":
        """The chain of some of the samples, by their places in the batch (n,)."""
        part = copy.copy(self)
        part.noises = None if self.noises is None else self.noises[keep]
        part.condition = {name: value[keep] for name, value in self.condition.items()}
        return part

    def step(self, k: int, x: Tensor) -> Tensor:
        """x^(k+1) from x^(k), (B, *S)."""
        z = None if self.noises is None else self.noises[:, k]
        return self.sampler.update(self.denoiser, x, self._table[k], z, **self.condition)

    @torch.no_grad()
    def states(self, x: Tensor) -> Tensor:
        """x^(1), ..., x^(N) one after another, (B, N, *S)."""
        out = []
        for k in range(len(self)):
            x = self.step(k, x)
            out.append(x)
        return torch.stack(out, 1)


def squared_distance(x: Tensor, target: Tensor) -> Tensor:
    """|x - target|^2 of each sample, (B,) float64: the squared Frobenius norm, summed over pixels and channels."""
    return (x.double() - target.double()).square().flatten(1).sum(1)
