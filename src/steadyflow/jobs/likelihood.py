"""Bits per dimension of images under a checkpoint: what `steadyflow evaluate metrics=nll` and `metrics=elbo` do."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.progress import Progress
from torch import Tensor

from steadyflow.callbacks.evaluation import write_per_image
from steadyflow.checkpoints import Checkpoint
from steadyflow.data.batches import philox
from steadyflow.data.image_writing import whole_file
from steadyflow.data.images import content_hash
from steadyflow.jobs import record
from steadyflow.jobs.pictures import chosen_images, condition_labels
from steadyflow.modules.sampling import DEQUANTISATION, SIGNS
from steadyflow.noise import NoiseSource
from steadyflow.samplers.likelihood import Likelihood, bits_per_dimension
from steadyflow.samplers.variational_bound import VariationalBound

log = logging.getLogger(__name__)
LEVELS = 127.5  # of 8 bits, in a unit of x = level / 127.5 - 1


def score(cfg: DictConfig, directory: Path) -> dict[str, Any]:
    """The mean of -log2 p(x) / D in bits. Of 8-bit images, either their levels' own (the variational bound) or that of
    x = (level + u - 1/2) / 127.5 - 1 with u uniform on [0, 1), keyed by (seed, image): in expectation over u an upper
    bound of the bits that the images take. Vectors are taken as they are, and it is their density's. Writes

        per_image.csv   nll of every image, kept as it goes: killed, it goes on with resume=DIRECTORY
        metrics.json    nll: the mean, nll_std: its standard error

    Raises:
        ValueError: images that do not fit the checkpoint, a class it does not have, a directory used otherwise.
        FloatingPointError: the network returned NaN.
    """
    checkpoint: Checkpoint = instantiate(cfg.checkpoint)
    measure: Likelihood | VariationalBound = instantiate(cfg.likelihood, path=checkpoint.path)
    x, index, label, source = chosen(cfg, checkpoint, measure.dequantised)
    dequantised = measure.dequantised and x.ndim == 4
    file, nll = directory / "per_image.csv", torch.full((len(x),), torch.nan, dtype=torch.float64)
    inputs = {"checkpoint": checkpoint.sha256, "images": content_hash(x, index)}
    if record.claim(directory, cfg, inputs=inputs, ignore=("batch_size", "device")) and file.exists():
        with file.open() as lines:
            found = {int(row["index"]): float(row["nll"]) for row in csv.DictReader(lines)}
        nll = torch.tensor([found.get(int(i), torch.nan) for i in index], dtype=torch.float64)
        log.info("%s: %d of %d images were there already", directory, len(found), len(index))

    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    model = checkpoint.generator.to(device).requires_grad_(False)
    with Progress(transient=True) as bar:
        task = bar.add_task("images", total=len(x))
        for rows in nll.isnan().nonzero()[:, 0].split(cfg.batch_size):
            done, share = int((~nll.isnan()).sum()), len(rows)
            bar.update(task, completed=done)
            if share == 0:
                break

            def advance(fraction: float, done: int = done, share: int = share) -> None:
                bar.update(task, completed=done + fraction * share)

            noise = NoiseSource(cfg.seed, index[rows], checkpoint.shape, device, stream=SIGNS)
            condition = {} if label is None else {"label": label[rows].to(device)}
            log_p = measure(model, x[rows].to(device), noise, progress=advance, **condition).cpu()
            nll[rows] = bits_per_dimension(log_p, x[0].numel(), LEVELS if dequantised else 1.0)
            scored = ~nll.isnan()
            with whole_file(file) as temporary:
                write_per_image(temporary, {"nll": (index[scored], nll[scored])})

    protocol = {"count": len(x), "of": source, "checkpoint": checkpoint.name, "label": cfg.label}
    protocol |= {"dequantisation": "uniform" if dequantised else None, "units": "bits per dimension"}
    protocol |= measure.protocol(x[0].numel())
    error = float(nll.std() / len(nll) ** 0.5) if len(nll) > 1 else None
    results = {"nll": float(nll.mean()), "nll_std": error, "protocol": {"nll": protocol}, "reason": {}}
    record.write_text(directory / "metrics.json", json.dumps(results, indent=2) + "\n")
    log.info("%s", directory / "metrics.json")
    return results


def chosen(cfg: DictConfig, checkpoint: Checkpoint, dequantised: bool) -> tuple[Tensor, Tensor, Tensor | None, str]:
    """What is scored: x (N, *S) float64, images dequantised where asked for, the numbers (N,), classes, the source."""
    dataset = instantiate(cfg.dataset) if cfg.images is None else None
    if dataset is not None and len(dataset.shape) == 1:
        index = torch.arange(cfg.first, min(cfg.first + cfg.num_images, len(dataset)))
        checkpoint.check(dataset.shape, dataset.name)
        return torch.stack([dataset[i][0] for i in index]).double(), index, None, f"{dataset.name} {dataset.split}"
    files, source = chosen_images(cfg, dataset)
    checkpoint.check(files.shape, source)
    index = torch.from_numpy(files.index)
    levels = files.read(files.index).double()
    if dequantised:
        u = [torch.from_numpy(philox(cfg.seed, int(i), DEQUANTISATION).random(files.shape)) for i in files.index]
        levels += torch.stack(u) - 0.5
    own = None if files.label is None else torch.from_numpy(files.label)
    label = condition_labels(cfg.label, own, len(index), checkpoint.num_classes)
    return levels / LEVELS - 1, index, label, source
