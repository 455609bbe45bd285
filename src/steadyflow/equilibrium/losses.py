"""What keeps an equilibrium model well behaved while it is trained."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from steadyflow.equilibrium.solver import Map


def jacobian_penalty(f: Map, z: Tensor, probes: Tensor, *args: Tensor | None) -> Tensor:
    """(B,): mean over the probes v of |J^T v|^2 / D, J = df/dz at z: Hutchinson's estimate of |J|_F^2 / D.

    Unbiased for probes with E[v v^T] = I (standard normal, or random signs of less variance). Differentiable with
    respect to what f closes over and args, not to z.
    Source: Bai et al. 2021 (Jacobian regularisation), here per item.

    Args:
        f, args: the map, as for a solver.
        z: (B, *S), where the Jacobian is taken: a solution.
        probes: (N, B, *S).
    """
    if probes.shape[1:] != z.shape:
        raise ValueError(f"probes must have the shape (N, {', '.join(map(str, z.shape))}), got {tuple(probes.shape)}")
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        image = f(z, *args)
        total = z.new_zeros(len(z))
        for v in probes.to(image.dtype):
            (product,) = torch.autograd.grad(image, z, v, create_graph=True, materialize_grads=True)
            total = total + product.reshape(len(z), -1).square().mean(1)
    return total / len(probes)


def correction_loss(iterates: Sequence[Tensor], target: Tensor, decay: float = 0.8) -> Tensor:
    """(B,): sum_i decay^(N - i) |z_i - target|^2 / D over N iterates z_1..z_N: fixed-point correction.

    Draws the states on the way to the fixed point towards the target, the later ones more: the path gets shorter. The
    iterates are those a solver's callback saw, given their gradient by `Phantom.attach`; the target is the solution,
    held fixed, or the data.
    Source: Bai et al. 2022 (deep equilibrium optical flow), with the squared error as the loss.
    """
    if not iterates or not 0 < decay <= 1:
        raise ValueError(f"need at least one iterate and 0 < decay <= 1, got {len(iterates)} and {decay}")
    target = target.detach()
    losses = [(z - target).reshape(len(z), -1).square().mean(1) for z in iterates]
    return torch.stack([decay ** (len(losses) - i) * loss for i, loss in enumerate(losses, 1)]).sum(0)


def normalise(network: nn.Module, kind: str) -> nn.Module:
    """The network, with the weight of every linear and convolutional layer parametrised in place.

    Args:
        kind: spectral (largest singular value 1, a convolution's kernel taken as a matrix: torch's spectral_norm) or
            weight (a length and a direction per output: torch's weight_norm).
    """
    if kind not in ("spectral", "weight"):
        raise ValueError(f"kind must be spectral or weight, got {kind!r}")
    for module in [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]:
        (spectral_norm if kind == "spectral" else weight_norm)(module)
    return network
