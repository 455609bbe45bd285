"""The derivative of a denoiser: vector-Jacobian products."""

from collections.abc import Callable

import torch
from torch import Tensor

from steadyflow.denoisers.denoiser import Denoiser

Pullback = Callable[[Tensor], Tensor]


def denoise_and_pull(
    denoiser: Denoiser, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor
) -> tuple[Tensor, Pullback]:
    """x_0 = D(x, alpha, sigma) (B, *S) and v -> J^T v, J = dD/dx, from one evaluation, also where gradients are off.

    The pullback takes v (B, *S), once; neither x_0 nor J^T v is part of a graph, and no parameter's gradient is made.
    Each item's v is scaled to a largest entry in [1/2, 1) by a power of two, which float16 networks need and no other
    notices.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = denoiser(x, alpha, sigma, **condition)

    def pull(v: Tensor) -> Tensor:
        exponent = torch.frexp(v.abs().flatten(1).amax(1)).exponent.clamp(-100, 100).reshape(-1, *[1] * (v.ndim - 1))
        (gradient,) = torch.autograd.grad(x0, x, torch.ldexp(v, -exponent))
        return torch.ldexp(gradient, exponent)

    return x0.detach(), pull
