"""A residual MLP for vectors."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from steadyflow.networks.blocks import zero
from steadyflow.networks.conditioning import Conditioning, SinusoidalTime


class LayerNorm(nn.LayerNorm):
    """Layer normalisation in float32 at least, without weights: the modulation after it has them."""

    def __init__(self, dim: int):
        super().__init__(dim, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.dtype == torch.float64 else x.float()).to(x.dtype)


class ModulatedBlock(nn.Module):
    """h (B, W), c (B, V) -> h + W_2 dropout(silu(W_1 (norm(h) (1 + a) + b))),  (a, b) = W c, W_2 beginning at zero."""

    def __init__(self, width: int, condition_dim: int, dropout: float = 0.0):
        super().__init__()
        self.norm, self.condition = LayerNorm(width), nn.Linear(condition_dim, 2 * width)
        self.first, self.second = nn.Linear(width, width), zero(nn.Linear(width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        a, b = self.condition(c).to(h.dtype).chunk(2, dim=1)
        y = functional.silu(self.first(self.norm(h) * (1 + a) + b))
        return h + self.second(self.dropout(y))


class MLP(nn.Module):
    """Residual MLP: network(x (B, D), t (B,), label (B,) or None) -> (B, D), exactly 0 when new.

        h = W_in x,  h = block_k(h, c) for k = 1..blocks,  out = W_out silu(norm(h) (1 + a) + b),  W_out = 0 at first

    with c the time and label vector of `Conditioning`.

    Args:
        dim: D.
        width: of the hidden layers, even.
        blocks: residual blocks, each of two layers.
        dropout: inside the blocks.
        num_classes: 0 without labels; else label num_classes is the null label, and label None means it.
        time_scale: s of the sinusoidal features of s t. Smaller than a U-Net's: 2-D fields are smooth in time.

    Raises:
        ValueError: in the call, for x that is not (B, D), t that is not (B,), or a wrong label.
    """

    def __init__(
        self,
        dim: int,
        width: int = 128,
        blocks: int = 3,
        dropout: float = 0.0,
        num_classes: int = 0,
        time_scale: float = 100.0,
    ):
        super().__init__()
        if dim < 1 or blocks < 1:
            raise ValueError(f"need dim >= 1 and blocks >= 1, got {dim} and {blocks}")
        self.dim, self.num_classes = dim, num_classes
        self.conditioning = Conditioning(SinusoidalTime(width, time_scale), width, width, num_classes)
        self.stem = nn.Linear(dim, width)
        self.blocks = nn.ModuleList([ModulatedBlock(width, width, dropout) for _ in range(blocks)])
        self.norm, self.modulation = LayerNorm(width), nn.Linear(width, 2 * width)
        self.head = zero(nn.Linear(width, dim))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        if x.ndim != 2 or x.shape[1] != self.dim:
            raise ValueError(f"the MLP takes vectors (B, {self.dim}), got shape {tuple(x.shape)}")
        if t.shape != (len(x),):
            raise ValueError(f"the network's time must have shape ({len(x)},), got {tuple(t.shape)}")
        c = functional.silu(self.conditioning(t, label))
        h = self.stem(x)
        for block in self.blocks:
            h = block(h, c)
        a, b = self.modulation(c).to(h.dtype).chunk(2, dim=1)
        return cast(Tensor, self.head(functional.silu(self.norm(h) * (1 + a) + b)))
