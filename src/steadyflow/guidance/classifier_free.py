"""Classifier-free guidance."""

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser


class ClassifierFree(Denoiser):
    """D_w = D(x | null) + w [D(x | label) - D(x | null)]

    which samples, approximately, from p(x)^(1-w) p(x | label)^w: w = 1 is the conditional model, w = 0 the
    unconditional one, w > 1 exaggerates the class. The source's guidance strength is w - 1; in eps or the score the
    rule reads the same, so a noise model (u, t) can stand for the denoiser. Both terms are taken in one call of twice
    the batch, two evaluations; w = 1 and w = 0 need one.
    Source: Ho & Salimans 2022, Eq. 6.

    Args:
        denoiser: conditioned on `label`.
        scale: w.
        null_label: the label that stands for no class, the number of classes in this project's networks.
    """

    def __init__(self, denoiser: Denoiser, scale: float, null_label: int):
        super().__init__()
        self.denoiser, self.scale, self.null_label = denoiser, float(scale), int(null_label)

    def forward(self, x: Tensor, *at: Tensor, **condition: Tensor) -> Tensor:
        if "label" not in condition:
            raise ValueError("classifier-free guidance needs a label for each sample")
        null = {**condition, "label": torch.full_like(condition["label"], self.null_label)}
        if self.scale == 1:
            return self.denoiser(x, *at, **condition)
        if self.scale == 0:
            return self.denoiser(x, *at, **null)
        both = {name: torch.cat([value, null[name]]) for name, value in condition.items()}
        twice = (torch.cat([v, v]) if v.ndim else v for v in at)
        given, free = self.denoiser(torch.cat([x, x]), *twice, **both).chunk(2)
        return torch.lerp(free, given, self.scale)
