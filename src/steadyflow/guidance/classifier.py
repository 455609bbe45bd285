"""Guidance by the gradient of a classifier."""

from collections.abc import Callable

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.guidance.pigdm import MAX_RATIO
from steadyflow.paths import accumulate

LogProbability = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Classifier(Denoiser):
    """D_w = D + w (sigma^2 / alpha) grad_x log p(label | x)

    the score shifted by w grad log p(label | x), which samples, approximately, from p(x) p(label | x)^w: for the exact
    classifier and w = 1 it is E[x_0 | x, label]. One evaluation and one gradient of the classifier a call.
    Source: Dhariwal & Nichol 2021, Eq. 14 (in eps) and Section 4.3 (w).

    Args:
        denoiser: D.
        classifier: (x (B, *S), alpha, sigma, label (B,)) -> log p(label | x) (B,), as NetworkClassifier.
        scale: w.
        conditional: whether the denoiser takes the label too.
    """

    def __init__(self, denoiser: Denoiser, classifier: LogProbability, scale: float = 1.0, conditional: bool = False):
        super().__init__()
        self.denoiser, self.classifier = denoiser, classifier
        self.scale, self.conditional = float(scale), conditional

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> Tensor:
        if "label" not in condition:
            raise ValueError("classifier guidance needs a label for each sample")
        label = condition["label"]
        known = condition if self.conditional else {k: v for k, v in condition.items() if k != "label"}
        x0 = self.denoiser(x, alpha, sigma, **known)
        alpha = torch.maximum(alpha, sigma / MAX_RATIO)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.classifier(leaf, alpha, sigma, label).sum(), leaf)
        return accumulate(x0, self.scale * sigma**2 / alpha, gradient)
