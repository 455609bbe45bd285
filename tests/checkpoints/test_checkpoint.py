"""Embedded and exact checkpoints."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from steadyflow.checkpoints import Checkpoint, analytic, checkpoint, embedded, embedded_names
from steadyflow.data import Digits, GaussianMixtureSamples, Toy2D
from steadyflow.denoisers import Empirical
from steadyflow.paths import ConditionalOT, VariancePreserving


class Few:
    """Four labelled items."""

    name, shape, num_classes, fingerprint = "few", (1, 1, 2), 2, "f"
    x = torch.tensor([[-1.0, 0.0], [0.5, 1.0], [1.0, -1.0], [0.0, 0.5]]).reshape(4, 1, 1, 2)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], index % 2


def test_an_unknown_name_lists_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("digits32", "digits32_ot"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "__pycache__").mkdir()
    monkeypatch.setattr(checkpoint, "PACKAGE", tmp_path)
    assert embedded_names() == ["digits32", "digits32_ot"]
    with pytest.raises(ValueError, match=r"'digit32': there are digits32, digits32_ot; did you mean digits32\?"):
        embedded("digit32")
    with pytest.raises(ValueError, match=r"no embedded checkpoint '\.\./x'"):
        embedded("../x")
    monkeypatch.setattr(checkpoint, "PACKAGE", tmp_path / "none")
    with pytest.raises(ValueError, match="this installation has none"):
        embedded("digits32")


@pytest.mark.parametrize("name", embedded_names())
def test_embedded_checkpoints_denoise_the_digits_they_never_saw(name: str) -> None:
    # Against the exact denoiser of the training digits and their labels, which knows the training set alone: at a
    # noise level where the posterior is broad, a network that generalises is nearer to held-out digits.
    found = embedded(name)
    assert (found.name, found.shape, found.num_classes) == (name, (1, 32, 32), 10)
    assert {"config", "seed", "steps", "git revision", "metrics"} <= found.card.keys()
    test = Digits("test")
    x0 = torch.stack([test[i][0] for i in range(len(test))])
    label = torch.tensor([test[i][1] for i in range(len(test))])
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    alpha, sigma = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    exact = analytic(Digits("train"), found.path).denoiser
    x = 0.8 * x0 + 0.6 * eps
    with torch.inference_mode():
        error = [(d(x, alpha, sigma, label=label) - x0).square().mean() for d in (found.denoiser, exact)]
    assert error[0] < error[1]


def test_embedded_checkpoints_fit_in_eight_megabytes() -> None:
    files = checkpoint.PACKAGE.glob("*/model.safetensors")
    assert sum(file.stat().st_size for file in files) <= 8e6


@pytest.mark.parametrize("path", [VariancePreserving(), ConditionalOT()])
def test_the_mixture_of_a_dataset_is_its_own_exact_denoiser(path: object) -> None:
    # One mode: D = m + alpha C (alpha^2 C + sigma^2)^-1 (x - alpha m), here in one dimension.
    dataset = GaussianMixtureSamples([[2.0]], [[0.25]], count=3)
    found = analytic(dataset, path)  # type: ignore[arg-type]
    x, alpha, sigma = torch.tensor([[1.0], [-3.0]]), torch.tensor(0.5), torch.tensor(2.0)
    expected = 2 + 0.5 * 0.25 / (0.25 * 0.25 + 4) * (x - 0.5 * 2)
    torch.testing.assert_close(found.denoiser(x, alpha, sigma), expected)
    assert (found.path, found.shape, found.num_classes) == (path, (1,), 0)


def test_any_other_dataset_is_the_empirical_distribution_of_its_items_per_class() -> None:
    found = analytic(Few(), VariancePreserving())
    x, alpha, sigma = torch.randn(5, 1, 1, 2), torch.tensor(0.7), torch.tensor(0.9)
    logits = -(x - 0.7 * Few.x.reshape(1, 4, 1, 1, 2)[:, :, 0]).square().sum((-1, -2)) / (2 * 0.81)
    torch.testing.assert_close(
        found.denoiser(x, alpha, sigma), (logits.softmax(1) @ Few.x.flatten(1)).reshape(5, 1, 1, 2)
    )
    label = torch.tensor([0, 1, 2, 1, 0])  # 2 is the null label: all items
    member = (torch.arange(4) % 2 == label[:, None]) | (label[:, None] == 2)
    expected = logits.masked_fill(~member, -torch.inf).softmax(1) @ Few.x.flatten(1)
    torch.testing.assert_close(found.denoiser(x, alpha, sigma, label=label), expected.reshape(5, 1, 1, 2))
    assert (found.shape, found.num_classes) == ((1, 1, 2), 2)


def test_an_unlabelled_dataset_takes_no_label() -> None:
    found = analytic(Toy2D("rings", count=50), ConditionalOT())
    assert isinstance(found.denoiser, Empirical)
    with pytest.raises(ValueError, match="no classes"):
        found.denoiser(torch.zeros(1, 2), torch.tensor(0.5), torch.tensor(0.5), label=torch.tensor([0]))


def test_the_identity_of_an_exact_checkpoint_is_that_of_dataset_and_path() -> None:
    mixture, rings = GaussianMixtureSamples([[0.0]], 1.0, count=3), Toy2D("rings", count=50)
    found = [
        analytic(mixture, VariancePreserving()),
        analytic(mixture, VariancePreserving(beta_max=10)),
        analytic(mixture, ConditionalOT()),
        analytic(rings, VariancePreserving()),
        analytic(Toy2D("rings", count=51), VariancePreserving()),
    ]
    assert len({c.sha256 for c in found}) == 5
    assert analytic(mixture, VariancePreserving()).sha256 == found[0].sha256


def test_a_dataset_of_another_shape_is_refused() -> None:
    found: Checkpoint = analytic(Few(), ConditionalOT())
    found.check((1, 1, 2), "few")
    with pytest.raises(ValueError, match=r"samples of shape \(1, 1, 2\), but dataset cifar10 has \(3, 32, 32\)"):
        found.check((3, 32, 32), "cifar10")


def test_an_empty_dataset_has_no_exact_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Few, "__len__", lambda _: 0)
    with pytest.raises(ValueError, match="few is empty"):
        analytic(Few(), ConditionalOT())
