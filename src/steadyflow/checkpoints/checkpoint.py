"""What a checkpoint is once loaded, those that ship with the package, and the exact one of a dataset."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from steadyflow.checkpoints.files import assembled, load_parts
from steadyflow.checkpoints.formats import convert, format_names, looks_like
from steadyflow.checkpoints.nodes import nearest
from steadyflow.checkpoints.running import Running
from steadyflow.data.images import content_of
from steadyflow.denoisers import (
    Denoiser,
    Empirical,
    GaussianMixture,
    MixtureNoise,
    NetworkClassifier,
    NoiseModel,
    Photographs,
)
from steadyflow.diffusions import LinearDiffusion
from steadyflow.paths import GaussianPath

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Checkpoint:
    """A denoiser and what one has to know to use it.

    Attributes:
        name: what to call it: the embedded name, or the directory it came from.
        model: in eval mode, a denoiser; of a linear diffusion a noise model; or a classifier of noisy samples.
        path: the path it was trained on, and is sampled on unless the sampler names another.
        shape: S of one sample, (C, H, W) or (D,).
        num_classes: 0 without labels; else label num_classes is the null label.
        sha256: of the weights; of an exact denoiser, of the dataset's fingerprint and the path.
        card: how it was made: config, seed, steps, git revision, metrics.
    """

    name: str
    model: Denoiser | NoiseModel | NetworkClassifier
    path: GaussianPath | LinearDiffusion
    shape: tuple[int, ...]
    num_classes: int
    sha256: str
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def denoiser(self) -> Denoiser:
        """The model where it is a denoiser.

        Raises:
            ValueError: it is one of a linear diffusion, or a classifier.
        """
        if not isinstance(self.generator, Denoiser):
            raise ValueError(
                f"checkpoint {self.name} is of {type(self.path).__name__}, a linear diffusion, and has no denoiser "
                "D(x, alpha, sigma); it can be sampled: steadyflow sample sampler=gddim"
            )
        return self.generator

    @property
    def generator(self) -> Denoiser | NoiseModel:
        """The model where it can be sampled.

        Raises:
            ValueError: it is a classifier.
        """
        if isinstance(self.model, NetworkClassifier):
            raise ValueError(
                f"checkpoint {self.name} is a classifier, and makes no samples; it guides those of another: "
                f"+checkpoint@classifier=..."
            )
        return self.model

    @property
    def classifier(self) -> NetworkClassifier:
        """The model where it is a classifier.

        Raises:
            ValueError: it is none.
        """
        if not isinstance(self.model, NetworkClassifier):
            raise ValueError(f"checkpoint {self.name} is no classifier, but {type(self.model).__name__}")
        return self.model

    def check(self, shape: Sequence[int], dataset: str) -> None:
        """That this checkpoint makes samples of a dataset's shape.

        Raises:
            ValueError: it does not.
        """
        if tuple(shape) != self.shape:
            raise ValueError(
                f"checkpoint {self.name} makes samples of shape {self.shape}, but dataset {dataset} has "
                f"{tuple(shape)}; choose the dataset it was trained on, another checkpoint, or (to sample) dataset=none"
            )


def load(
    file: str | Path,
    sha256: str | None = None,
    trusted: str | Sequence[str] = (),
    format: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    running: Running | None = None,
) -> Checkpoint:
    """A checkpoint from its directory, or of another project's format; no code of the file's is run.

    The weights are mapped, not copied: a float32 network takes the memory of its file once, page by page as it is used.

    Args:
        file: the directory (model.safetensors, config.yaml, card.md), or a train run's, whose model/ is taken; with
            `format` the file of that format.
        sha256: what the weights' hash must be, beyond agreeing with config.yaml.
        trusted: module prefixes, beyond this package's networks, paths and denoisers, whose classes may be built.
        format, arguments: of another project's file; see `formats`.
        running: precision, memory and speed of the network; None as it is.

    Raises:
        FileNotFoundError: the directory or one of its files is missing.
        ValueError: a file is truncated, edited or of another kind: which, with the hash expected and found, or the
            nearest right name.
    """
    place = Path(file).expanduser()
    if format is None:
        if place.is_file():
            like = looks_like(place)
            hint = f"it looks like format={like}" if like else f"format= is one of {', '.join(format_names())}"
            raise ValueError(f"{place} is a file of another project's; say of which format: {hint}")
        prefixes = (trusted,) if isinstance(trusted, str) else tuple(trusted)
        parts = load_parts(place, sha256, prefixes)
    else:
        made = convert(place, format, arguments or {})
        found = content_of(place)
        if sha256 is not None and found != sha256:
            raise ValueError(f"{place} is truncated or edited: the caller expects sha256 {sha256}, found {found}")
        model = assembled(made.nodes, made.state, f"{place} as {format}", weights=str(place))
        parts = (model, model.path, made.shape, made.num_classes, found, dict(made.card))
    if running is not None:
        if not isinstance(running, Running):
            raise ValueError(
                f"no way to run a network: {running!r}; choose checkpoint/running=plain or cuda, or an entry"
            )
        running(parts[0].network)
    return Checkpoint(str(file), *parts)


def embedded_names() -> list[str]:
    """The checkpoints that ship with the package."""
    return sorted(p.parent.name for p in PACKAGE.glob("*/config.yaml"))


def embedded(name: str, running: Running | None = None) -> Checkpoint:
    """A checkpoint that ships with the package.

    Args:
        running: see `load`.

    Raises:
        ValueError: no such name; says which there are. And as `load`.
    """
    names = embedded_names()
    if name not in names:
        there = f"there are {', '.join(names)}" if names else "this installation has none"
        raise ValueError(f"no embedded checkpoint {name!r}: {there}{nearest(name, names)}")
    return replace(load(PACKAGE / name, running=running), name=name)


class Dataset(Protocol):
    """What `analytic` asks of a dataset."""

    name: str
    shape: tuple[int, ...]
    num_classes: int
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


def analytic(dataset: Dataset, path: GaussianPath | LinearDiffusion) -> Checkpoint:
    """The exact denoiser of a dataset: no network, no error of training.

    A dataset with `means`, `covariances` and `weights` is the Gaussian mixture itself; any other is the empirical
    distribution of its items, per class where it has classes, whose samples are the items themselves: what a network
    that memorised them perfectly would do. On a linear diffusion: mixtures of isotropic Gaussians alone.

    Raises:
        ValueError: an empty dataset, or one with a class that no item has; or a linear diffusion and another dataset.
    """
    denoiser: Denoiser | NoiseModel
    if isinstance(path, LinearDiffusion):
        denoiser, num_classes, kind = _exact_noise(dataset, path), 0, "Gaussian mixture"
    elif all(hasattr(dataset, name) for name in ("means", "covariances", "weights")):
        denoiser, num_classes = GaussianMixture(dataset.means, dataset.covariances, dataset.weights), 0  # type: ignore[attr-defined]
        kind = "Gaussian mixture"
    else:
        if len(dataset) == 0:
            raise ValueError(f"dataset {dataset.name} is empty: it has no exact denoiser")
        items = [dataset[i] for i in range(len(dataset))]
        num_classes = dataset.num_classes
        labels = torch.tensor([label for _, label in items]) if num_classes else None
        denoiser = Empirical(torch.stack([x for x, _ in items]), labels)
        kind = "empirical distribution"
    arguments = {k: v for k, v in vars(path).items() if isinstance(v, int | float)}
    identity = f"{kind} {dataset.fingerprint} {type(path).__name__} {arguments}"
    sha256 = hashlib.sha256(identity.encode()).hexdigest()
    card = {"exact denoiser of": f"{dataset.name} ({kind}, {len(dataset)} items)", "fingerprint": dataset.fingerprint}
    name = f"analytic ({dataset.name})"
    return Checkpoint(name, denoiser.eval(), path, tuple(dataset.shape), num_classes, sha256, card)


def photographs(height: int, width: int, channels: int, path: GaussianPath) -> Checkpoint:
    """The exact denoiser of a Gaussian law with the spectrum of photographs, see `denoisers.Photographs`.

    Raises:
        ValueError: channels that are not 1 or 3.
    """
    shape = (channels, height, width)
    sha256 = hashlib.sha256(f"photographs {shape} {type(path).__name__}".encode()).hexdigest()
    return Checkpoint("photographs", Photographs(shape).eval(), path, shape, 0, sha256)


def _exact_noise(dataset: Any, path: LinearDiffusion) -> MixtureNoise:
    covariances = getattr(dataset, "covariances", None)
    if covariances is None or covariances.ndim != 2 or bool((covariances != covariances[:, :1]).any()):
        raise ValueError(
            f"on {type(path).__name__}, checkpoint=analytic takes mixtures of isotropic Gaussians, not {dataset.name}; "
            "choose dataset=gaussian_mixture"
        )
    return MixtureNoise(path, dataset.means, covariances[:, 0], dataset.weights)
