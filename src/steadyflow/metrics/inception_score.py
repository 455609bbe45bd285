"""Inception Score, and the fraction of class-conditional samples that show their class."""

from typing import Any

import torch
from torch import Tensor

from steadyflow.metrics.metric import EvaluationMetric, StoredMetric, generator
from steadyflow.metrics.reference import Sources


class InceptionScore(StoredMetric):
    """exp of the mean divergence between each image's class probabilities and their mean.

        IS = exp( mean_i KL(p_i || mean_j p_j) ),  averaged over `splits` equal parts of the images in random order

    `inception_score_std` is the standard deviation over the parts (correction 1). With Inception the probabilities are
    over 1008 outputs, the last layer's bias left out, as in the original code; with another extractor the number is its
    classifier's and comparable only with itself (see `protocol`).

    Source: Salimans et al. 2016, Sec. 4.

    Args:
        splits: number of parts.
        seed: of the order.
    """

    keys = ("inception_score", "inception_score_std")
    needs = ("index", "probabilities")

    def __init__(self, splits: int = 10, seed: int = 0):
        super().__init__()
        if splits < 1:
            raise ValueError(f"inception_score: need splits >= 1, got {splits}")
        self.splits, self.seed = splits, seed

    def prepare(self, sources: Sources) -> None:
        sources.classifier()

    def update(self, index: Tensor, probabilities: Tensor) -> None:
        self.store(index, probabilities)

    def protocol(self) -> dict[str, Any]:
        return {"splits": self.splits, "seed": self.seed}

    def compute(self) -> dict[str, Tensor]:
        p = self.rows().double()
        if len(p) < self.splits:
            raise ValueError(f"inception_score: {self.splits} splits need as many images, got {len(p)}")
        p = p[torch.randperm(len(p), generator=generator(self.seed)).to(p.device)]
        scores = []
        for part in p.tensor_split(self.splits):
            mean = part.mean(0, keepdim=True)
            scores.append((torch.special.entr(mean).sum() - torch.special.entr(part).sum(1).mean()).exp())
        score = torch.stack(scores)
        spread = score.std() if self.splits > 1 else torch.zeros_like(score[0])
        return {"inception_score": score.mean(), "inception_score_std": spread}


class ClassAccuracy(EvaluationMetric):
    """Fraction of class-conditional samples that the extractor's classifier assigns to their label."""

    keys = ("accuracy",)
    needs = ("label", "probabilities")
    right: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def prepare(self, sources: Sources) -> None:
        sources.classifier()

    def update(self, label: Tensor, probabilities: Tensor) -> None:
        if len(label) and int(label.max()) >= probabilities.shape[1]:
            raise ValueError(
                f"accuracy: label {int(label.max())} is none of the classifier's {probabilities.shape[1]} classes; "
                "samples drawn without a condition have no class to be checked for"
            )
        self.right += (probabilities.argmax(1) == label).sum()
        self.count += len(label)

    def compute(self) -> dict[str, Tensor]:
        if self.count == 0:
            raise ValueError("accuracy: no images were given")
        return {"accuracy": self.right / self.count}
