"""What images are compared with: the features of a data set, or statistics from a file; computed once and kept."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from steadyflow.checkpoints.pickles import read_state
from steadyflow.data import open_images, to_uint8
from steadyflow.data.image_writing import whole_file
from steadyflow.data.images import content_of
from steadyflow.data.npz import Npz
from steadyflow.metrics.extractor import FeatureExtractor

log = logging.getLogger(__name__)
STATISTICS = Path("~/.cache/steadyflow/stats")  # where reference statistics are kept by default


class ImageSet(Protocol):
    """What a reference needs of a data set; item i is (x in [-1, 1] (C, H, W), label)."""

    name: str
    split: str
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class Reference:
    """Features (N, d) of the images compared with, and the Gaussian fitted to them.

    Attributes: `name` for messages and protocols; `mean` (d,) and `covariance` (d, d), unbiased, float64; `count` N, or
    None where a file does not say.
    """

    def __init__(
        self,
        name: str,
        mean: Tensor,
        covariance: Tensor,
        count: int | None,
        features: Callable[[], Tensor] | None = None,
    ):
        self.name, self.mean, self.covariance, self.count = name, mean, covariance, count
        self._load = features

    @cached_property
    def features(self) -> Tensor:
        """(N, d) float32. Raises FileNotFoundError where only the Gaussian is known."""
        if self._load is None:
            raise FileNotFoundError(
                f"{self.name} holds a mean and a covariance only, enough for fid; other metrics need features: give "
                "the images themselves as the reference"
            )
        return self._load()


class Sources:
    """Where metrics take what they compare with. Everything is loaded when first asked for.

    Args:
        features: makes the extractor.
        dataset: makes a split of the data set, called as dataset(split="train").
        reference: `train` or `test`, a split of the data set; or the path of statistics: an npz of `mu` and `sigma`
            (clean-fid, EDM, pytorch-fid, pytorch-gan-metrics; a reference batch of Dhariwal & Nichol 2021, whose images
            give the features) or of `feats` (clean-fid's for KID), or a pkl of EDM2 (`fid`); or of images (folder, zip,
            npz, run).
        cache_dir: where features of references are kept, by content; None keeps none.
        batch_size: of the extraction. device: the extractor's.
    """

    def __init__(
        self,
        features: Callable[[], FeatureExtractor],
        dataset: Callable[..., Any],
        reference: str | os.PathLike[str] = "train",
        cache_dir: str | os.PathLike[str] | None = STATISTICS,
        batch_size: int = 64,
        device: torch.device | str = "cpu",
    ):
        self._features, self._dataset, self._reference = features, dataset, reference
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.batch_size, self.device = batch_size, torch.device(device)

    @cached_property
    def extractor(self) -> FeatureExtractor:
        """The feature extractor, on the device. Raises FileNotFoundError without its weights."""
        return self._features().to(self.device)

    def classifier(self) -> None:
        """Raises ValueError unless the extractor gives class probabilities."""
        if not self.extractor.classes:
            raise ValueError(f"{self.extractor.name} features come without class probabilities; choose other features")

    def dataset(self, split: str) -> Any:
        """A split of the data set."""
        return self._dataset(split=split)

    def images(self, split: str) -> Tensor:
        """All images of a split, uint8 (N, C, H, W)."""
        return torch.cat(list(batches_of(self.dataset(split), 1024)))

    @cached_property
    def reference(self) -> Reference:
        """The reference with this extractor's features."""
        if self._reference in ("train", "test"):
            data = self.dataset(str(self._reference))
            name, content = f"{data.name} {data.split}", data.fingerprint
            return self._cached(name, content, lambda: batches_of(data, self.batch_size))
        path = Path(self._reference).expanduser()
        if path.suffix == ".npz" and path.is_file():
            with Npz(path) as arrays:
                if statistics := self._from_statistics(path, arrays):
                    return statistics
        if path.suffix == ".pkl" and path.is_file():
            return self._from_pickle(path)
        return self._from_images(path)

    def _from_pickle(self, path: Path) -> Reference:
        """EDM2's statistics, {fid: {mu, sigma}, ...}, without running what a pickle may hold."""
        found = read_state(path)
        fid = found.get("fid") if isinstance(found, Mapping) else None
        reference = self._from_statistics(path, fid) if isinstance(fid, Mapping) else None
        if reference is None:
            keys = ", ".join(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
            raise ValueError(f"{path} holds {keys}; expected `fid` with mu and sigma")
        return reference

    def _from_images(self, path: Path) -> Reference:
        files = open_images(path)
        return self._cached(
            path.name, content_of(path), lambda: (images for _, images in files.batches(self.batch_size))
        )

    def _from_statistics(self, path: Path, arrays: Mapping[str, Any]) -> Reference | None:
        """The reference of an npz, or None if it holds images alone. Raises ValueError for other statistics."""
        names, dim = set(arrays), self.extractor.dim
        if {"mu", "sigma"} <= names:
            mu, sigma = (np.asarray(arrays[key], np.float64) for key in ("mu", "sigma"))
            self._check_dim(path, mu.shape, (dim,), bool(np.isfinite(mu).all() and np.isfinite(sigma).all()))
            self._check_dim(path, sigma.shape, (dim, dim), bool(np.allclose(sigma, sigma.T, 1e-4, 1e-6)))
            load = (lambda: self._from_images(path).features) if "arr_0" in names else None
            return Reference(path.name, torch.from_numpy(mu), torch.from_numpy(sigma), None, load)
        if "feats" in names:
            features = np.asarray(arrays["feats"], np.float32)
            self._check_dim(path, features.shape, (len(features), dim), bool(np.isfinite(features).all()))
            return fitted(path.name, torch.from_numpy(features))
        if not names & {"images", "arr_0"}:
            raise ValueError(
                f"{path} has the arrays {', '.join(arrays)}; expected mu and sigma (statistics), feats "
                "(features) or images"
            )
        return None

    def _check_dim(self, path: Path, found: tuple[int, ...], expected: tuple[int, ...], sound: bool) -> None:
        if tuple(found) != expected:
            raise ValueError(
                f"{path} holds statistics of {found[-1] if found else 0} features, {self.extractor.name} has "
                f"{self.extractor.dim}; choose the features they were made with"
            )
        if not sound:
            raise ValueError(f"{path} is damaged: its numbers are not finite, or sigma is not symmetric")

    def _cached(self, name: str, content: str, batches: Callable[[], Iterator[Tensor]]) -> Reference:
        """The reference from its file in the cache, made first where it is missing."""
        extractor = self.extractor
        key = hashlib.sha256(f"1 {content} {extractor.sha256} {extractor.resize}".encode()).hexdigest()
        file = self.cache_dir and self.cache_dir / f"{extractor.name}-{extractor.resize}-{key[:24]}.npz"
        if file is None or not file.is_file():
            features = self._extract(batches())
            if file is None or not save(file, features):
                return fitted(name, features)
            del features  # read back by whoever needs more than the Gaussian
        with Npz(file, "; remove it, it will be made again") as arrays:
            mean, covariance = torch.from_numpy(arrays["mean"]), torch.from_numpy(arrays["covariance"])
            return Reference(name, mean, covariance, int(arrays["count"]), lambda: read_features(file))

    @torch.no_grad()
    def _extract(self, batches: Iterator[Tensor]) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return torch.cat([self.extractor(images.to(self.device))[0].float().cpu() for images in batches])


def fitted(name: str, features: Tensor) -> Reference:
    """The reference of features (N, d) in memory. Raises ValueError for fewer than 2."""
    if len(features) < 2:
        raise ValueError(f"the reference {name} needs at least 2 images for a covariance, has {len(features)}")
    mean, covariance = gaussian(features)
    return Reference(name, mean, covariance, len(features), lambda: features)


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) in float64 of features (N, d), read in blocks."""
    blocks = features.split(4096)
    mean = torch.stack([block.double().sum(0) for block in blocks]).sum(0) / len(features)
    covariance = mean.new_zeros(len(mean), len(mean))
    for block in blocks:
        centred = block.double() - mean
        covariance += centred.T @ centred
    return mean, covariance / (len(features) - 1)


def save(file: Path, features: Tensor) -> bool:
    """Writes features and their Gaussian, whole or not at all; False where the folder cannot be written to."""
    reference = fitted(file.name, features)
    arrays = {"mean": reference.mean, "covariance": reference.covariance, "features": features}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as temporary, temporary.open("wb") as out:
            np.savez(out, count=len(features), **{name: array.numpy() for name, array in arrays.items()})  # type: ignore[arg-type]
    except OSError as error:
        log.warning("reference statistics are not kept: cannot write %s (%s)", file, error.strerror)
        return False
    return True


def read_features(file: Path) -> Tensor:
    """The features of a file in the cache."""
    with Npz(file) as arrays:
        return torch.from_numpy(arrays["features"])


def batches_of(data: ImageSet, batch_size: int) -> Iterator[Tensor]:
    """The images of a data set, uint8 (B, C, H, W)."""
    held = getattr(data, "images", None)  # image sets that fit in memory
    for start in range(0, len(data), batch_size):
        if isinstance(held, Tensor):
            yield held[start : start + batch_size]
        else:
            items = range(start, min(start + batch_size, len(data)))
            yield to_uint8(torch.stack([data[i][0] for i in items]))
