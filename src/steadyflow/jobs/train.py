"""`steadyflow train`: a network on a dataset, for any path, prediction and loss weight."""

import json
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from steadyflow import checkpoints
from steadyflow.callbacks.last_checkpoint import AtomicCheckpointIO, LastCheckpoint
from steadyflow.diffusions import LinearDiffusion
from steadyflow.jobs import record
from steadyflow.modules.losses import Trainable
from steadyflow.modules.training import DenoiserTraining, TrainingData, learning_rate


def run(cfg: DictConfig) -> dict[str, Any]:
    """Trains, or continues the run that was begun in the same directory, and writes

        checkpoints/last.ckpt   the state to continue from
        model/                  the averaged weights as a checkpoint of this project (`checkpoint=path`)
        metrics.json            final losses, speed, size; csv/ holds the curves

    Returns:
        What metrics.json holds.
    """
    cfg = record.resumed(cfg)
    directory = Path(HydraConfig.get().runtime.output_dir)
    L.seed_everything(cfg.seed, verbose=False)
    train = instantiate(cfg.dataset, split="train")
    held_out = instantiate(cfg.dataset, split="test") if cfg.validate else None
    denoiser = build(cfg, train)
    record.claim(directory, cfg, inputs={"dataset": train.fingerprint}, ignore=("workers", "save_every", "compile"))

    num_classes = classes(denoiser.network)
    if cfg.channels_last:
        denoiser.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if cfg.compile:
        denoiser.network.compile()
    module = DenoiserTraining(
        denoiser,
        instantiate(cfg.times),
        instantiate(cfg.weight),
        instantiate(cfg.optimizer),
        learning_rate(cfg.max_steps, cfg.warmup, cfg.lr_decay),
        num_classes=num_classes,
        label_dropout=cfg.label_dropout,
        seed=cfg.seed,
        channels_last=cfg.channels_last,
    )
    data = TrainingData(
        train,
        held_out,
        batch_size=cfg.batch_size,
        steps=cfg.max_steps,
        seed=cfg.seed,
        workers=cfg.workers,
        flip=cfg.flip,
        variables=denoiser.path.variables if isinstance(denoiser.path, LinearDiffusion) else 1,
    )
    last = directory / "checkpoints" / "last.ckpt"
    keeper = LastCheckpoint(last, cfg.save_every)
    extra = instantiate(cfg.callbacks) or {}
    callbacks = [*([instantiate(cfg.ema)] if cfg.ema else []), *extra.values(), keeper]
    trainer = instantiate(
        cfg.trainer,
        callbacks=callbacks,
        logger=instantiate(cfg.logger) or False,
        plugins=[AtomicCheckpointIO()],
        max_steps=cfg.max_steps,
        max_epochs=1,  # all steps are one pass through TrainingData
        accumulate_grad_batches=cfg.accumulate,
        gradient_clip_val=cfg.clip,
        log_every_n_steps=cfg.log_every,
        val_check_interval=cfg.val_every * cfg.accumulate if held_out is not None else None,
        limit_val_batches=1.0 if held_out is not None else 0,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=str(directory),
    )
    started, first = time.monotonic(), saved_step(last)
    trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    if keeper.interrupted:
        raise KeyboardInterrupt
    seconds = time.monotonic() - started

    state = torch.load(last, map_location="cpu", weights_only=True)  # the averaged weights, where there are any
    module.load_state_dict(state["state_dict"])
    metrics: dict[str, Any] = {
        "steps": cfg.max_steps,
        "parameters": sum(p.numel() for p in denoiser.network.parameters()),
        "train_loss": float(trainer.callback_metrics["train/loss"])
        if "train/loss" in trainer.callback_metrics
        else None,
    }
    if held_out is not None:
        metrics["val_loss"] = trainer.validate(module, datamodule=data, verbose=False)[0]["val/loss"]
    if first < cfg.max_steps:
        metrics["seconds"] = seconds
        metrics["images_per_second"] = (cfg.max_steps - first) * cfg.batch_size / seconds
    if trainer.is_global_zero:
        earlier = directory / "metrics.json"
        if earlier.exists():  # a finished run started again: what it measured then stays
            metrics = json.loads(earlier.read_text()) | {k: v for k, v in metrics.items() if v is not None}
        export(directory, cfg, denoiser, train, metrics)
        record.write_text(earlier, json.dumps(metrics, indent=2) + "\n")
    return metrics


def build(cfg: DictConfig, dataset: Any) -> Trainable:
    """The network in its wrapper, tried on one sample of zeros: untrained, or with the weights of cfg.init.

    Raises:
        ValueError: the network does not fit the dataset's shape or classes, or the weights to begin with.
        FileNotFoundError: no checkpoint there.
    """
    network = instantiate(cfg.network)
    num_classes = classes(network)
    if num_classes not in (0, dataset.num_classes):
        raise ValueError(
            f"the network has {num_classes} classes and the dataset {dataset.name} {dataset.num_classes}; set "
            f"network.num_classes={dataset.num_classes}, or 0 for an unconditional network"
        )
    if cfg.init is not None:
        begin_with(network, cfg.init)
    denoiser: Trainable = instantiate(cfg.prediction, network=network, path=instantiate(cfg.path))
    x, t = torch.zeros(1, *dataset.shape), torch.full((1,), 0.5, dtype=torch.float64)
    x = denoiser.path.lift(x) if isinstance(denoiser.path, LinearDiffusion) else x
    condition = {"label": torch.zeros(1, dtype=torch.int64)} if num_classes else {}
    try:
        with torch.no_grad():
            denoiser.eval().output(x, t, **condition)
    except (ValueError, RuntimeError) as error:
        hint = f", as a state of shape {tuple(x.shape[1:])}" if x.shape[1:] != torch.Size(dataset.shape) else ""
        raise ValueError(
            f"the network does not take the dataset's shape {tuple(dataset.shape)}{hint}: {error}"
        ) from error
    denoiser.train()
    return denoiser


def begin_with(network: nn.Module, init: str) -> None:
    """Takes the weights of a checkpoint, whatever it predicts, on any path: fine-tuning."""
    begun = checkpoints.embedded(init) if init in checkpoints.embedded_names() else checkpoints.load(init)
    try:
        network.load_state_dict(begun.model.get_submodule("network").state_dict())
    except RuntimeError as error:
        line = str(error).splitlines()[1].strip()
        raise ValueError(f"init={init} holds the weights of another network than network=...: {line}") from None


def classes(network: nn.Module) -> int:
    """How many classes a network is conditioned on: its `num_classes`, 0 where it has none."""
    return int(getattr(network, "num_classes", 0))


def saved_step(last: Path) -> int:
    """The optimiser step of a saved run, 0 where there is none."""
    return int(torch.load(last, map_location="cpu", weights_only=True)["global_step"]) if last.exists() else 0


def export(directory: Path, cfg: DictConfig, denoiser: Trainable, dataset: Any, metrics: dict[str, Any]) -> None:
    """Writes model/: the weights, what rebuilds the denoiser, and the card."""
    if cfg.channels_last:
        denoiser.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    starts = json.loads((directory / "run.json").read_text())["starts"]
    git = [f"{g['revision']}{' and uncommitted changes' if g['modified'] else ''}" for s in starts if (g := s["git"])]
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    for key in (*record.IGNORED, "callbacks"):  # where and how it ran, not what it is
        config.pop(key, None)
    card = {
        "trained on": f"{dataset.name} (train split, {len(dataset)} items, fingerprint {dataset.fingerprint})",
        "steps": cfg.max_steps,
        "seed": cfg.seed,
        "git revision": ", then ".join(dict.fromkeys(git)) or None,
        "versions": starts[0]["versions"],
        "metrics": metrics,
        "config": config,
    }
    nodes = {"network": config["network"], "path": config["path"], "denoiser": config["prediction"]}
    checkpoints.save(directory / "model", denoiser.eval(), nodes, dataset.shape, classes(denoiser.network), card)
