"""Two processes give the numbers of one."""

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

from steadyflow.data import InMemoryImages, open_images, write_shard
from steadyflow.metrics import (
    PSNR,
    ClassAccuracy,
    EvaluationMetric,
    Evaluator,
    FeatureExtractor,
    FrechetDistance,
    InceptionScore,
    KernelDistance,
    Memorisation,
    PrecisionRecall,
    Sources,
)


class Quarters(FeatureExtractor):
    """Exact in any batch: the mean grey values of an image's quarters, and three of them as probabilities."""

    name, dim, classes, resize, sha256 = "quarters", 4, 3, "none", "0"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = images.double().unfold(2, 4, 4).unfold(3, 4, 4).mean((1, 4, 5)).flatten(1) / 255
        return features, features[:, :3].softmax(1)


def noise(split: str, count: int = 90) -> InMemoryImages:
    g = torch.Generator().manual_seed(["train", "test"].index(split))
    images = torch.randint(256, (count, 1, 8, 8), generator=g).to(torch.uint8)
    return InMemoryImages("noise", split, images, torch.arange(count) % 3, 3)


def scores(folder: Path, rank: int, world: int) -> dict[str, float]:
    metrics: dict[str, EvaluationMetric] = {
        "fid": FrechetDistance(bootstrap=4),
        "kid": KernelDistance(subsets=4, subset_size=20),
        "inception_score": InceptionScore(splits=3),
        "precision_recall": PrecisionRecall(),
        "accuracy": ClassAccuracy(),
        "memorisation": Memorisation(),
        "psnr": PSNR(),
    }
    sources = Sources(Quarters, noise, "train", None)
    found = Evaluator(metrics, sources, 7).score(open_images(folder / "a"), open_images(folder / "b"), (rank, world))
    assert not found["reason"]
    one = Evaluator({"memorisation": Memorisation()}, sources, 7)  # the second process has no image
    found["single"] = one.score(open_images(folder / "one"), None, (rank, world))["memorisation"]
    # a metric that one process alone cannot have is left out by both, and nobody waits for the other
    alone = Sources(Quarters, noise, "train" if rank == 0 else str(folder / "absent"), None)
    both = {"fid": FrechetDistance(), "accuracy": ClassAccuracy()}
    left = Evaluator(both, alone, 7).score(open_images(folder / "a"), None, (rank, world))
    assert (left["fid"] is None) == (world == 2)
    assert left["accuracy"] == found["accuracy"]
    return {k: v for k, v in found.items() if k not in ("protocol", "reason")}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    init = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    (folder / f"{rank}.json").write_text(json.dumps(scores(folder, rank, 2)))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    drawn = noise("test", 161)  # its first 90 are the held-out images
    write_shard(tmp_path / "a", torch.arange(61), drawn.images[100:], drawn.labels[100:])
    write_shard(tmp_path / "b", torch.arange(61), noise("train", 61).images)
    write_shard(tmp_path / "one", torch.tensor([5]), noise("train", 6).images[5:] // 2)
    expected = scores(tmp_path, 0, 1)
    assert 0.05 < expected["accuracy"] < 0.95
    torch.multiprocessing.spawn(work, (tmp_path,), nprocs=2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert abs(found[key] - value) < 1e-9, key
