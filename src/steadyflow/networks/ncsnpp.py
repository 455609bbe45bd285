"""The U-Nets of score SDEs: NCSN++ and DDPM++, which EDM, rectified flow and CLD use too."""

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from steadyflow.networks.blocks import GroupNorm, SelfAttention, zero
from steadyflow.networks.conditioning import Conditioning, FourierTime, SinusoidalTime
from steadyflow.networks.parts import check_images, level_resolutions, run

norm = partial(GroupNorm, eps=1e-6)


def resample(x: Tensor, direction: str, fir: bool) -> Tensor:
    """Halves ("down") or doubles ("up") x (B, C, H, W) by the filter [1, 1], or [1, 3, 3, 1] (`fir`), zeros outside.

    [1, 3, 3, 1] / 8 is [1, 1] / 2 three times; its transpose is bilinear interpolation.
    """
    if direction == "down":
        return functional.avg_pool2d(smooth(functional.pad(x, (1, 1, 1, 1)), 2) if fir else x, 2)
    if not fir:
        return functional.interpolate(x, scale_factor=2.0, mode="nearest")
    x = functional.interpolate(functional.pad(x, (1, 1, 1, 1)), scale_factor=2.0, mode="bilinear")
    return x[:, :, 2:-2, 2:-2]


def smooth(x: Tensor, times: int) -> Tensor:
    """The filter [1, 1] / 2 along height and width, `times` times; each takes one pixel off."""
    for _ in range(times):
        x = functional.avg_pool2d(x, 2, stride=1)
    return x


class FirConv(nn.Conv2d):
    """Halves by [1, 3, 3, 1] and convolves 3 x 3, padding once: no zeros between the two."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__(channels, out_channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(smooth(functional.pad(x, (2, 2, 2, 2)), 3))


class Block(nn.Module):
    """x (B, C, H, W), c (B, D) -> (B, C', H', W'), R the change of resolution, if any:

        h = conv(R silu(norm(x))) + W c
        h = (skip(R x) + conv_0(dropout(silu(norm(h))))) / sqrt(2)
        h = (h + attention(h)) / sqrt(2)                              where there is attention

    skip is a 1 x 1 convolution where C' differs from C or R is there. Source: Song et al. 2021, Appendix H (the
    residual block of BigGAN, skip connections scaled by 1 / sqrt(2), FIR resampling).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        condition_dim: int,
        dropout: float = 0.0,
        fir: bool = False,
        direction: str | None = None,
        attention: bool = False,
    ):
        super().__init__()
        self.direction, self.fir = direction, fir
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.condition = nn.Linear(condition_dim, out_channels)
        self.norm2, self.conv2 = norm(out_channels), zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.dropout = nn.Dropout(dropout)
        plain = direction is None and channels == out_channels
        self.skip = nn.Identity() if plain else nn.Conv2d(channels, out_channels, 1)
        self.attention = SelfAttention(out_channels, norm=norm) if attention else None

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        h = functional.silu(self.norm1(x))
        if self.direction is not None:
            h, x = resample(h, self.direction, self.fir), resample(x, self.direction, self.fir)
        h = self.conv1(h) + self.condition(c)[:, :, None, None].to(h.dtype)
        h = (self.skip(x) + self.conv2(self.dropout(functional.silu(self.norm2(h))))) * math.sqrt(0.5)
        return h if self.attention is None else self.attention(h) * math.sqrt(0.5)


class Head(nn.Module):
    """conv_0(silu(norm(h))): features to pixels."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.norm, self.conv = norm(channels), zero(nn.Conv2d(channels, out_channels, 3, padding=1))

    def forward(self, h: Tensor) -> Tensor:
        return cast(Tensor, self.conv(functional.silu(self.norm(h))))


class NCSNpp(nn.Module):
    """NCSN++ / DDPM++: network(x (B, C, H, W), t (B,), label (B,) or None) -> (B, out_channels, H, W).

        s = time_scale t + time_shift,  at least time_min;    c = condition(s, or log s where log_time; label)
        down:    per level num_res_blocks blocks, a block that halves before each but the first
        middle:  block with attention, block
        up:      per level num_res_blocks + 1 blocks on [h, the down path's output], attention after the last; double

    A new network returns exactly 0. With `input_pyramid` the image, halved by FIR from level to level, joins each
    level on the way down: "skip" adds a 1 x 1 convolution of it; "residual" convolves it as it is halved, and (h + it)
    / sqrt(2) is both the features and the next image. With `output_pyramid` each level on the way up has a head, and
    the output is their sum, doubled by FIR from level to level.

    The defaults are DDPM++ of CIFAR-10, 61.8M parameters. Source: Song et al. 2021, Appendix H; Karras et al. 2022,
    Appendix F.4 and Table 7, who add class labels (and augmentation labels, which are zero when sampling).

    Args:
        in_channels, out_channels: C, and what comes out (None: C).
        model_channels: width of the first level.
        channel_mult: widths of the levels, as multiples of model_channels.
        num_res_blocks: blocks per level.
        attention_resolutions: heights with attention (the middle always has it).
        image_size: height the attention resolutions refer to.
        dropout: inside the blocks.
        num_classes: 0 without labels; else label num_classes is the null label, and label None means it.
        fourier: random Fourier features of the time, in place of sinusoids.
        fir: resample by [1, 3, 3, 1], in place of means and nearest neighbours.
        input_pyramid: None, "skip" or "residual"; needs fir.
        output_pyramid: a head on every level; needs fir.
        time_scale, time_shift, time_min, log_time: the network's own time s, in place of the path's t.
        divide_by_time: the output is divided by s.
        checkpoint_activations: recompute each block in the backward pass.

    Raises:
        ValueError: sizes that do not divide, a resolution the network never has, a pyramid without fir; in the call,
            x with other channels or of a size that does not divide, or a wrong label.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 4,
        attention_resolutions: Sequence[int] = (16,),
        image_size: int = 32,
        dropout: float = 0.0,
        num_classes: int = 0,
        fourier: bool = False,
        fir: bool = False,
        input_pyramid: str | None = None,
        output_pyramid: bool = False,
        time_scale: float = 999.0,
        time_shift: float = 0.0,
        time_min: float = -math.inf,
        log_time: bool = False,
        divide_by_time: bool = False,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        self.divisor = 2 ** (len(channel_mult) - 1)
        if image_size % self.divisor:
            raise ValueError(f"image_size {image_size} is not a multiple of {self.divisor}: {len(channel_mult)} levels")
        resolutions = level_resolutions(image_size, len(channel_mult), attention_resolutions)
        if input_pyramid not in (None, "skip", "residual"):
            raise ValueError(f"input_pyramid must be null, skip or residual, got {input_pyramid}")
        if (input_pyramid or output_pyramid) and not fir:
            raise ValueError("pyramids are resampled by [1, 3, 3, 1]: set fir=true")
        self.in_channels, self.num_classes, self.fir, self.input_pyramid = in_channels, num_classes, fir, input_pyramid
        self.time_scale, self.time_shift, self.time_min = float(time_scale), float(time_shift), float(time_min)
        self.log_time, self.divide_by_time = log_time, divide_by_time
        self.checkpoint_activations = checkpoint_activations
        out_channels = in_channels if out_channels is None else out_channels

        width, feature_dim = 4 * model_channels, (2 if fourier else 1) * model_channels
        features = FourierTime(feature_dim) if fourier else SinusoidalTime(feature_dim, scale=1.0)
        self.conditioning = Conditioning(features, feature_dim, width, num_classes, labels_first=True)

        def block(channels: int, out: int, direction: str | None = None, attention: bool = False) -> Block:
            return Block(channels, out, width, dropout, fir, direction, attention)

        self.stem = nn.Conv2d(in_channels, model_channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.pyramid = nn.ModuleList()  # of the input, one a level but the first
        channels, skips, image = model_channels, [model_channels], in_channels
        for level, (mult, resolution) in enumerate(zip(channel_mult, resolutions, strict=True)):
            blocks, out = nn.ModuleList(), mult * model_channels
            if level:
                blocks.append(block(channels, channels, "down"))
                skips.append(channels)
            if level and input_pyramid == "skip":
                self.pyramid.append(nn.Conv2d(in_channels, channels, 1))
            elif level and input_pyramid == "residual":
                self.pyramid.append(FirConv(image, channels))
                image = channels
            for _ in range(num_res_blocks):
                blocks.append(block(channels, out, attention=resolution in attention_resolutions))
                skips.append(out)
                channels = out
            self.down.append(blocks)
        self.middle = nn.ModuleList([block(channels, channels, attention=True), block(channels, channels)])
        self.heads = nn.ModuleList()
        for level in reversed(range(len(channel_mult))):
            blocks, out = nn.ModuleList(), channel_mult[level] * model_channels
            if level < len(channel_mult) - 1:
                blocks.append(block(channels, channels, "up"))
            for i in range(num_res_blocks + 1):
                last = i == num_res_blocks and resolutions[level] in attention_resolutions
                blocks.append(block(channels + skips.pop(), out, attention=last))
                channels = out
            self.up.append(blocks)
            if output_pyramid or level == 0:
                self.heads.append(Head(channels, out_channels))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        check_images(x, t, "NCSN++", self.in_channels, self.divisor)
        s = (self.time_scale * t + self.time_shift).clamp(min=self.time_min)
        c = functional.silu(self.conditioning(s.log() if self.log_time else s, label))
        h, skips = self._down(x, c)
        for block in self.middle:
            h = run(block, h, c, self.checkpoint_activations)
        h = self._up(h, skips, c)
        return h / s.to(h.dtype)[:, None, None, None] if self.divide_by_time else h

    def _down(self, x: Tensor, c: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The features of the last level, and those of every block."""
        h = self.stem(x)
        skips, image = [h], x
        for level, blocks in enumerate(self.down):
            for i, block in enumerate(cast(nn.ModuleList, blocks)):
                h = run(block, h, c, self.checkpoint_activations)
                if level and i == 0 and self.input_pyramid is not None:
                    join = self.pyramid[level - 1]
                    if self.input_pyramid == "skip":
                        image = resample(image, "down", self.fir)
                        h = h + join(image)
                    else:
                        image = h = (h + join(image)) * math.sqrt(0.5)
                skips.append(h)
        return h, skips

    def _up(self, h: Tensor, skips: list[Tensor], c: Tensor) -> Tensor:
        """The image, of one head or of all."""
        out: Tensor | None = None
        for level, blocks in enumerate(self.up):
            for i, block in enumerate(cast(nn.ModuleList, blocks)):
                h = h if level and i == 0 else torch.cat([h, skips.pop()], dim=1)
                h = run(block, h, c, self.checkpoint_activations)
            if len(self.heads) > 1:
                own = self.heads[level](h)
                out = own if out is None else resample(out, "up", self.fir) + own
        return cast(Tensor, self.heads[0](h)) if out is None else out


class UnitRange(nn.Module):
    """A flow between images in [0, 1] and N(0, I) as one of images in [-1, 1]: out = 1 + network(x - t, t).

    With x_0 = 2 y_0 - 1 and x_t = (1 - t) x_0 + 2 t eps, y_t = (1 - t) y_0 + t eps is (x_t + 1 - t) / 2, 2 y_t - 1 is
    x_t - t, and the velocities are d x / dt = 1 + 2 d y / dt. The network takes 2 y_t - 1 and gives 2 d y / dt.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return cast(Tensor, 1 + self.network(x - t.to(x.dtype)[:, None, None, None], t, label))
