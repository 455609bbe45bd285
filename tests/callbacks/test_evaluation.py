"""Scores at the end of a sampling run: of all the files on disk, whoever wrote them."""

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from steadyflow.callbacks.evaluation import Evaluation
from steadyflow.callbacks.samples import SampleFiles, SampleWriter
from steadyflow.data import InMemoryImages, open_images
from steadyflow.denoisers import Gaussian
from steadyflow.grids import Uniform
from steadyflow.metrics import PSNR, EvaluationMetric, FeatureExtractor, FrechetDistance, KernelDistance
from steadyflow.modules.sampling import Sampling
from steadyflow.paths import VariancePreserving
from steadyflow.samplers import DDIM


class Quarters(FeatureExtractor):
    """The mean grey values of an image's quarters."""

    name, dim, classes, resize, sha256 = "quarters", 4, 0, "none", "0"

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return images.double().unfold(2, 4, 4).unfold(3, 4, 4).mean((1, 4, 5)).flatten(1), None


def noise(split: str) -> InMemoryImages:
    images = torch.randint(256, (50, 1, 8, 8), generator=torch.Generator().manual_seed(len(split)))
    return InMemoryImages("noise", split, images.to(torch.uint8))


def evaluation(reference: str = "train", paired_with: Path | None = None) -> Evaluation:
    metrics: dict[str, EvaluationMetric] = {"fid": FrechetDistance(bootstrap=3), "kid": KernelDistance(subsets=3)}
    if paired_with:
        metrics["psnr"] = PSNR()
    return Evaluation(metrics, Quarters, noise, reference, paired_with, cache_dir=None)


def sample(directory: Path, callback: Evaluation, index: Tensor, shape: tuple[int, ...] = (1, 8, 8)) -> None:
    module = Sampling(Gaussian(torch.zeros(shape), 0.1), DDIM(VariancePreserving(), Uniform(), 4), shape, 0, index,
                      batch_size=5)  # fmt: skip
    writer = SampleWriter(SampleFiles(directory, vector=len(shape) == 1))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(accelerator="cpu", callbacks=[writer, callback], enable_checkpointing=False, **quiet).predict(
        module, return_predictions=False
    )


def test_a_resumed_run_scores_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, first, rest = evaluation(), evaluation(), evaluation()
    sample(tmp_path / "whole", whole, torch.arange(20))
    sample(tmp_path / "parts", first, torch.arange(10))
    sample(tmp_path / "parts", rest, torch.arange(10, 20))
    assert whole.results["protocol"]["fid"]["count"] == 20
    assert first.results["protocol"]["fid"]["count"] == 10
    assert rest.results == whole.results
    assert rest.results["fid"] != first.results["fid"]
    again = evaluation().evaluator("cpu").score(open_images(tmp_path / "whole"))
    assert again == whole.results  # the evaluate job's way


def test_pairs(tmp_path: Path) -> None:
    sample(tmp_path / "pairs", evaluation(), torch.arange(6))
    callback = evaluation(paired_with=tmp_path / "pairs")
    sample(tmp_path / "same", callback, torch.arange(6))
    assert callback.results["psnr"] is None
    assert callback.results["reason"] == {"psnr": "psnr is inf"}


def test_a_mistake_costs_no_sampling(tmp_path: Path) -> None:
    (tmp_path / "stats.npz").write_bytes(b"text")
    callback = evaluation(reference=str(tmp_path / "stats.npz"))
    with pytest.raises(ValueError, match="is no npz file"):
        sample(tmp_path / "run", callback, torch.arange(6))
    assert not (tmp_path / "run").exists()


def test_one_sample_is_no_failure(tmp_path: Path) -> None:
    callback = evaluation()
    sample(tmp_path, callback, torch.arange(1))
    assert callback.results["fid"] is callback.results["kid"] is None
    assert "at least 2 images" in callback.results["reason"]["fid"]


def test_vectors_have_no_metrics_of_images(tmp_path: Path) -> None:
    callback = evaluation()
    sample(tmp_path, callback, torch.arange(6), shape=(2,))
    assert callback.results["fid"] is callback.results["kid_std"] is None
    assert callback.results["reason"] == dict.fromkeys(
        ("fid", "kid"), "a metric of images, and the samples are vectors"
    )
