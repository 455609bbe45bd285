"""steadyflow prepare dataset=... or checkpoint=...: fetches it, checks all of it, and says what it is."""

from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.utils.data import DataLoader

from steadyflow.data import Shards, write_shards
from steadyflow.data.images import SPLITS
from steadyflow.jobs import prepare_checkpoint


def run(cfg: DictConfig) -> dict[str, Any]:
    """Downloads the dataset where its class can (`download(root)`), writes it as shards if `shards=DIR` says where,
    checks every item of both splits, prints a table. A checkpoint instead: see `prepare_checkpoint`.

    Returns:
        what `check` found, by split.

    Raises:
        FileNotFoundError: not there and not to be fetched; says what to put where.
        ValueError: files or items that are not what they should be.
    """
    if "checkpoint" in cfg:
        return prepare_checkpoint.run(cfg)
    source = get_object(cfg.dataset._target_)
    if hasattr(source, "download"):
        source.download(cfg.dataset.root)
    found, notes = {}, []
    for split in sorted(SPLITS, key=lambda split: split != cfg.dataset.split):
        try:
            dataset = instantiate(cfg.dataset, split=split)
        except InstantiationException as error:
            if split == cfg.dataset.split or not isinstance(error.__cause__, FileNotFoundError):
                raise
            notes.append(f"no {split} split: {error.__cause__}")
            continue
        if cfg.shards is not None:
            dataset = sharded(dataset, cfg.shards, cfg.batch_size, cfg.workers)
        found[split] = check(dataset, cfg.batch_size, cfg.workers)
    if cfg.shards is not None:
        notes.append(f"{cfg.shards} holds it as arrays: dataset=shards dataset.path={cfg.shards}")
    console = Console()
    console.print(_table(found))
    for note in notes:
        console.print(note, soft_wrap=True, highlight=False)  # to be copied whole
    return found


def sharded(dataset: Any, path: str, batch_size: int = 256, workers: int = 0) -> Shards:
    """The dataset as `steadyflow.data.write_shards` writes it to `path`, or goes on writing it."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"writing {dataset.name} {dataset.split}", total=len(dataset))
        for done in write_shards(dataset, path, batch_size, workers):
            progress.update(task, completed=done)
    return Shards(path, dataset.split)


def check(dataset: Any, batch_size: int = 256, workers: int = 0) -> dict[str, Any]:
    """Reads every item of a dataset.

    Returns:
        name, count, shape, num_classes, class_counts (a list, empty if unlabelled), min, max, mean, std (of all
        numbers, in the units of the items), fingerprint.

    Raises:
        ValueError: an item of another shape, not finite, an image beyond [-1, 1], a label that is no class.
    """
    counts = torch.zeros(max(dataset.num_classes, 1), dtype=torch.int64)
    low, high, total, square, numbers, first = float("inf"), -float("inf"), 0.0, 0.0, 0, 0
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"reading {dataset.name} {dataset.split}", total=len(dataset))
        for x, label in DataLoader(dataset, batch_size, num_workers=workers):
            where = f"{dataset.name} {dataset.split}, items {first} to {first + len(x) - 1}"
            if tuple(x.shape[1:]) != dataset.shape or not x.isfinite().all():
                raise ValueError(f"{where}: expected finite {dataset.shape}, got shape {tuple(x.shape[1:])} or a NaN")
            if len(dataset.shape) == 3 and x.abs().max() > 1:
                raise ValueError(f"{where}: images must lie in [-1, 1], got up to {x.abs().max():.4g}")
            if label.min() < 0 or label.max() >= len(counts):
                raise ValueError(f"{where}: label {int(label.max())} of {dataset.num_classes} classes")
            counts += torch.bincount(label, minlength=len(counts))
            low, high = min(low, x.min().item()), max(high, x.max().item())
            x = x.double()
            total, square, numbers = total + x.sum().item(), square + x.square().sum().item(), numbers + x.numel()
            first += len(x)
            progress.update(task, completed=first)
    mean = total / numbers
    return {
        "name": dataset.name,
        "count": first,
        "shape": list(dataset.shape),
        "num_classes": dataset.num_classes,
        "class_counts": counts.tolist() if dataset.num_classes else [],
        "min": low,
        "max": high,
        "mean": mean,
        "std": (square / numbers - mean**2) ** 0.5,
        "fingerprint": dataset.fingerprint,
    }


def _table(found: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=next(iter(found.values()))["name"], title_justify="left")
    table.add_column("")
    for split in found:
        table.add_column(split, overflow="fold")
    for key, text in [
        ("items", lambda f: str(f["count"])),
        ("shape", lambda f: " x ".join(map(str, f["shape"]))),
        ("classes", lambda f: str(f["num_classes"] or "none")),
        ("per class", lambda f: _counts(f["class_counts"])),
        ("range", lambda f: f"{f['min']:.4g} to {f['max']:.4g}"),
        ("mean, std", lambda f: f"{f['mean']:.4g}, {f['std']:.4g}"),
        ("fingerprint", lambda f: f["fingerprint"]),
    ]:
        table.add_row(key, *[text(f) for f in found.values()])
    return table


def _counts(counts: list[int]) -> str:
    return ", ".join(map(str, counts)) if len(counts) <= 20 else f"{min(counts)} to {max(counts)}"
