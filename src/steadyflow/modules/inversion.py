"""Inversion under Lightning's Trainer: which images a process inverts by which method, and how a batch of them is."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor

from steadyflow.denoisers import CountedDenoiser, Denoiser
from steadyflow.inversion import Inversion, Inverter
from steadyflow.inversion.chain import squared_distance
from steadyflow.modules.sampling import guided
from steadyflow.noise import NoiseSource
from steadyflow.samplers.sampler import Progress, Sampler


class Work(NamedTuple):
    """One method on one batch: its name, and the places (n,) int64 of the images among those of the run."""

    method: str
    rows: Tensor


class Inverted(NamedTuple):
    """A finished batch on the CPU: the method's name, the images' places (n,), and what it found.

    `image` (n, C, H, W) is what the latents stand for, `loss` (n,) float64 its squared distance to the target, `nfe`
    the forward evaluations of the network for an image: backward passes and the making of `image` are not counted.
    """

    method: str
    rows: Tensor
    found: Inversion | None
    image: Tensor
    loss: Tensor
    nfe: float


class WorkList:
    """This process's share of what is to be done: every world-th batch from the rank-th on.

    Never empty: a process without a share gets one batch of no images, so that the hooks at the end, where processes
    wait for each other, run everywhere.
    """

    def __init__(self, work: list[Work], rank: int = 0, world: int = 1):
        self.work = work[rank::world] or [Work("", torch.empty(0, dtype=torch.int64))]

    def __len__(self) -> int:
        return len(self.work)

    def __iter__(self) -> Iterator[Work]:
        return iter(self.work)


class Inverting(L.LightningModule):
    """Inverts images by one or several methods, in batches; image i's search starts at the noise of (seed, i).

    Args:
        denoiser: of the checkpoint; its parameters no longer require gradients afterwards.
        sampler: to invert.
        methods: by name.
        images: (N, C, H, W) float32 in [-1, 1].
        index: (N,) int64, the images' numbers, which key their noise.
        label: (N,) their classes, or None.
        seed: >= 0.
        batch_size: images a process inverts at a time.
        guidance_scale: w of classifier-free guidance; 1 is the conditional denoiser itself.
        num_classes: of the checkpoint; the null label of the guidance.

    Attributes: `progress`, called with the fraction of the batch done.

    Raises:
        ValueError: batch_size < 1, a negative seed, or guidance without classes to guide to.
        FloatingPointError: from a method, naming the images.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        methods: Mapping[str, Inverter],
        images: Tensor,
        index: Tensor,
        label: Tensor | None,
        seed: int,
        *,
        batch_size: int,
        guidance_scale: float = 1.0,
        num_classes: int = 0,
    ):
        super().__init__()
        NoiseSource(seed, index[:1], images.shape[1:])  # raises for a seed that cannot be
        if not (isinstance(batch_size, int) and batch_size >= 1):
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.denoiser = CountedDenoiser(denoiser.requires_grad_(False))
        self.guided = guided(self.denoiser, guidance_scale, label, num_classes)
        self.sampler, self.methods = sampler, dict(methods)
        self.images, self.index, self.label, self.seed = images, index, label, int(seed)
        self.progress: Progress | None = None
        places = torch.arange(len(index)).split(batch_size)
        self.work = [Work(method, rows) for rows in places for method in methods]

    def skip(self, finished: Mapping[str, Tensor]) -> None:
        """Leaves out the images of these numbers, by method."""
        left = [(w, ~torch.isin(self.index[w.rows], finished[w.method])) for w in self.work]
        self.work = [Work(w.method, w.rows[missing]) for w, missing in left if missing.any()]

    def predict_dataloader(self) -> WorkList:
        return WorkList(self.work, self.trainer.global_rank, self.trainer.world_size)

    def predict_step(self, batch: Work, batch_idx: int) -> Inverted:
        """Inverts one batch by one method."""
        rows = batch.rows.cpu()
        if len(rows) == 0:
            return Inverted(batch.method, rows, None, torch.empty(0), torch.empty(0), 0.0)
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        noise = NoiseSource(self.seed, self.index[rows], self.images.shape[1:], self.device, dtype)
        target = self.images[rows].to(self.device, dtype)
        condition = {} if self.label is None else {"label": self.label[rows].to(self.device)}
        method, before = self.methods[batch.method], self.denoiser.rows
        try:
            found = method(self.guided, self.sampler, target, noise, progress=self.progress, **condition)
            nfe = (self.denoiser.rows - before) / len(rows)
            image = method.image(self.guided, self.sampler, found.latent, noise, **condition)
        except FloatingPointError as error:
            named = f"{batch.method}, images {self.index[rows].min()} to {self.index[rows].max()}"
            raise FloatingPointError(f"{named}: {error}") from None
        found = Inversion(**{name: value.cpu() for name, value in vars(found).items()})
        return Inverted(batch.method, rows, found, image.cpu(), squared_distance(image, target).cpu(), nfe)
