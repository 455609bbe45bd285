"""The U-Net's parts: normalisation, residual block, self-attention, changes of resolution."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def zero(module: nn.Module) -> nn.Module:
    """The module with all parameters set to 0, so that the block it ends begins as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x); where nothing is differentiated in place, so for an x that nobody else reads."""
    return functional.silu(x, inplace=not torch.is_grad_enabled())


class GroupNorm(nn.GroupNorm):
    """Group normalisation in float32 at least, whatever the precision around it (Wu & He 2018).

    Args:
        channels: of the input.
        groups: None for the largest divisor of the channels that is at most 32 and leaves groups of 4 or more.
        eps: added to the variance.
    """

    def __init__(self, channels: int, groups: int | None = None, eps: float = 1e-5):
        limit = max(1, min(32, channels // 4))
        super().__init__(groups or max(g for g in range(1, limit + 1) if channels % g == 0), channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.bfloat16, torch.float16):
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        return functional.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


class Resample(nn.Module):
    """Halves (`down`) or doubles (`up`) height and width, with a 3 x 3 convolution (`conv`) or without parameters.

    Down: the convolution has stride 2, else 2 x 2 means. Up: nearest neighbours, then the convolution if any.
    `asymmetric`: the convolution down pads the right and the lower edge alone, as TensorFlow's does.
    """

    def __init__(self, channels: int, direction: str, conv: bool, asymmetric: bool = False):
        super().__init__()
        self.up, self.asymmetric = direction == "up", asymmetric and direction == "down"
        stride, padding = 1 if self.up else 2, 0 if self.asymmetric else 1
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        elif self.conv is None:
            return functional.avg_pool2d(x, 2)
        elif self.asymmetric:
            x = functional.pad(x, (0, 1, 0, 1))
        return x if self.conv is None else self.conv(x)


class ResBlock(nn.Module):
    """x (B, C, H, W), c (B, D) -> (B, C', H', W'):

        h = conv(resample(silu(norm(x))))
        h = norm(h + W c)                      or, with scale_shift,  h = norm(h) (1 + a) + b,  (a, b) = W c
        out = skip(resample(x)) + conv_0(dropout(silu(h)))

    conv_0 begins at zero; skip is a 1 x 1 convolution where C' differs from C. c arrives after its silu.
    Source: Ho et al. 2020, Appendix B; scale-shift and resampling inside the block from Dhariwal & Nichol 2021.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        condition_dim: int,
        dropout: float = 0.0,
        scale_shift: bool = False,
        direction: str | None = None,
        norm: Callable[[int], nn.Module] = GroupNorm,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.condition = nn.Linear(condition_dim, out_channels * (2 if scale_shift else 1))
        self.norm2 = norm(out_channels)
        self.conv2 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        self.resample = nn.Identity() if direction is None else Resample(channels, direction, conv=False)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = self.conv1(self.resample(silu(self.norm1(x))))
        c = self.condition(c)[:, :, None, None].to(h.dtype)
        if self.scale_shift:
            a, b = c.chunk(2, dim=1)
            h = torch.addcmul(b, self.norm2(h), 1 + a)
        else:
            h = self.norm2(h.add_(c))  # in place: a convolution's backward pass does not need its output
        return self.conv2(self.dropout(silu(h))).add_(self.skip(self.resample(x)))


class SelfAttention(nn.Module):
    """out = x + W_0 attention(Q, K, V),  (Q, K, V) = W norm(x), over the H W positions of x (B, C, H, W).

    W_0 begins at zero. Source: Ho et al. 2020, Appendix B; several heads from Dhariwal & Nichol 2021.

    Raises:
        ValueError: if the heads do not divide the channels.
    """

    def __init__(self, channels: int, num_heads: int = 1, norm: Callable[[int], nn.Module] = GroupNorm):
        super().__init__()
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f"{num_heads} attention heads do not divide {channels} channels")
        self.num_heads = num_heads
        self.norm, self.qkv = norm(channels), nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, H W, C): no copy where x is channels_last
        qkv = self.qkv(tokens).unflatten(2, (3, self.num_heads, channels // self.num_heads))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        h = functional.scaled_dot_product_attention(q, k, v)  # (B, heads, H W, C / heads)
        h = self.out(h.transpose(1, 2).flatten(2)).transpose(1, 2)
        return x + h.reshape(batch, channels, height, width)
