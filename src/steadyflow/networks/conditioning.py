"""What a network is conditioned on: the time, and optionally a class label with a null row."""

import math
from collections.abc import Callable
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional


class SinusoidalTime(nn.Module):
    """Sinusoidal features of s t over geometric frequencies 1 .. 1 / 10000.

        w_k = 10000^(-k / (dim / 2 - 1)),  k = 0 .. dim / 2 - 1,  features = (sin(w s t), cos(w s t))

    Source: Vaswani et al. 2017, Section 3.5, with the frequencies of Ho et al. 2020. With s = 1000 a path time t in
    [0, 1] covers the range of DDPM's integer steps.

    Args:
        dim: number of features, even.
        scale: s.
        endpoint: without it the exponent is -k / (dim / 2), so that 1 / 10000 is not among the frequencies: those of
            Dhariwal & Nichol 2021.
    """

    def __init__(self, dim: int, scale: float = 1000.0, endpoint: bool = True):
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"sinusoidal time features need an even dimension of at least 4, got {dim}")
        self.pairs, self.scale, self.endpoint = dim // 2, float(scale), endpoint

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, dim), in float32 at least: not a buffer, which `network.bfloat16()` would round."""
        t = t if t.dtype == torch.float64 else t.float()
        k = torch.arange(self.pairs, dtype=t.dtype, device=t.device)
        rate = -math.log(10000) / (self.pairs - 1 if self.endpoint else self.pairs)
        angle = t[:, None] * (self.scale * torch.exp(k * rate))
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class FullPrecision(nn.Module):
    """A module whose buffers stay as they are where its network becomes bfloat16 or float16."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in self._buffers.items():
            if value is not None and value.dtype in (torch.bfloat16, torch.float16):
                self._buffers[name] = cast(Tensor, before[name]).to(value.device)
        return self


class FourierTime(FullPrecision):
    """Fourier features of t at random frequencies: (sin(2 pi w t), cos(2 pi w t)), w ~ N(0, scale^2) drawn once.

    In bfloat16 or float16 the angle 2 pi w t would be wrong by a radian. Source: Song et al. 2021 (score SDE),
    Appendix H.

    Args:
        dim: number of features, even.
        scale: of the frequencies, which are saved with the weights and not trained.
    """

    def __init__(self, dim: int, scale: float = 16.0):
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"Fourier time features need an even dimension, got {dim}")
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.empty(dim // 2).normal_(std=scale))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, dim), in float32 at least."""
        angle = t.to(self.frequencies.dtype)[:, None] * self.frequencies * (2 * math.pi)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class Conditioning(nn.Module):
    """The vector that modulates every block: an MLP of the time plus a row of the class table.

        c(t, label) = W_2 silu(W_1 features(t) + b_1) + b_2 + table[label]
        c(t, label) = W_2 silu(W_1 (features(t) + table[label]) + b_1) + b_2        with labels_first

    The table has num_classes + 1 rows. The last is the null label, taken where no label is given, so that one network
    serves the conditional and the unconditional model (Ho & Salimans 2022).

    Args:
        features: module (B,) -> (B, feature_dim) of the time.
        feature_dim, dim: sizes of the features and of the vector.
        num_classes: 0 for a network without labels.
        null_label: without it the table has no last row, and every call needs a label.
        labels_first: the label joins the features, before the MLP (EDM's DDPM++ and NCSN++).
    """

    def __init__(
        self,
        features: nn.Module,
        feature_dim: int,
        dim: int,
        num_classes: int = 0,
        null_label: bool = True,
        labels_first: bool = False,
    ):
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"need num_classes >= 0, got {num_classes}")
        self.features, self.num_classes = features, num_classes
        self.null_label, self.labels_first = null_label, labels_first
        self.first, self.second = nn.Linear(feature_dim, dim), nn.Linear(dim, dim)
        rows = num_classes + null_label
        self.table = nn.Embedding(rows, feature_dim if labels_first else dim) if num_classes else None

    def forward(self, t: Tensor, label: Tensor | None = None) -> Tensor:
        """t (B,), label (B,) integers in 0..num_classes or None -> (B, dim).

        Raises:
            ValueError: if t is not (B,), or the label has another shape or type, is out of range (looked at on the CPU
                only: on a GPU that would wait for the device), or is given to a network without classes.
        """
        if t.ndim != 1:
            raise ValueError(f"the network's time must have shape (B,), got {tuple(t.shape)}")
        out = self.features(t).to(self.first.weight.dtype)
        if self.labels_first:
            out = self._labelled(out, label)
        out = self.second(functional.silu(self.first(out)))
        return out if self.labels_first else self._labelled(out, label)

    def _labelled(self, out: Tensor, label: Tensor | None) -> Tensor:
        if self.table is None:
            if label is not None:
                raise ValueError("a label was given to a network without classes: build it with num_classes > 0")
            return out
        if label is None:
            if not self.null_label:
                raise ValueError(
                    f"this network has no unconditional model: give each sample a class, 0..{self.num_classes - 1}"
                )
            return out + self.table.weight[-1].to(out.dtype)
        self._check(label, len(out))
        return out + self.table(label).to(out.dtype)

    def _check(self, label: Tensor, batch: int) -> None:
        if label.shape != (batch,) or label.dtype.is_floating_point or label.dtype == torch.bool:
            found = f"{tuple(label.shape)} {str(label.dtype).removeprefix('torch.')}"
            raise ValueError(f"label must be integers of shape ({batch},), got {found}")
        if label.device.type == "cpu" and not torch.compiler.is_compiling() and batch:
            low, high = (int(v) for v in label.aminmax())
            if low < 0 or high >= self.num_classes + self.null_label:
                raise ValueError(
                    f"label {low if low < 0 else high} is out of range: classes are 0..{self.num_classes - 1}, "
                    + (f"the null label is {self.num_classes}" if self.null_label else "and there is no null label")
                )
