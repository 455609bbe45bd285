"""The magnitude-preserving U-Net of EDM2."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from steadyflow.networks.conditioning import FullPrecision
from steadyflow.networks.parts import check_images, level_resolutions, run

HEAD_CHANNELS, CLIP = 64, 256.0
RESIDUAL, ATTENTION = 0.3, 0.3  # the new branch's share in a sum


def normalize(x: Tensor, dim: Sequence[int]) -> Tensor:
    """x over its root mean square along `dim` (Karras et al. 2024, Eq. 47; 1e-4 added), in float32 at least."""
    norm = torch.linalg.vector_norm(x if x.dtype == torch.float64 else x.float(), dim=dim, keepdim=True)
    return x / (1e-4 + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """silu over its root mean square on N(0, 1) (Eq. 81)."""
    return functional.silu(x) / 0.596


def mix(a: Tensor, b: Tensor, share: float) -> Tensor:
    """(1 - share) a + share b, of the magnitude of its parts (Eq. 88)."""
    return a.lerp(b, share) / math.hypot(1 - share, share)


def join(a: Tensor, b: Tensor) -> Tensor:
    """Channels of a, then of b, each half of the squared magnitude (Eq. 103 with t = 0.5)."""
    total = a.shape[1] + b.shape[1]
    return torch.cat([a * math.sqrt(0.5 * total / a.shape[1]), b * math.sqrt(0.5 * total / b.shape[1])], dim=1)


class MPConv(nn.Module):
    """Convolution (kernel k x k) or linear map (kernel 0) of normalised weights, times `gain`: magnitudes stay.

        w = gain W / rms(W) / sqrt(fan in), row by row; in training W is first replaced by W / rms(W)

    Source: Karras et al. 2024, Eq. 47 and 66.
    """

    def __init__(self, channels: int, out_channels: int, kernel: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, channels, *[kernel] * (2 if kernel else 0)))

    def normalized(self) -> Tensor:
        """W / rms(W), in float32 at least."""
        weight = self.weight if self.weight.dtype == torch.float64 else self.weight.float()
        dims = list(range(1, weight.ndim))
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalize(weight, dims))
        return normalize(weight, dims)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = self.normalized()
        weight = (weight * (gain / math.sqrt(weight[0].numel()))).to(x.dtype)
        return x @ weight.T if weight.ndim == 2 else functional.conv2d(x, weight, padding=weight.shape[-1] // 2)


class Fourier(FullPrecision):
    """sqrt(2) cos(w t + p), w ~ 2 pi N(0, 1) and p ~ U(0, 2 pi) drawn once (Eq. 75)."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("frequencies", torch.empty(dim).normal_(std=2 * math.pi))
        self.register_buffer("phases", torch.empty(dim).uniform_(0, 2 * math.pi))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, dim), in float32 at least."""
        frequencies, phases = cast(Tensor, self.frequencies), cast(Tensor, self.phases)
        return torch.cos(t[:, None] * frequencies.to(t.dtype) + phases.to(t.dtype)) * math.sqrt(2)


class Block(nn.Module):
    """x (B, C, H, W), c (B, D) -> (B, C', H', W'): Karras et al. 2024, Figure 21.

    On the way down (`encoder`) the 1 x 1 convolution and a pixel norm come first, on the way up the convolution is the
    skip's own. Attention normalises queries, keys and values.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        condition_dim: int,
        encoder: bool,
        direction: str | None = None,
        attention: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        if attention and out_channels % HEAD_CHANNELS:
            raise ValueError(f"attention needs a multiple of {HEAD_CHANNELS} channels, got {out_channels}")
        self.encoder, self.direction, self.dropout = encoder, direction, nn.Dropout(dropout)
        self.conv1 = MPConv(out_channels if encoder else channels, out_channels, 3)
        self.condition, self.gain = MPConv(condition_dim, out_channels), nn.Parameter(torch.zeros([]))
        self.conv2 = MPConv(out_channels, out_channels, 3)
        self.skip = MPConv(channels, out_channels, 1) if channels != out_channels else None
        self.qkv = MPConv(out_channels, 3 * out_channels, 1) if attention else None
        self.out = MPConv(out_channels, out_channels, 1) if attention else None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if self.direction == "down":
            x = functional.avg_pool2d(x, 2)
        elif self.direction == "up":
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.encoder:
            x = normalize(x if self.skip is None else self.skip(x), [1])
        h = self.conv1(silu(x)) * (self.condition(c, self.gain) + 1)[:, :, None, None].to(x.dtype)
        h = self.conv2(self.dropout(silu(h)))
        if not self.encoder and self.skip is not None:
            x = self.skip(x)
        x = mix(x, h, RESIDUAL)
        if self.qkv is not None and self.out is not None:
            q, k, v = normalize(self.qkv(x).unflatten(1, (3, -1, HEAD_CHANNELS)), [3]).flatten(4).mT.unbind(1)
            h = functional.scaled_dot_product_attention(q, k, v)  # (B, heads, H W, 64)
            x = mix(x, self.out(h.mT.reshape(x.shape)), ATTENTION)
        return x.clamp(-CLIP, CLIP)


class EDM2UNet(nn.Module):
    """The U-Net of EDM2: network(x (B, C, H, W), t (B,), label (B,) or None) -> (B, C, H, W), exactly 0 when new.

    Every layer keeps the magnitude of its input; there are no biases and no norms with weights. Source: Karras et al.
    2024 (EDM2), configuration G. The network's time is EDM's c_noise.

    Args:
        in_channels: C.
        model_channels: width of the first level; the published sizes XS to XXL have 128, 192, 256, 320, 384, 448.
        channel_mult: widths of the levels, as multiples of model_channels.
        num_res_blocks: blocks per level.
        attention_resolutions: heights with attention (the middle always has it).
        image_size: height the attention resolutions refer to.
        dropout: inside the blocks.
        num_classes: 0 without labels; else label num_classes, or label None, adds nothing.
        checkpoint_activations: recompute each block in the backward pass.

    Raises:
        ValueError: sizes that do not divide, a resolution the network never has; in the call, x with other channels or
            of a size that does not divide, or a label for a network without classes.
    """

    def __init__(
        self,
        in_channels: int = 3,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_res_blocks: int = 3,
        attention_resolutions: Sequence[int] = (16, 8),
        image_size: int = 64,
        dropout: float = 0.0,
        num_classes: int = 0,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        self.in_channels, self.num_classes, self.divisor = in_channels, num_classes, 2 ** (len(channel_mult) - 1)
        if image_size % self.divisor:
            raise ValueError(f"image_size {image_size} is not a multiple of {self.divisor}: {len(channel_mult)} levels")
        resolutions = level_resolutions(image_size, len(channel_mult), attention_resolutions)
        self.checkpoint_activations = checkpoint_activations
        widths = [mult * model_channels for mult in channel_mult]
        width = max(widths)

        def block(channels: int, out: int, encoder: bool, direction: str | None = None, attend: bool = False) -> Block:
            return Block(channels, out, width, encoder, direction, attend, dropout)

        self.features, self.time = Fourier(widths[0]), MPConv(widths[0], width)
        self.labels = MPConv(num_classes, width) if num_classes else None
        self.stem = MPConv(in_channels + 1, widths[0], 3)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, skips = widths[0], [widths[0]]
        for level, out in enumerate(widths):
            if level:
                self.down.append(block(channels, channels, True, "down"))
                skips.append(channels)
            for _ in range(num_res_blocks):
                self.down.append(block(channels, out, True, attend=resolutions[level] in attention_resolutions))
                skips.append(out)
                channels = out
        self.joins: list[bool] = []  # for each block of the way up: does it take an output of the way down?
        for level, out in reversed(list(enumerate(widths))):
            if level == len(widths) - 1:
                self.up.extend([block(channels, channels, False, attend=True), block(channels, channels, False)])
                self.joins += [False, False]
            else:
                self.up.append(block(channels, channels, False, "up"))
                self.joins.append(False)
            for _ in range(num_res_blocks + 1):
                attend = resolutions[level] in attention_resolutions
                self.up.append(block(channels + skips.pop(), out, False, attend=attend))
                self.joins.append(True)
                channels = out
        self.head, self.gain = MPConv(channels, in_channels, 3), nn.Parameter(torch.zeros([]))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        check_images(x, t, "EDM2's U-Net", self.in_channels, self.divisor)
        c = silu(self._condition(t, label)).to(x.dtype)
        h = self.stem(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        skips = [h]
        for block in self.down:
            h = run(block, h, c, self.checkpoint_activations)
            skips.append(h)
        for block, joins in zip(self.up, self.joins, strict=True):
            h = run(block, join(h, skips.pop()) if joins else h, c, self.checkpoint_activations)
        return cast(Tensor, self.head(h, self.gain))

    def _condition(self, t: Tensor, label: Tensor | None) -> Tensor:
        c = cast(Tensor, self.time(self.features(t)))
        if self.labels is None:
            if label is not None:
                raise ValueError("a label was given to a network without classes: build it with num_classes > 0")
            return c
        rows = functional.pad(self.labels.normalized(), (0, 1)).T  # a product with sqrt(n) one-hot; the null label: 0
        label = torch.full_like(t, self.num_classes, dtype=torch.long) if label is None else label
        return mix(c, rows[label].to(c.dtype), 0.5)
