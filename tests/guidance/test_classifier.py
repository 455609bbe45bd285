"""Classifier guidance: with the exact classifier it is the conditional denoiser; a network is asked on its own path."""

import pytest
import torch
from torch import Tensor

from steadyflow.denoisers import GaussianMixture, NetworkClassifier
from steadyflow.guidance import Classifier
from steadyflow.networks import NoisyClassifier
from steadyflow.paths import ConditionalOT, DiscreteVariancePreserving

MEANS = torch.tensor([[1.0, 0.0, 0.5], [-1.0, 0.3, 0.0], [0.2, -0.8, 0.1]], dtype=torch.float64)
VARIANCES = torch.tensor([0.2, 0.5, 0.1], dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 1])


def exact(x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
    """log p(label | x) by Bayes' rule."""
    whole = GaussianMixture(MEANS, VARIANCES, WEIGHTS).log_prob(x, alpha, sigma)
    joint = []
    for c in (0, 1):
        w = WEIGHTS[c == LABELS]
        part = GaussianMixture(MEANS[c == LABELS], VARIANCES[c == LABELS], w)
        joint.append(part.log_prob(x, alpha, sigma) + w.sum().log())
    return torch.stack(joint).gather(0, label[None])[0] - whole


@pytest.mark.parametrize("path", [DiscreteVariancePreserving(), ConditionalOT()])
def test_with_the_exact_classifier_it_is_the_conditional_denoiser(path) -> None:
    denoiser = GaussianMixture(MEANS, VARIANCES, WEIGHTS, LABELS)
    x, label = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 0, 1])
    for alpha, sigma in (path(0.3), path(torch.linspace(0.05, 0.95, 6))):
        with torch.no_grad():
            guided = Classifier(denoiser, exact, 1.0)(x, alpha, sigma, label=label)
            twice = Classifier(denoiser, exact, 2.0)(x, alpha, sigma, label=label)
        torch.testing.assert_close(guided, denoiser(x, alpha, sigma, label=label), rtol=1e-9, atol=1e-10)
        plain = denoiser(x, alpha, sigma)
        torch.testing.assert_close(twice - plain, 2 * (guided - plain), rtol=1e-9, atol=1e-10)
        given = Classifier(denoiser, exact, 1.0, conditional=True)(x, alpha, sigma, label=label)
        torch.testing.assert_close(
            given - denoiser(x, alpha, sigma, label=label), guided - plain, rtol=1e-9, atol=1e-10
        )
    with pytest.raises(ValueError, match="needs a label"):
        Classifier(denoiser, exact)(x, alpha, sigma)


def test_a_learned_variance_stays() -> None:
    class Learned(GaussianMixture):
        def with_variance(self, x, alpha, sigma, **condition):
            return self(x, alpha, sigma, **condition), x / 3

    x, label, at = torch.randn(2, 3, dtype=torch.float64), torch.tensor([0, 1]), ConditionalOT()(0.3)
    guidance = Classifier(Learned(MEANS, VARIANCES, WEIGHTS), exact)
    x0, v = guidance.with_variance(x, *at, label=label)
    assert torch.equal(x0, guidance(x, *at, label=label))
    assert torch.equal(v, x / 3)


def test_a_network_is_asked_on_its_path_at_its_index() -> None:
    torch.manual_seed(0)
    network = NoisyClassifier(1, 32, (1, 2), 1, (8,), 16, num_classes=4, head_channels=16).double().eval()
    path = DiscreteVariancePreserving()
    classifier = NetworkClassifier(network, path, clock=(1000, -1))
    x, label = torch.randn(3, 1, 16, 16, dtype=torch.float64), torch.tensor([3, 0, 1])
    index = torch.tensor([0, 400, 999])
    alpha, sigma = path((index + 1).double() / 1000)
    logits = network(x, index.double())
    found = classifier(x * 7, alpha * 7, sigma * 7, label)
    torch.testing.assert_close(found, logits.log_softmax(1)[torch.arange(3), label], rtol=1e-9, atol=1e-9)
    classes = [network(x, index.double(), torch.full((3,), c)).exp() for c in range(4)]
    torch.testing.assert_close(torch.stack(classes).sum(0), torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"takes images \(B, 1, 16, 16\), got \(1, 1, 32, 32\)"):
        network(torch.zeros(1, 1, 32, 32), torch.zeros(1))
