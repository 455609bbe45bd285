"""An evaluation as a whole: one pass, the numbers of the metrics on their own, and reasons in place of failures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steadyflow.data import Digits, open_images, write_png_zip, write_shard
from steadyflow.metrics import (
    LPIPS,
    PSNR,
    SSIM,
    ClassAccuracy,
    DigitsDistance,
    DigitsNet,
    EvaluationMetric,
    Evaluator,
    FeatureExtractor,
    FrechetDistance,
    Inception,
    InceptionScore,
    KernelDistance,
    Memorisation,
    PrecisionRecall,
    Sources,
    frechet_distance,
)
from steadyflow.metrics.reference import gaussian


class CountingNet(DigitsNet):
    """Counts the images it has seen."""

    seen = 0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += len(images)
        return super().forward(images)


def every() -> dict[str, EvaluationMetric]:
    return {
        "fid": FrechetDistance(bootstrap=3),
        "kid": KernelDistance(subsets=3),
        "inception_score": InceptionScore(),
        "precision_recall": PrecisionRecall(),
        "accuracy": ClassAccuracy(),
        "memorisation": Memorisation(),
        "psnr": PSNR(),
        "ssim": SSIM(),
        "lpips": LPIPS(),
        "lpips_digits": DigitsDistance(),
    }


def digits(features: FeatureExtractor | None = None, reference: str = "test") -> Sources:
    return Sources(lambda: features or DigitsNet(), lambda split: Digits(split), reference, cache_dir=None)


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 labelled images in three shards, written out of order, and their pairs."""
    directory, train = tmp_path_factory.mktemp("run"), Digits("train")
    for rows in (torch.arange(40, 70), torch.arange(25), torch.arange(25, 40)):
        write_shard(directory / "samples", rows, train.images[rows], train.labels[rows])
    noisy = (train.images[:70].int() + torch.arange(70).view(-1, 1, 1, 1) // 4).clamp(0, 255).to(torch.uint8)
    write_png_zip(directory / "pairs", torch.arange(70), noisy)
    return directory


def test_every_metric_in_one_pass_equals_the_metric_alone(run: Path) -> None:
    net = CountingNet()
    sources = digits(net)
    _ = sources.reference
    net.seen = 0
    found = Evaluator(every(), sources, batch_size=16).score(open_images(run), open_images(run / "pairs"))
    assert net.seen == 71  # each image once, for all metrics; one before, to see whether the features take it

    train, test = Digits("train"), Digits("test")
    features, probabilities = net(train.images[:70])
    alone = frechet_distance(*gaussian(features), *gaussian(net(test.images)[0]))
    assert abs(found["fid"] - float(alone)) < 1e-6
    assert found["accuracy"] == float((probabilities.argmax(1) == train.labels[:70]).double().mean())
    assert found["memorisation"] == 0
    noisy = open_images(run / "pairs")
    metric = PSNR()
    metric.update(torch.arange(70), train.images[:70], next(iter(noisy.batches(70)))[1])
    index, values = metric.per_image()
    assert found["psnr"] is None  # the first pairs are equal
    assert found["reason"]["psnr"] == "psnr is inf"
    assert index[values.isinf()].tolist() == [0, 1, 2, 3]
    assert 0.9 < found["ssim"] < 1
    assert found["lpips_digits"] > 0
    json.dumps(found, allow_nan=False)


def test_batch_size_does_not_matter(run: Path) -> None:
    small, large = (Evaluator(every(), digits(), size).score(open_images(run)) for size in (9, 70))
    numbers = {k: v for k, v in small.items() if isinstance(v, float)}
    assert set(numbers) >= {"fid", "fid_std", "kid", "kid_std", "inception_score", "precision", "recall", "accuracy"}
    for key, value in numbers.items():
        assert abs(value - large[key]) < 1e-5 * max(1, abs(value)), key  # the network's rounding


def test_protocols_say_what_a_number_is(run: Path) -> None:
    protocol = Evaluator(every(), digits()).score(open_images(run))["protocol"]
    net = {"features": "digits", "features_sha256": DigitsNet().sha256, "resize": "none"}
    assert protocol["fid"] == {"count": 70, "reference": "digits test (200)", "bootstrap": 3} | net
    assert protocol["kid"]["subset_size"] == 70
    assert protocol["precision"] == protocol["recall"] == {"count": 70, "reference": "digits test (200)", "k": 3} | net
    assert "fid_std" not in protocol
    assert "psnr" not in protocol


def test_what_cannot_be_had_is_none_with_its_reason_and_the_rest_is_there(run: Path) -> None:
    found = Evaluator(every(), digits()).score(open_images(run))
    assert found["fid"] > 0
    assert found["lpips"] is found["psnr"] is found["ssim"] is found["lpips_digits"] is None
    assert "alexnet-owt-7be5be79.pth" in found["reason"]["lpips"]
    assert "paired_with" in found["reason"]["psnr"]
    assert set(found["reason"]) == {"lpips", "psnr", "ssim", "lpips_digits"}


def test_absent_extractor_weights_cost_only_the_metrics_that_need_them(run: Path, tmp_path: Path) -> None:
    sources = Sources(lambda: Inception("clean", tmp_path / "absent.pt"), lambda split: Digits(split), "train", None)
    found = Evaluator(every(), sources).score(open_images(run), open_images(run / "pairs"))
    for key in ("fid", "kid", "inception_score", "precision", "accuracy"):
        assert found[key] is None
        assert str(tmp_path / "absent.pt") in found["reason"][key]
    assert found["recall"] is None
    assert found["fid_std"] is None
    assert found["memorisation"] == 0
    assert found["ssim"] > 0.9


def test_unlabelled_images_have_no_accuracy(run: Path) -> None:
    found = Evaluator(every(), digits()).score(open_images(run / "pairs"))
    assert found["accuracy"] is None
    assert "no labels" in found["reason"]["accuracy"]


def test_labels_of_a_zip(tmp_path: Path) -> None:
    import zipfile

    test = Digits("test")
    file = write_png_zip(tmp_path, torch.arange(50), test.images[:50])
    with zipfile.ZipFile(file, "a") as out:
        out.writestr("dataset.json", json.dumps({"labels": [[f"{i:08d}.png", int(test.labels[i])] for i in range(50)]}))
    found = Evaluator({"accuracy": ClassAccuracy()}, digits()).score(open_images(file))
    assert found["accuracy"] >= 0.96


def test_too_few_images_are_a_reason_or_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path, torch.tensor([0]), Digits("test").images[:1])
    metrics: dict[str, Any] = {"fid": FrechetDistance(), "kid": KernelDistance(), "memorisation": Memorisation()}
    found = Evaluator(metrics, digits(reference="train")).score(open_images(tmp_path))
    assert "at least 2 images for a covariance, got 1" in found["reason"]["fid"]
    assert "got 1 images" in found["reason"]["kid"]
    assert "memorisation" not in found["protocol"] or found["memorisation"] is None  # a held-out image: infinite
    with pytest.raises(ValueError, match="at least 2 images for a covariance, got 1"):
        Evaluator(metrics, digits()).score(open_images(tmp_path), strict=True)


def test_images_that_the_features_do_not_take_cost_only_the_metrics_that_need_them(tmp_path: Path) -> None:
    pictures = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_shard(tmp_path / "run/samples", torch.arange(3), pictures)
    write_png_zip(tmp_path / "pairs", torch.arange(3), 255 - pictures)
    metrics: dict[str, Any] = {"fid": FrechetDistance(), "psnr": PSNR()}
    images, pairs = open_images(tmp_path / "run"), open_images(tmp_path / "pairs")
    found = Evaluator(metrics, digits()).score(images, pairs)
    assert found["fid"] is None
    assert "digits features need uint8 images (B, 1, 32, 32)" in found["reason"]["fid"]
    assert found["psnr"] > 0
    with pytest.raises(ValueError, match="digits features need uint8 images"):
        Evaluator(metrics, digits()).score(images, pairs, strict=True)


def test_an_evaluator_can_be_used_again(run: Path) -> None:
    evaluator = Evaluator({"fid": FrechetDistance(bootstrap=0), "psnr": PSNR()}, digits())
    first = evaluator.score(open_images(run))
    second = evaluator.score(open_images(run / "pairs"), open_images(run))
    assert second["psnr"] is None  # infinite
    assert second["fid"] > first["fid"]
    assert evaluator.score(open_images(run)) == first


def test_pairs_that_do_not_match(run: Path, tmp_path: Path) -> None:
    evaluator, images = Evaluator({"psnr": PSNR()}, digits()), Digits("test").images
    write_shard(tmp_path / "few", torch.arange(10), images[:10])
    with pytest.raises(ValueError, match="70 images have 10 pairs"):
        evaluator.score(open_images(run), open_images(tmp_path / "few"))
    write_shard(tmp_path / "small", torch.arange(10), images[:10, :, :16, :16])
    with pytest.raises(ValueError, match=r"images are \(1, 32, 32\), their pairs \(1, 16, 16\)"):
        evaluator.score(open_images(run), open_images(tmp_path / "small"))
    write_shard(tmp_path / "later", torch.arange(1, 11), images[:10])
    with pytest.raises(ValueError, match="no pair is numbered 10, as an image is; name the files alike"):
        evaluator.score(open_images(tmp_path / "later"), open_images(tmp_path / "few"))
