"""`steadyflow invert`: the noise that a sampler turns into given images."""

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor

from steadyflow.callbacks.inversions import InversionFiles, InversionResults
from steadyflow.callbacks.progress import StepProgress
from steadyflow.callbacks.results import close
from steadyflow.checkpoints import Checkpoint
from steadyflow.data import from_uint8, open_images
from steadyflow.data.images import content_hash
from steadyflow.jobs import record
from steadyflow.modules.inversion import Inverting
from steadyflow.tables.outcomes import number

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Inverts the images that are not inverted yet, by every method chosen, and writes

        inversions/METHOD/     npz: latents, images they make, losses, times, curves, by the images' numbers
        grid.png               original | method | method ...
        losses.csv, losses.png the loss of every image against epochs and against time
        metrics.json           loss, minutes_per_image, nfe, psnr, of each method
        run.json               config, versions, git state, hardware, precision; logs/ the logger's

    and prints a table of the methods. A start in the directory of a killed run does what is missing.

    Returns:
        What metrics.json holds.

    Raises:
        ValueError: images that do not fit the checkpoint, a class it does not have, a directory used otherwise.
        FileNotFoundError: no images there.
        FloatingPointError: a loss that is not finite: of which images; what is finished is kept.
    """
    cfg = record.resumed(cfg)
    directory = Path(HydraConfig.get().runtime.output_dir)
    chosen = {str(name): node for name, node in (cfg.method or {}).items() if "_target_" in (node or {})}
    if not chosen:
        raise ValueError("no method is chosen; set method, e.g. method=deq_ddim or method=[naive,deq_ddim]")
    methods = {name: instantiate(node) for name, node in chosen.items()}
    checkpoint: Checkpoint = instantiate(cfg.checkpoint)
    images, index, own, source = target_images(cfg)
    checkpoint.check(images.shape[1:], source)
    own_path = "path" not in cfg.sampler or cfg.sampler.path is not None
    sampler = instantiate(cfg.sampler, **({} if own_path else {"path": checkpoint.path}))
    module = Inverting(
        checkpoint.denoiser,
        sampler,
        methods,
        images,
        index,
        condition_labels(cfg.label, own, len(images), checkpoint.num_classes),
        cfg.seed,
        batch_size=cfg.batch_size,
        guidance_scale=cfg.guidance_scale,
        num_classes=checkpoint.num_classes,
    )
    files = InversionFiles(directory, list(methods))
    protocol = {"sampler": type(sampler).__name__, "steps": getattr(sampler, "steps", None), "images": source}
    results = InversionResults(files, protocol | {"checkpoint": checkpoint.name, "batch_size": cfg.batch_size})
    trainer = instantiate(
        cfg.trainer,
        logger=instantiate(cfg.logger) or False,
        callbacks=[results, StepProgress()],
        enable_progress_bar=cfg.trainer.get("enable_progress_bar", sys.stdout.isatty()),
        enable_checkpointing=False,
        inference_mode=False,  # methods differentiate
    )
    inputs = {"checkpoint": checkpoint.sha256, "images": content_hash(images, index)}
    if record.claim(directory, cfg, inputs=inputs, ignore=("batch_size",)):
        if record.is_first_process():
            files.tidy()
        finished = files.index()
        module.skip(finished)
        there, all_of_it = sum(map(len, finished.values())), len(images) * len(methods)
        log.info("%s: %d of %d inversions were there already", directory, there, all_of_it)
    try:
        trainer.predict(module, return_predictions=False)
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}; what is finished is kept in {files.folder}") from error
    finally:
        close(trainer.loggers)
    if trainer.is_global_zero:
        Console().print(table(list(methods), results.results))
        log.info("%s: grid.png, losses.png, metrics.json, inversions/", directory)
    return results.results


def target_images(cfg: DictConfig) -> tuple[Tensor, Tensor, Tensor | None, str]:
    """The images (N, C, H, W) float32 in [-1, 1], their numbers (N,), their classes (N,) or None, where they are from.

    Raises:
        ValueError: fewer images than asked for, or vectors.
        FileNotFoundError: no images there.
    """
    first, count = cfg.first, cfg.num_images
    if not (isinstance(count, int) and count >= 1 and isinstance(first, int) and first >= 0):
        raise ValueError(f"need num_images >= 1 and first >= 0, got {count} and {first}")
    if cfg.images is None:
        dataset = instantiate(cfg.dataset)
        source = f"{dataset.name} {dataset.split}"
        if len(dataset.shape) != 3:
            raise ValueError(f"{source} holds vectors {tuple(dataset.shape)}; steadyflow invert takes images")
        _check_count(first, count, len(dataset), source)
        items = [dataset[i] for i in range(first, first + count)]
        label = torch.tensor([label for _, label in items]) if dataset.num_classes else None
        return torch.stack([x for x, _ in items]), torch.arange(first, first + count), label, source
    files = open_images(cfg.images)
    _check_count(first, count, len(files), cfg.images)
    order = files.index.argsort()[first : first + count]
    index = torch.from_numpy(files.index[order])
    found = {int(i): x for numbers, batch in files.batches(64) for i, x in zip(numbers, batch, strict=True)}
    label = None if files.label is None else torch.from_numpy(files.label[order])
    return from_uint8(torch.stack([found[int(i)] for i in index])), index, label, str(cfg.images)


def _check_count(first: int, count: int, there: int, source: str) -> None:
    if first + count > there:
        raise ValueError(
            f"{source} has {there} images, too few for {first} to {first + count - 1}; set num_images, first"
        )


def condition_labels(mode: str | int | None, own: Tensor | None, count: int, num_classes: int) -> Tensor | None:
    """The class each image is inverted under, (N,) int64; None where the checkpoint has no classes.

    Args:
        mode: auto (its own, or the null label where it has none), a class, or None (the null label num_classes).
        own: the images' own classes.
        count: N.
        num_classes: of the checkpoint.

    Raises:
        ValueError: an unknown mode, or a class out of range.
    """
    if mode not in ("auto", None) and not (isinstance(mode, int) and not isinstance(mode, bool) and mode >= 0):
        raise ValueError(f"label must be auto, null or a class number; got {mode!r}")
    if num_classes == 0:
        if isinstance(mode, int):
            raise ValueError(f"label={mode}, but this checkpoint has no classes; set label=null")
        return None
    label = torch.full((count,), num_classes if isinstance(mode, str | None) else mode)
    label = own if mode == "auto" and own is not None else label
    if (label > num_classes).any() or (isinstance(mode, int) and mode == num_classes):
        raise ValueError(f"class {int(label.max())}, but this checkpoint's classes are 0..{num_classes - 1}")
    return label


def table(methods: list[str], results: dict[str, Any]) -> Table:
    """A row per method, the columns of Table 3.4 of Pokle 2025 and more."""
    rows = Table("method", "min loss", "minutes per image", "epochs", "NFE", "PSNR", title="inversion")
    for method in methods:
        of = {key.removeprefix(f"{method}/"): value for key, value in results.items() if key.startswith(f"{method}/")}
        psnr = "inf" if of["psnr"] is None else number(of["psnr"])
        minutes, spread = of["minutes_per_image"], of["minutes_per_image_std"]
        minutes = number(minutes, spread if spread and spread > 1e-6 * minutes else None)  # 0: all in one batch
        rows.add_row(method, number(of["loss"], of["loss_std"]), minutes, number(of["epochs"]), number(of["nfe"]), psnr)
    return rows
