"""References: what is kept, when it is made anew, and which files of statistics are read."""

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from steadyflow.data import Digits, InMemoryImages, write_shard
from steadyflow.metrics import FeatureExtractor, Sources


class Pixels(FeatureExtractor):
    """Mean grey value of the four quarters of an image; counts the images it has seen."""

    name, dim, classes, resize = "pixels", 4, 0, "none"

    def __init__(self, sha256: str = "0"):
        super().__init__()
        self.sha256, self.seen = sha256, 0

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        self.seen += len(images)
        return torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).mean(1).flatten(1), None


def grey(split: str, count: int = 100, seed: int = 0) -> InMemoryImages:
    g = torch.Generator().manual_seed(seed)
    return InMemoryImages("grey", split, torch.randint(256, (count, 1, 8, 8), generator=g).to(torch.uint8))


def sources(cache: Path | None, reference: str = "train", extractor: Pixels | None = None, **data: int) -> Sources:
    extractor = extractor or Pixels()
    return Sources(lambda: extractor, lambda split: grey(split, **data), reference, cache, batch_size=32)


def test_the_gaussian_of_a_split(tmp_path: Path) -> None:
    features = Pixels()(grey("train").images)[0].double().numpy()
    for cache in (None, tmp_path, tmp_path):  # in memory, made, read
        reference = sources(cache).reference
        assert reference.name == "grey train"
        assert reference.count == 100
        assert np.abs(reference.mean.numpy() - features.mean(0)).max() < 1e-12
        assert np.abs(reference.covariance.numpy() - np.cov(features, rowvar=False)).max() < 1e-10
        assert np.array_equal(reference.features.numpy(), features.astype(np.float32))


def test_features_are_extracted_once_for_each_content_and_each_extractor(tmp_path: Path) -> None:
    def seen(sha256: str = "0", **data: int) -> int:
        extractor = Pixels(sha256)
        _ = sources(tmp_path, extractor=extractor, **data).reference.features
        return extractor.seen

    assert seen() == 100
    assert seen() == 0
    assert seen(seed=1) == 100  # other images
    assert seen(sha256="1") == 100  # other weights
    assert seen() == 0
    assert len(list(tmp_path.iterdir())) == 3
    assert sources(None).cache_dir is None


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    _ = sources(tmp_path).reference
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"{file} is no npz file, or a damaged one .* remove it"):
        _ = sources(tmp_path).reference


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        reference = sources(tmp_path / "file" / "stats").reference
    assert "reference statistics are not kept" in caplog.text
    assert reference.features.shape == (100, 4)


def test_statistics_files(tmp_path: Path) -> None:
    """The arrays of clean-fid, EDM and pytorch-fid: mu and sigma."""
    mu, sigma = np.arange(4.0), np.eye(4) * 2
    np.savez(tmp_path / "edm.npz", mu=mu, sigma=sigma)
    reference = sources(None, str(tmp_path / "edm.npz")).reference
    assert torch.equal(reference.mean, torch.from_numpy(mu))
    assert torch.equal(reference.covariance, torch.from_numpy(sigma))
    assert reference.count is None
    with pytest.raises(FileNotFoundError, match="holds a mean and a covariance only"):
        _ = reference.features
    np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="statistics of 3 features, pixels has 4"):
        _ = sources(None, str(tmp_path / "other.npz")).reference
    (tmp_path / "no.npz").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"no\.npz is no npz file"):
        _ = sources(None, str(tmp_path / "no.npz")).reference


def test_other_files_of_statistics(tmp_path: Path) -> None:
    """clean-fid's features for KID; the reference batches of ADM, whose Gaussian is of more images than they hold."""
    features = Pixels()(grey("train").images)[0]
    np.savez(tmp_path / "cifar10_clean_train_32_kid.npz", feats=features.numpy())
    reference = sources(None, str(tmp_path / "cifar10_clean_train_32_kid.npz")).reference
    assert torch.equal(reference.features, features)
    assert torch.allclose(reference.covariance, sources(None).reference.covariance, rtol=1e-12)
    mu, sigma = np.arange(4.0), np.eye(4) * 2
    images = grey("train").images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "VIRTUAL_grey.npz", arr_0=images, mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
    reference = sources(None, str(tmp_path / "VIRTUAL_grey.npz")).reference
    assert torch.equal(reference.mean, torch.from_numpy(mu))
    assert torch.equal(reference.covariance, torch.from_numpy(sigma))
    assert torch.equal(reference.features, features)


def test_statistics_of_edm2(tmp_path: Path) -> None:
    """A pickle of plain arrays is read as data; one that would run something is refused by the name of it."""
    mu, sigma = np.arange(4.0), np.eye(4) * 2
    stats = {"num_images": 9, "fid": {"mu": mu, "sigma": sigma}, "fd_dinov2": {"mu": np.zeros(7), "sigma": np.eye(7)}}
    (tmp_path / "img64.pkl").write_bytes(pickle.dumps(stats))
    reference = sources(None, str(tmp_path / "img64.pkl")).reference
    assert torch.equal(reference.mean, torch.from_numpy(mu))
    assert torch.equal(reference.covariance, torch.from_numpy(sigma))
    for found, message in [
        ({"fid": stats["fd_dinov2"]}, "statistics of 7 features, pixels has 4"),
        ({"fd_dinov2": stats["fd_dinov2"]}, "holds fd_dinov2; expected `fid` with mu and sigma"),
        ([1, 2], "holds list; expected `fid`"),
        ({"fid": Touch()}, "Path"),
    ]:
        (tmp_path / "bad.pkl").write_bytes(pickle.dumps(found))
        with pytest.raises(ValueError, match=message):
            _ = sources(None, str(tmp_path / "bad.pkl")).reference


class Touch:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path, ("ran",))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(4), "sigma": np.eye(3)}, "statistics of 3 features, pixels has 4"),
        ({"mu": np.zeros(()), "sigma": np.eye(4)}, "statistics of 0 features, pixels has 4"),
        (
            {"feats": np.zeros((9, 5))},
            "statistics of 5 features, pixels has 4; choose the features they were made with",
        ),
        ({"mu": np.full(4, np.nan), "sigma": np.eye(4)}, "damaged: its numbers are not finite"),
        ({"mu": np.zeros(4), "sigma": np.eye(4) + np.eye(4, k=1)}, "sigma is not symmetric"),
        ({"mean": np.zeros(4)}, r"has the arrays mean; expected mu and sigma .*feats .* or images"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"s\.npz .*{message}"):
        _ = sources(None, str(tmp_path / "s.npz")).reference


def test_images_as_a_reference_are_kept_by_their_content(tmp_path: Path) -> None:
    images = grey("train").images
    write_shard(tmp_path / "a/samples", torch.arange(60), images[:60])
    write_shard(tmp_path / "a/samples", torch.arange(60, 100), images[60:])
    extractor, kept = Pixels(), tmp_path / "kept"
    reference = sources(kept, str(tmp_path / "a"), extractor).reference
    assert reference.name == "a"
    assert torch.allclose(reference.mean, sources(None).reference.mean, rtol=1e-12)
    assert sources(kept, str(tmp_path / "a"), extractor).reference.count == 100
    assert extractor.seen == 100
    (tmp_path / "a/samples/00000060.npz").unlink()
    assert sources(kept, str(tmp_path / "a"), extractor).reference.count == 60


def test_a_split_is_read_whether_or_not_it_is_held_in_memory() -> None:
    class Streamed:
        """Digits without `images`."""

        def __init__(self) -> None:
            self.data = Digits("test")
            self.name, self.split, self.fingerprint = "digits", "test", self.data.fingerprint

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return self.data[i]

    held = Sources(Pixels, lambda split: Digits(split), "test", None)
    streamed = Sources(Pixels, lambda split: Streamed(), "test", None, batch_size=33)
    assert torch.equal(held.images("test"), streamed.images("test"))
    assert torch.equal(held.reference.features, streamed.reference.features)


def test_too_few_images() -> None:
    with pytest.raises(ValueError, match="the reference grey train needs at least 2 images for a covariance, has 1"):
        _ = sources(None, count=1).reference
    with pytest.raises(ValueError, match="pixels features come without class probabilities"):
        sources(None).classifier()
