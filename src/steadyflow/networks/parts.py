"""What U-Nets share: the check of their input, recomputed activations, and of ADM's the way down."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steadyflow.networks.blocks import GroupNorm, Resample, ResBlock, SelfAttention


class Stage(nn.Module):
    """One step of the U-Net: a residual block with or without attention after it, or a plain change of resolution."""

    def __init__(self, block: ResBlock | Resample, attention: SelfAttention | None = None):
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.block(x, c) if isinstance(self.block, ResBlock) else self.block(x)
        return x if self.attention is None else self.attention(x)


@dataclass(frozen=True)
class Parts:
    """What all stages of one network agree on; see `UNet` for the options.

    Raises:
        ValueError: both num_heads and head_channels.
    """

    condition_dim: int
    dropout: float = 0.0
    scale_shift_norm: bool = False
    resblock_updown: bool = False
    conv_resample: bool = True
    asymmetric_padding: bool = False
    num_heads: int = 1
    head_channels: int | None = None
    norm_groups: int | None = None
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.head_channels is not None and self.num_heads != 1:
            got = f"got {self.num_heads} and {self.head_channels}"
            raise ValueError(f"give num_heads or head_channels, not both: {got}")

    def norm(self, channels: int) -> GroupNorm:
        return GroupNorm(channels, self.norm_groups, self.norm_eps)

    def attention(self, channels: int) -> SelfAttention:
        """Raises ValueError where head_channels does not divide the channels."""
        if self.head_channels is None:
            return SelfAttention(channels, self.num_heads, self.norm)
        if channels % self.head_channels:
            raise ValueError(f"head_channels {self.head_channels} does not divide {channels} channels")
        return SelfAttention(channels, channels // self.head_channels, self.norm)

    def stage(self, channels: int, out_channels: int, attends: bool) -> Stage:
        """A residual block, with attention after it or without."""
        return Stage(self._block(channels, out_channels), self.attention(out_channels) if attends else None)

    def resample(self, channels: int, direction: str) -> Stage:
        """Half (`down`) or twice (`up`) the resolution."""
        if self.resblock_updown:
            return Stage(self._block(channels, channels, direction))
        return Stage(Resample(channels, direction, self.conv_resample, self.asymmetric_padding))

    def way_down(
        self, widths: Sequence[int], num_res_blocks: int, attends: Sequence[bool]
    ) -> tuple[nn.ModuleList, list[int]]:
        """The stages of all levels, and the channels of what each of them, and the stem before them, gives."""
        stages, channels = nn.ModuleList(), [widths[0]]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                stages.append(self.stage(channels[-1], width, attends[level]))
                channels.append(width)
            if level < len(widths) - 1:
                stages.append(self.resample(width, "down"))
                channels.append(width)
        return stages, channels

    def middle(self, channels: int) -> nn.ModuleList:
        """Block, attention, block."""
        return nn.ModuleList([self.stage(channels, channels, True), self.stage(channels, channels, False)])

    def _block(self, channels: int, out_channels: int, direction: str | None = None) -> ResBlock:
        return ResBlock(
            channels, out_channels, self.condition_dim, self.dropout, self.scale_shift_norm, direction, self.norm
        )


def level_resolutions(image_size: int, levels: int, attention_resolutions: Sequence[int]) -> list[int]:
    """The height of each level, from image_size down by halves.

    Raises:
        ValueError: an attention resolution that no level has.
    """
    resolutions = [image_size // 2**level for level in range(levels)]
    if absent := sorted(set(attention_resolutions) - set(resolutions)):
        raise ValueError(f"no level has the attention resolution {absent[0]}: the levels are at {resolutions}")
    return resolutions


def run(block: nn.Module, h: Tensor, c: Tensor, recompute: bool) -> Tensor:
    """block(h, c), whose activations the backward pass recomputes where it is asked to."""
    if recompute and torch.is_grad_enabled():
        return cast(Tensor, checkpoint(block, h, c, use_reentrant=False))
    return cast(Tensor, block(h, c))


def check_images(x: Tensor, t: Tensor, name: str, channels: int, divisor: int, why: str = "as its levels ask") -> None:
    """That a network can take x (B, C, H, W) and t (B,).

    Raises:
        ValueError: other channels, a height or width that does not divide, a time of another shape.
    """
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"{name} takes images (B, {channels}, H, W), got shape {tuple(x.shape)}")
    if x.shape[2] % divisor or x.shape[3] % divisor:
        raise ValueError(f"images of {x.shape[2]} x {x.shape[3]} do not divide by {divisor}, {why}")
    if t.shape != (len(x),):
        raise ValueError(f"the network's time must have shape ({len(x)},), got {tuple(t.shape)}")
