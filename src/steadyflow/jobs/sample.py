"""`steadyflow sample`: samples of a checkpoint, scored and drawn."""

import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from steadyflow.callbacks.evaluation import Evaluation
from steadyflow.callbacks.progress import StepProgress
from steadyflow.callbacks.results import SampleResults, close
from steadyflow.callbacks.samples import SampleFiles, SampleWriter
from steadyflow.checkpoints import Checkpoint
from steadyflow.data.images import SPLITS
from steadyflow.diffusions import LinearDiffusion
from steadyflow.jobs import record
from steadyflow.modules.sampling import Sampling, class_labels
from steadyflow.noise import STREAM
from steadyflow.samplers.sampler import Sampler

log = logging.getLogger(__name__)
NOTHING = "steadyflow.data.nothing"  # of dataset=none


def run(cfg: DictConfig) -> dict[str, Any]:
    """Makes the samples 0..num_samples-1 that are not there yet and writes

        samples/        npz shards (images uint8 (n, H, W, C), index, label) or, format=png, one zip
        grid.png        the first of them
        metrics.json    fid, kid, nfe, seconds_per_image ... with their protocol
        run.json        config, versions, git state, hardware, precision; logs/ the logger's

    A start in the directory of a killed run makes what is missing, and the files come out the same.

    Returns:
        What metrics.json holds.

    Raises:
        ValueError: a checkpoint that does not fit the dataset or the label asked for, or a directory used otherwise.
        FloatingPointError: a network returned NaN: which samples, at which step, and how many are finished and kept.
    """
    cfg = record.resumed(cfg)
    directory = Path(HydraConfig.get().runtime.output_dir)
    if not (isinstance(cfg.num_samples, int) and cfg.num_samples >= 1):
        raise ValueError(f"num_samples must be at least 1, got {cfg.num_samples}")
    dataset = None if cfg.dataset._target_ == NOTHING else instantiate(cfg.dataset)
    checkpoint: Checkpoint = instantiate(cfg.checkpoint)
    if dataset is not None:
        checkpoint.check(dataset.shape, dataset.name)
    index = torch.arange(cfg.num_samples)
    if isinstance(cfg.classifier, str):
        raise ValueError(
            f"classifier={cfg.classifier} is no group; choose it by +checkpoint@classifier={cfg.classifier}"
        )
    guide: Checkpoint | None = instantiate(cfg.classifier)
    classifier = None if guide is None else guide.classifier
    if guide is not None and guide.shape != checkpoint.shape:
        raise ValueError(
            f"classifier {guide.name} reads images of shape {guide.shape}, but checkpoint {checkpoint.name} makes "
            f"{checkpoint.shape}; choose a classifier trained at its resolution"
        )
    num_classes = checkpoint.num_classes or (guide.num_classes if guide else 0)
    label = class_labels(cfg.label, index, num_classes, cfg.seed)
    check_null(checkpoint, label, cfg.guidance_scale)
    sampler = sampler_on(cfg.sampler, checkpoint)
    if not isinstance(sampler, Sampler):
        raise ValueError(
            f"{type(sampler).__name__} restores images from measurements; use it with steadyflow restore, or choose "
            "another sampler, e.g. sampler=ddim"
        )
    files = SampleFiles(directory, cfg.format, vector=len(checkpoint.shape) == 1)
    module = Sampling(
        checkpoint.generator,
        sampler,
        checkpoint.shape,
        cfg.seed,
        index,
        label,
        batch_size=cfg.batch_size,
        guidance_scale=cfg.guidance_scale,
        num_classes=checkpoint.num_classes,
        classifier=classifier,
        classifier_scale=cfg.classifier_scale,
    )
    draw = partial(
        files.draw,
        columns=num_classes if cfg.label in ("auto", "balanced") and num_classes <= 16 else None,
        reference=torch.stack([dataset[i][0] for i in range(min(len(dataset), 10000))])
        if files.vector and dataset is not None
        else None,
    )
    protocol = {"sampler": type(sampler).__name__, "guidance_scale": cfg.guidance_scale}
    results = SampleResults(files, draw, protocol)
    callbacks = [*(instantiate(cfg.callbacks) or {}).values()]
    if dataset is None:  # scores are kept that compare with a file
        callbacks = [c for c in callbacks if not (isinstance(c, Evaluation) and c.reference in SPLITS)]
    inputs = {"checkpoint": checkpoint.sha256} | ({"classifier": guide.sha256} if guide else {})
    return make(cfg, module, files, [*callbacks, results], inputs, inference_mode=guide is None)


def check_null(checkpoint: Checkpoint, label: torch.Tensor | None, guidance_scale: float) -> None:
    """That a checkpoint is asked without a class only if it was trained for that; a warning where it merely answers.

    Raises:
        ValueError: it has no null label.
    """
    without = label is None or bool((label == checkpoint.num_classes).any()) or guidance_scale != 1
    if not checkpoint.num_classes or not without:
        return
    if not getattr(getattr(checkpoint.model, "network", None), "null_label", True):
        raise ValueError(
            f"checkpoint {checkpoint.name} was trained with a class on every image and has no null label: choose "
            "label=balanced, random or a class, and guidance_scale=1"
        )
    dropout = checkpoint.card.get("label_dropout", (checkpoint.card.get("config") or {}).get("label_dropout"))
    if dropout == 0:
        log.warning(
            "checkpoint %s was trained with a class on every image (label_dropout=0); what it gives without one, as %s "
            "asks, means little",
            checkpoint.name,
            "label=null" if guidance_scale == 1 else f"guidance_scale={guidance_scale:g}",
        )


def sampler_on(node: DictConfig, checkpoint: Checkpoint) -> Any:
    """The sampler of a config on the path it names, or on the checkpoint's where it names none.

    Raises:
        ValueError: a path that is no path, or one named for a checkpoint of a linear diffusion.
    """
    if isinstance(node.get("path"), str):
        raise ValueError(f"sampler.path={node.path} is no path; choose one by path@sampler.path={node.path}")
    own = "path" not in node or node.path is not None
    if own and isinstance(checkpoint.path, LinearDiffusion):
        raise ValueError(
            f"checkpoint {checkpoint.name} is of {type(checkpoint.path).__name__}, a linear diffusion, and sampled on "
            "it alone; choose sampler=gddim, ancestral, euler_maruyama or linear_rk45, with sampler.path=null"
        )
    return instantiate(node, **({} if own else {"path": checkpoint.path}))


def make(
    cfg: DictConfig,
    module: Sampling,
    files: SampleFiles,
    callbacks: list[L.Callback],
    inputs: dict[str, str],
    inference_mode: bool = True,
) -> dict[str, Any]:
    """Makes the samples that are not there yet, scores and draws them.

    Args:
        cfg: logger, trainer, and what run.json records.
        module: all samples of the run.
        files: where to.
        callbacks: the last of them SampleResults.
        inputs: hashes of what the run reads.
        inference_mode: whether nothing is differentiated.

    Returns:
        What metrics.json holds.
    """
    index, results = module.index, callbacks[-1]
    assert isinstance(results, SampleResults)
    label = None if module.label is None else dict(zip(index.tolist(), module.label.tolist(), strict=True))
    trainer = instantiate(
        cfg.trainer,
        logger=instantiate(cfg.logger) or False,
        callbacks=[SampleWriter(files, label), *callbacks, StepProgress()],
        enable_progress_bar=cfg.trainer.get("enable_progress_bar", sys.stdout.isatty()),
        enable_checkpointing=False,
        inference_mode=inference_mode,
    )
    inputs = {**inputs, "noise": STREAM}
    if record.claim(files.directory, cfg, inputs=inputs, ignore=("batch_size", "checkpoint.running.max_batch")):
        if record.is_first_process():
            files.tidy()
        finished = torch.from_numpy(files.index())
        module.skip(finished)
        log.info("%s: %d of %d samples were there already", files.directory, len(finished), len(index))
    try:
        trainer.predict(module, return_predictions=False)
    except FloatingPointError as error:
        kept = f"{len(files.index())} of {len(index)} samples are finished and kept in {files.folder}"
        raise FloatingPointError(f"{error}; {kept}") from error
    finally:
        close(trainer.loggers)
    if trainer.is_global_zero:
        shown = {k: v for k, v in results.results.items() if isinstance(v, float)}
        log.info("%s: %s", files.directory, ", ".join(f"{k} {v:.4g}" for k, v in shown.items()))
    return results.results
