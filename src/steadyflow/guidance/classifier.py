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
        x0 = self.denoiser(x, alpha, sigma, **self._known(condition))
        return accumulate(x0, *self._shift(x, alpha, sigma, condition["label"]))

    def with_variance(self, x: Tensor, alpha: Tensor, sigma: Tensor, **condition: Tensor) -> tuple[Tensor, Tensor]:
        x0, v = self.denoiser.with_variance(x, alpha, sigma, **self._known(condition))
        return accumulate(x0, *self._shift(x, alpha, sigma, condition["label"])), v

    def _known(self, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the denoiser is told."""
        if "label" not in condition:
            raise ValueError("classifier guidance needs a label for each sample")
        return condition if self.conditional else {k: v for k, v in condition.items() if k != "label"}

    def _shift(self, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """w sigma^2 / alpha and the gradient."""
        alpha = torch.maximum(alpha, sigma / MAX_RATIO)
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.classifier(leaf, alpha, sigma, label).sum(), leaf)
        return self.scale * sigma**2 / alpha, gradient
