"""The convolutional U-Net of DDPM and ADM."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from steadyflow.networks.blocks import silu, zero
from steadyflow.networks.conditioning import Conditioning, SinusoidalTime
from steadyflow.networks.parts import Parts, check_images, level_resolutions, run


class UNet(nn.Module):
    """U-Net in the DDPM / ADM family: network(x (B, C, H, W), t (B,), label (B,) or None) -> (B, C or 2C, H, W).

        down:    per level num_res_blocks residual blocks, then halve (not after the last level)
        middle:  block, attention, block
        up:      per level num_res_blocks + 1 blocks, each on [h, the down path's output], then double

    The head begins at zero, so a new network returns exactly 0. The defaults are the 35.7M CIFAR-10 network of Ho et
    al. 2020 (Appendix B); heads, scale-shift norm, resampling blocks and learned sigma follow Dhariwal & Nichol 2021.

    Args:
        in_channels: C.
        model_channels: width of the first level, where channel_mult begins with 1, and a quarter of the condition's.
        channel_mult: widths of the levels, as multiples of model_channels; each further level halves the resolution.
        num_res_blocks: residual blocks per level.
        attention_resolutions: heights at which each block is followed by attention (the middle always has it).
        image_size: height the attention resolutions refer to. Other sizes run too, where they divide.
        num_heads: attention heads; or head_channels: channels per head, in which case num_heads is left at 1.
        dropout: inside the residual blocks.
        num_classes: 0 without labels; else label num_classes is the null label, and label None means it.
        null_label: without it there is no null label, and a network with classes needs a label.
        learned_sigma: the output has 2C channels, the second half being the variance of Nichol & Dhariwal 2021.
        scale_shift_norm: condition by scale and shift after the norm, in place of addition before it.
        resblock_updown: change resolution inside a residual block, in place of a convolution.
        conv_resample: without it (and without resblock_updown) resolution changes by means and copies alone.
        asymmetric_padding: the convolutions that halve pad the right and the lower edge alone, as in Ho et al. 2020.
        patch_size: p x p pixels become channels before the first level and pixels again after the head: the whole
            network runs at 1/p of the resolution, and the attention resolutions count there.
        time_scale, time_endpoint: of the sinusoidal features of the time; see SinusoidalTime.
        norm_groups, norm_eps: of every group normalisation; see GroupNorm.
        input_skip: out = f(c) head + g(c) x with learned scalars f, g of the time and label. For eps-prediction of
            small images: the last norm divides by the sample's own standard deviation, so that a short training leaves
            an error of about 1 / (2 C H W) where x is nearly eps, and x_0 = (x - sigma eps) / alpha multiplies it by
            1 / alpha^2.
        checkpoint_activations: recompute each stage in the backward pass (less memory, one more forward). An attribute
            too: it can be set on a network that is there.

    Raises:
        ValueError: sizes that do not divide, heads that do not divide, a resolution the network never has; in the
            call, x with other channels, with a height or width that does not divide, or a wrong label.
    """

    def __init__(
        self,
        in_channels: int = 3,
        model_channels: int = 128,
        channel_mult: Sequence[float] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        image_size: int = 32,
        num_heads: int = 1,
        head_channels: int | None = None,
        dropout: float = 0.0,
        num_classes: int = 0,
        null_label: bool = True,
        learned_sigma: bool = False,
        scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        conv_resample: bool = True,
        asymmetric_padding: bool = False,
        patch_size: int = 1,
        time_scale: float = 1000.0,
        time_endpoint: bool = True,
        norm_groups: int | None = None,
        norm_eps: float = 1e-5,
        input_skip: bool = False,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        self.in_channels, self.num_classes, self.patch_size = in_channels, num_classes, patch_size
        self.checkpoint_activations, self.wide = checkpoint_activations, model_channels >= 128
        self.null_label = null_label or num_classes == 0  # whether it runs without a class
        self.divisor = patch_size * 2 ** (len(channel_mult) - 1)
        if image_size % self.divisor:
            raise ValueError(f"image_size {image_size} is not a multiple of {self.divisor}, which {self._why()}")
        resolutions = level_resolutions(image_size // patch_size, len(channel_mult), attention_resolutions)
        attends = [resolution in attention_resolutions for resolution in resolutions]
        widths = [int(mult * model_channels) for mult in channel_mult]
        outer, condition_dim = in_channels * patch_size**2, 4 * model_channels
        parts = Parts(
            condition_dim,
            dropout,
            scale_shift_norm,
            resblock_updown,
            conv_resample,
            asymmetric_padding,
            num_heads,
            head_channels,
            norm_groups,
            norm_eps,
        )

        features = SinusoidalTime(model_channels, time_scale, time_endpoint)
        self.conditioning = Conditioning(features, model_channels, condition_dim, num_classes, null_label)
        self.stem = nn.Conv2d(outer, widths[0], 3, padding=1)
        self.down, skips = parts.way_down(widths, num_res_blocks, attends)
        self.middle, channels = parts.middle(widths[-1]), widths[-1]
        self.up = nn.ModuleList()
        self.joins: list[bool] = []  # for each stage of the way up: does it take an output of the way down?
        for level in reversed(range(len(widths))):
            for _ in range(num_res_blocks + 1):
                self.up.append(parts.stage(channels + skips.pop(), widths[level], attends[level]))
                self.joins.append(True)
                channels = widths[level]
            if level:
                self.up.append(parts.resample(channels, "up"))
                self.joins.append(False)
        self.norm = parts.norm(channels)
        self.head = zero(nn.Conv2d(channels, outer * (2 if learned_sigma else 1), 3, padding=1))
        self.mix = cast(nn.Linear, zero(nn.Linear(condition_dim, 2))) if input_skip else None

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        check_images(x, t, "the U-Net", self.in_channels, self.divisor, f"which {self._why()}")
        c = functional.silu(self.conditioning(t, label))
        h = self.stem(x if self.patch_size == 1 else functional.pixel_unshuffle(x, self.patch_size))
        if self.wide and h.device.type == "cpu" and h.dtype == torch.float32 and not torch.is_grad_enabled():
            h = h.contiguous(memory_format=torch.channels_last)  # 5% faster there; narrow networks are slower
        skips = [h]
        for stage in self.down:
            h = run(stage, h, c, self.checkpoint_activations)
            skips.append(h)
        for stage in self.middle:
            h = run(stage, h, c, self.checkpoint_activations)
        for stage, joins in zip(self.up, self.joins, strict=True):
            h = run(stage, torch.cat([h, skips.pop()], dim=1) if joins else h, c, self.checkpoint_activations)
        h = self.head(silu(self.norm(h)))
        h = h if self.patch_size == 1 else functional.pixel_shuffle(h, self.patch_size)
        return h if self.mix is None else self._mix(self.mix, h, x, c)

    def _mix(self, mix: nn.Linear, h: Tensor, x: Tensor, c: Tensor) -> Tensor:
        """f(c) h + g(c) x in float32 at least, x being added to the first C channels; f = 1, g = 0 at first."""
        with torch.autocast(x.device.type, enabled=False):
            f, g = mix(c.to(mix.weight.dtype))[:, :, None, None].unbind(1)
            h = (1 + f.unsqueeze(1)) * h
            skip = g.unsqueeze(1) * x
            return (
                h + skip if h.shape[1] == x.shape[1] else torch.cat([h[:, : x.shape[1]] + skip, h[:, x.shape[1] :]], 1)
            )

    def _why(self) -> str:
        return "the number of levels and the patch size ask for"
