"""The exact denoiser of a Gaussian law of photographs of any size."""

import torch
from torch import Tensor

from steadyflow.denoisers.denoiser import Denoiser
from steadyflow.denoisers.exact import TINY
from steadyflow.linear.constants import Constants
from steadyflow.linear.diagonal import cosine_matrix

COLOURS = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))  # of RGB: brightness, red - blue, green - magenta
POWERS = (7.5e-3, 1.6e-3, 6e-4)  # a of each, measured on the middle 256 x 256 pixels of 16 Kodak photographs
BENDS = (float("inf"), 0.03, 0.03)  # b: colours vary less finely than brightness
LARGEST = 1e-3  # f_0: wavelengths of a thousand pixels and more are alike


class Photographs(Denoiser):
    """E[x_0 | x] for x_0 ~ N(0, C), C diagonal in colour and the discrete cosine transform of each colour:

        D = F^T [alpha S / (alpha^2 S + sigma^2)] F x,   S(f) = a / ((f^2 + f_0^2) (1 + f / b))

    with f in cycles a pixel: the power spectrum of natural images, f^-2 (Field 1987), and steeper for colours. The
    cosines continue an image by its reflection. Under it, restoration is Wiener's: an honest, soft picture of any
    size, without a network. Two products of matrices a call, O(H W (H + W)), in float64.

    Args:
        shape: (1 or 3, H, W), images in [-1, 1].

    Raises:
        ValueError: another number of channels.
    """

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__()
        self.shape = (channels, height, width) = tuple(int(n) for n in shape)
        if channels not in (1, 3):
            raise ValueError(f"photographs have 1 or 3 channels, got {channels}")
        colours = torch.tensor(COLOURS, dtype=torch.float64)
        colours = colours / colours.norm(dim=1, keepdim=True) if channels == 3 else torch.ones(1, 1).double()
        f = torch.hypot(*torch.meshgrid(*(torch.arange(n).double() / (2 * n) for n in (height, width)), indexing="ij"))
        a, b = (torch.tensor(v[:channels], dtype=torch.float64).reshape(-1, 1, 1) for v in (POWERS, BENDS))
        power = a / ((f**2 + LARGEST**2) * (1 + f / b))
        self._constants = Constants(
            colours=colours, rows=cosine_matrix(height), columns=cosine_matrix(width), power=power
        )

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        k = self._constants(x.device, torch.float64)
        alpha, sigma = (torch.as_tensor(v).to(x.device, torch.float64).reshape(-1, 1, 1, 1) for v in (alpha, sigma))
        c = k.rows @ torch.einsum("ij,bjhw->bihw", k.colours, x.double()) @ k.columns.T
        c = alpha * k.power / (alpha**2 * k.power + sigma.clamp(min=TINY) ** 2) * c
        return torch.einsum("ij,bihw->bjhw", k.colours, k.rows.T @ c @ k.columns).to(x.dtype)
