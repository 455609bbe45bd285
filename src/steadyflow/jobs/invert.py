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

from steadyflow.callbacks.inversions import InversionFiles, InversionResults
from steadyflow.callbacks.progress import StepProgress
from steadyflow.callbacks.results import close
from steadyflow.checkpoints import Checkpoint
from steadyflow.data import from_uint8
from steadyflow.data.images import content_hash
from steadyflow.jobs import record
from steadyflow.jobs.pictures import chosen_images, condition_labels
from steadyflow.jobs.sample import check_null, sampler_on
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
    files, source = chosen_images(cfg, instantiate(cfg.dataset) if cfg.images is None else None)
    checkpoint.check(files.shape, source)
    images, index = from_uint8(files.read(files.index)), torch.from_numpy(files.index)
    own = None if files.label is None else torch.from_numpy(files.label)
    label = condition_labels(cfg.label, own, len(images), checkpoint.num_classes)
    check_null(checkpoint, label, cfg.guidance_scale)
    sampler = sampler_on(cfg.sampler, checkpoint)
    module = Inverting(
        checkpoint.denoiser,
        sampler,
        methods,
        images,
        index,
        label,
        cfg.seed,
        batch_size=cfg.batch_size,
        guidance_scale=cfg.guidance_scale,
        num_classes=checkpoint.num_classes,
    )
    inversions = InversionFiles(directory, list(methods))
    protocol = {"sampler": type(sampler).__name__, "steps": getattr(sampler, "steps", None), "images": source}
    results = InversionResults(inversions, protocol | {"checkpoint": checkpoint.name, "batch_size": cfg.batch_size})
    trainer = instantiate(
        cfg.trainer,
        logger=instantiate(cfg.logger) or False,
        callbacks=[results, StepProgress()],
        enable_progress_bar=cfg.trainer.get("enable_progress_bar", sys.stdout.isatty()),
        enable_checkpointing=False,
        inference_mode=False,  # methods differentiate
    )
    inputs = {"checkpoint": checkpoint.sha256, "images": content_hash(images, index)}
    if record.claim(directory, cfg, inputs=inputs, ignore=("batch_size", "checkpoint.running.max_batch")):
        if record.is_first_process():
            inversions.tidy()
        finished = inversions.index()
        module.skip(finished)
        there, all_of_it = sum(map(len, finished.values())), len(images) * len(methods)
        log.info("%s: %d of %d inversions were there already", directory, there, all_of_it)
    try:
        trainer.predict(module, return_predictions=False)
    except FloatingPointError as error:
        raise FloatingPointError(f"{error}; what is finished is kept in {inversions.folder}") from error
    finally:
        close(trainer.loggers)
    if trainer.is_global_zero:
        Console().print(table(list(methods), results.results))
        log.info("%s: grid.png, losses.png, metrics.json, inversions/", directory)
    return results.results


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
