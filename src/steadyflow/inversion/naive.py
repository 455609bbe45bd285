"""Inversion by backpropagation through the sequential chain: the baseline."""

from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from steadyflow.inversion.chain import Chain, squared_distance
from steadyflow.inversion.descent import Descent


class Naive(Descent):
    """Adam along the exact gradient dL/dx_T, backpropagated through the N steps one after another.

    With `checkpoint` the backward pass computes each step again, so it keeps N states and the activations of one
    network evaluation, and costs N evaluations more; without, it keeps the activations of N.
    Source: Pokle 2025, Algorithm 1.

    Args:
        checkpoint: whether to compute the steps again in the backward pass.
        lr, epochs, threshold, budget, clock, start: see Descent.
    """

    def __init__(
        self,
        lr: float = 0.01,
        epochs: int = 400,
        threshold: float = 0.5,
        budget: float | None = None,
        clock: str = "wall",
        start: str = "noise",
        checkpoint: bool = True,
    ):
        super().__init__(lr, epochs, threshold, budget, clock, start)
        self.checkpoint = checkpoint

    @torch.enable_grad()
    def gradient(
        self, chain: Chain, x: Tensor, target: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x = h = x.detach().requires_grad_()
        for k in range(len(chain)):
            if self.checkpoint:  # no random numbers inside a step
                h = cast(Tensor, checkpoint(chain.step, k, h, use_reentrant=False, preserve_rng_state=False))
            else:
                h = chain.step(k, h)
        loss = squared_distance(h, target)
        (g,) = torch.autograd.grad(loss.sum(), x)
        return loss.detach(), g, None
