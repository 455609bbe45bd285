"""ADM's classifier of noisy images."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from steadyflow.networks.conditioning import Conditioning, SinusoidalTime
from steadyflow.networks.parts import Parts, level_resolutions, run


class AttentionPool(nn.Module):
    """The attention of the mean position to all others: (B, C, H, W) -> (B, K), H = W = `size`.

        tokens = [mean(x), x] + position,  out = W_0 attention(q of the mean, k, v)

    Source: Radford et al. 2021 (CLIP), Section 2.4, as used by Dhariwal & Nichol 2021.
    """

    def __init__(self, size: int, channels: int, num_heads: int, outputs: int):
        super().__init__()
        self.num_heads = num_heads
        self.position = nn.Parameter(torch.randn(size**2 + 1, channels) / channels**0.5)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + self.position.to(x.dtype)
        qkv = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        h = functional.scaled_dot_product_attention(q[:, :, :1], k, v)  # (B, heads, 1, C / heads)
        return cast(Tensor, self.out(h.flatten(1)))


class NoisyClassifier(nn.Module):
    """The way down and the middle of the U-Net, pooled by attention: (x (B, C, H, W), t (B,)) -> logits (B, K); with a
    label (B,), its log-probability (B,).

    Source: Dhariwal & Nichol 2021, Section 4 and Appendix H. The arguments are the U-Net's, but for

    Args:
        num_classes: K.
        image_size: H and W of the images, and of no other.

    Raises:
        ValueError: as UNet.
    """

    def __init__(
        self,
        in_channels: int = 3,
        model_channels: int = 128,
        channel_mult: Sequence[float] = (1, 2, 3, 4),
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (32, 16, 8),
        image_size: int = 64,
        num_classes: int = 1000,
        head_channels: int = 64,
        dropout: float = 0.0,
        scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        conv_resample: bool = True,
        time_scale: float = 1.0,
        norm_groups: int | None = 32,
        checkpoint_activations: bool = False,
    ):
        super().__init__()
        self.shape, self.checkpoint_activations = (in_channels, image_size, image_size), checkpoint_activations
        resolutions = level_resolutions(image_size, len(channel_mult), attention_resolutions)
        attends = [resolution in attention_resolutions for resolution in resolutions]
        widths = [int(mult * model_channels) for mult in channel_mult]
        parts = Parts(
            condition_dim=4 * model_channels,
            dropout=dropout,
            scale_shift_norm=scale_shift_norm,
            resblock_updown=resblock_updown,
            conv_resample=conv_resample,
            head_channels=head_channels,
            norm_groups=norm_groups,
        )
        features = SinusoidalTime(model_channels, time_scale, endpoint=False)
        self.conditioning = Conditioning(features, model_channels, parts.condition_dim)
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down, _ = parts.way_down(widths, num_res_blocks, attends)
        self.middle, self.norm = parts.middle(widths[-1]), parts.norm(widths[-1])
        self.pool = AttentionPool(resolutions[-1], widths[-1], widths[-1] // head_channels, num_classes)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"the classifier takes images (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}"
            )
        c = functional.silu(self.conditioning(t))
        h = self.stem(x)
        for stage in (*self.down, *self.middle):
            h = run(stage, h, c, self.checkpoint_activations)
        logits = self.pool(functional.silu(self.norm(h)))
        if label is None:
            return cast(Tensor, logits)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.log_softmax(1).gather(1, label[:, None]).squeeze(1)
