"""steadyflow prepare checkpoint=...: fetches a public checkpoint, converts it, says what it is; lists them all."""

import logging
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from steadyflow.checkpoints import Checkpoint, Public
from steadyflow.checkpoints.checkpoint import PACKAGE
from steadyflow.checkpoints.download import download
from steadyflow.checkpoints.files import CARD, CONFIG, WEIGHTS, save_converted
from steadyflow.checkpoints.formats import convert
from steadyflow.diffusions import LinearDiffusion
from steadyflow.equilibrium import Equilibrium

log = logging.getLogger(__name__)
FACTS = ("architecture", "path", "prediction", "resolution", "classes", "data_range", "fid", "licence", "source")
PUBLIC = "steadyflow.checkpoints.public"


def run(cfg: DictConfig) -> dict[str, Any]:
    """Fetches the files of a public checkpoint that are not there, checks and converts them; with `info` prints what
    the checkpoint is; with `export` writes it to a directory in our form.

    Returns:
        what `facts` found, or the state of each public checkpoint by name.

    Raises:
        FileNotFoundError: a file that cannot be fetched from here; says what to put where.
        ValueError: a file that is truncated or another than it should be, or a checkpoint without weights to export.
    """
    console = Console()
    if HydraConfig.get().runtime.choices["checkpoint"] == "list":
        return list_public(console, cfg.data_dir)
    node = cfg.checkpoint
    if node._target_ == PUBLIC:
        source = public_of(node)
        if cfg.info and not source.converted() and source.missing():  # what is known without its files
            known = {key: source.card.get(key) for key in FACTS} | {"page": source.page}
            later = f"counted once it is here: steadyflow prepare checkpoint={source.name}"
            return show(console, source.name, known | {"its place": next(iter(source.missing())), "parameters": later})
        fetch(source)
    checkpoint: Checkpoint = instantiate(node)
    found = facts(checkpoint)
    show(console, checkpoint.name, found)
    if cfg.export is not None:
        export(node, Path(cfg.export).expanduser())
        console.print(f"{cfg.export}: checkpoint=path checkpoint.file={cfg.export}", soft_wrap=True, highlight=False)
    return found


def public_of(node: DictConfig) -> Public:
    """What a config says of a public checkpoint."""
    about: Any = OmegaConf.to_container(node, resolve=True)
    return Public(**{k: v for k, v in about.items() if k != "running" and not k.startswith("_")})


def fetch(source: Public) -> None:
    """Downloads what is missing of a public checkpoint, and converts it."""
    if source.converted():
        return
    columns = ("[progress.description]{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    bars = [TextColumn(c) if isinstance(c, str) else c for c in columns]
    with Progress(*bars, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        for file, url in source.missing().items():
            if url is not None:
                bar = partial(_advance, progress, progress.add_task(file.name, total=None))
                download(url, file, bar, *source.hashes(file))
    source.prepare()


def _advance(progress: Progress, task: TaskID, have: int, total: int | None) -> None:
    progress.update(task, completed=have, total=total)


def facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint is: parameters, floating-point operations of one call on one image (two a multiply-add), path,
    prediction, shape, classes, hash, and its card.
    """
    network = getattr(checkpoint.model, "network", None)
    shape = " x ".join(map(str, checkpoint.shape))
    found: dict[str, Any] = {
        "model": type(checkpoint.model).__name__,
        "shape": shape,
        "classes": checkpoint.num_classes,
    }
    found["on path"] = f"{type(checkpoint.path).__name__} {_numbers(checkpoint.path)}".strip()
    if isinstance(network, nn.Module):
        found["network"] = type(network).__name__
        found["parameters"] = sum(p.numel() for p in network.parameters())
        found["flops per call"] = flops(network, checkpoint)
    card = {k: v for k, v in checkpoint.card.items() if k in FACTS or k in ("page", "format")}
    published = (checkpoint.card.get("conversion") or {}).get("sha256", {})
    return card | found | {f"sha256 of {k}": v for k, v in published.items()} | {"sha256": checkpoint.sha256}


def flops(network: nn.Module, checkpoint: Checkpoint) -> int:
    """Floating-point operations of the network on one image, counted on tensors without memory.

    An equilibrium network is run, on noise: how often it iterates depends on the numbers.
    """
    shape: tuple[int, ...] = (1, *checkpoint.shape)
    if isinstance(checkpoint.path, LinearDiffusion):
        shape = tuple(checkpoint.path.lift(torch.zeros(shape)).shape)
    first = next(network.parameters())
    device = first.device if any(isinstance(m, Equilibrium) for m in network.modules()) else torch.device("meta")
    state = {k: v.to(device) for k, v in [*network.named_parameters(), *network.named_buffers()]}
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, first.dtype)
    t = torch.ones(1, device=device)
    label = {"label": torch.zeros(1, dtype=torch.int64, device=device)} if checkpoint.num_classes else {}
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter does not know the CPU's fused attention
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        torch.func.functional_call(network, state, (x, t), label)
    return counter.get_total_flops()


def export(node: DictConfig, directory: Path) -> None:
    """Writes a checkpoint in our form.

    Raises:
        ValueError: one that has no weights.
    """
    about: Any = OmegaConf.to_container(node, resolve=True)
    if about["_target_"] == "steadyflow.checkpoints.load" and about["format"] is not None:
        save_converted(directory, convert(about["file"], about["format"], about["arguments"]))
        return
    if about["_target_"] == PUBLIC:
        source = public_of(node).directory
    elif "file" in about:
        source = Path(about["file"]).expanduser()
        source = source if (source / CONFIG).is_file() else source / "model"
    elif about["_target_"] == "steadyflow.checkpoints.embedded":
        source = PACKAGE / about["name"]
    else:
        raise ValueError(f"{about['_target_']} makes no checkpoint of weights: there is nothing to export")
    directory.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, CARD, CONFIG):
        if (source / name).is_file():
            temporary = directory / f".{name}.part"
            shutil.copyfile(source / name, temporary)
            temporary.replace(directory / name)


def all_public(data_dir: str) -> Iterator[Public]:
    """Every public checkpoint among the configs, by name."""
    hydra = HydraConfig.get()
    folders = [Path(s.path) for s in hydra.runtime.config_sources if s.schema == "file"]
    for file in sorted(file for folder in folders for file in folder.glob("checkpoint/*.yaml")):
        about = yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if about.get("_target_") == PUBLIC:
            about["folder"] = about["folder"].replace("${data_dir}", data_dir)
            yield Public(**{k: v for k, v in about.items() if k != "defaults" and not k.startswith("_")})


def list_public(console: Console, data_dir: str) -> dict[str, Any]:
    """Prints the public checkpoints: what each is, and whether it is here."""
    table = Table(title="public checkpoints: checkpoint=NAME", title_justify="left", box=None, pad_edge=False)
    for column in ("name", "size", "classes", "path", "FID", "licence", "here"):
        table.add_column(column, no_wrap=True)
    states = {}
    for source in all_public(data_dir):
        if source.converted():
            state = "yes"
        elif not source.missing():
            state = "files"
        else:
            state = "fetch" if source.url else "by hand"
        states[source.name] = state
        cells = (source.card.get(key) for key in ("resolution", "classes", "path", "fid", "licence"))
        table.add_row(source.name, *("" if cell is None else str(cell) for cell in cells), state)
    Console(width=max(console.width, 100)).print(table)
    console.print(
        "here: yes, converted; files, converted at first use; fetch, `prepare checkpoint=NAME` does; by hand, it says "
        "where to put what",
        highlight=False,
    )
    return states


def show(console: Console, title: str, found: dict[str, Any]) -> dict[str, Any]:
    """Prints facts as a table."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # an address or a hash is whole or useless
    for key, value in found.items():
        text = f"{value:,}" if isinstance(value, int) and key != "sha256" else value
        table.add_row(key, "" if text is None else str(text))
    console.print(table)
    return found


def _numbers(path: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in vars(path).items() if not k.startswith("_") and isinstance(v, int | float))
