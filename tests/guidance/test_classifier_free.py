"""Classifier-free guidance: its formula, its evaluations, and the class-conditional law at scale 1."""

import pytest
import torch

from steadyflow.denoisers import CountedDenoiser, Denoiser, GaussianMixture
from steadyflow.guidance import ClassifierFree

MIXTURE = GaussianMixture([[-2.0, 0.0], [2.0, 0.0], [0.0, 1.0]], [0.3, 0.1, 0.2], labels=[0, 1, 1])
ALPHA, SIGMA = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABEL = torch.tensor([0, 1, 1, 0])


@pytest.mark.parametrize(("scale", "evaluations"), [(0.0, 1), (0.5, 2), (1.0, 1), (3.0, 2), (-1.0, 2)])
def test_formula_and_evaluations(scale, evaluations):
    given, free = MIXTURE(X, ALPHA, SIGMA, label=LABEL), MIXTURE(X, ALPHA, SIGMA)
    counted = CountedDenoiser(MIXTURE)
    out = ClassifierFree(counted, scale, null_label=2)(X, ALPHA, SIGMA, label=LABEL)
    torch.testing.assert_close(out, free + scale * (given - free), rtol=1e-12, atol=1e-12)
    assert counted.rows == evaluations * len(X)
    assert (given - free).abs().min() > 1e-6


def test_mixed_times_stay_with_their_rows():
    alpha, sigma = torch.tensor([[0.9, 0.5, 0.1, 0.7], [0.1, 0.8, 1.0, 0.2]], dtype=torch.float64)
    guided = ClassifierFree(MIXTURE, 2.5, null_label=2)
    single = [guided(X[i : i + 1], alpha[i], sigma[i], label=LABEL[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(guided(X, alpha, sigma, label=LABEL), torch.cat(single), rtol=1e-12, atol=1e-12)


def test_other_conditions_go_to_both_halves():
    class Recorder(Denoiser):
        def forward(self, x, alpha, sigma, **condition):
            self.given = condition
            return x

    recorder = Recorder()
    other = torch.arange(4.0)
    ClassifierFree(recorder, 2.0, null_label=7)(X, ALPHA, SIGMA, label=LABEL, other=other)
    assert recorder.given["other"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert recorder.given["label"].tolist() == [0, 1, 1, 0, 7, 7, 7, 7]


def test_guidance_is_exact_for_two_gaussians_of_one_variance():
    """For N(+-m, I) the guided score is that of p(x | label) p(label | x)^(w - 1), here by autograd of its log."""
    m, w = torch.tensor([1.5, 0.0], dtype=torch.float64), 2.5
    pair = GaussianMixture(torch.stack([m, -m]), [1.0, 1.0], labels=[0, 1])
    x = X.clone().requires_grad_()
    variance = ALPHA**2 + SIGMA**2
    given = -((x - ALPHA * m) ** 2).sum(1) / (2 * variance)
    other = -((x + ALPHA * m) ** 2).sum(1) / (2 * variance)
    log = given + (w - 1) * (given - torch.logaddexp(given, other))
    (score,) = torch.autograd.grad(log.sum(), x)
    guided = ClassifierFree(pair, w, null_label=2)(X, ALPHA, SIGMA, label=torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(guided, (X + SIGMA**2 * score) / ALPHA, rtol=1e-11, atol=1e-11)


def test_a_label_is_needed():
    with pytest.raises(ValueError, match="needs a label"):
        ClassifierFree(MIXTURE, 2.0, null_label=2)(X, ALPHA, SIGMA)
