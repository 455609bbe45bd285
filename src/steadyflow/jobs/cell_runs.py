"""The runs behind a table's cells: what each is made by, where it is kept, and how it is run."""

import hashlib
import json
import logging
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.errors import InstantiationException
from hydra.types import HydraContext, RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from steadyflow.jobs import record
from steadyflow.launch import Crash, Task
from steadyflow.mistakes import Mistake, explain
from steadyflow.tables.cells import Cell

log = logging.getLogger(__name__)
OUTSIDE = ("trainer", "logger", "batch_size", "data_dir", "resume", "objective")  # no part of what makes a result
PATHS = ("root", "cache_dir", "file", "path")  # likewise where they are strings: the content's hash is part of it
UNSCORED = ("nfe", "seconds_per_image")  # metrics that need no feature network


@dataclass(frozen=True)
class Run:
    """One run: a cell at a seed.

    Attributes:
        job: that makes it.
        words: its overrides.
        directory: named by its key, so another table with the same cell finds it.
        work: sampling steps, in units of one sample's.
    """

    job: str
    words: tuple[str, ...]
    directory: Path
    work: float

    def metrics(self) -> dict[str, Any] | None:
        """What the run found, None while it is not finished."""
        file = self.directory / "metrics.json"
        return json.loads(file.read_text()) if file.exists() else None

    def seconds(self) -> float | None:
        """How long it took, where that is known."""
        file = self.directory / "cell.json"
        return json.loads(file.read_text())["seconds"] if file.exists() else None


class Missing(Exception):
    """Files that a cell needs: what to put where."""


@dataclass
class CellTask(Task):
    """A cell's job, timed; an error is kept beside what the cell has made."""

    def __call__(self, config: DictConfig) -> Any:
        directory, begin = Path(HydraConfig.get().runtime.output_dir), time.perf_counter()
        (directory / "error.txt").unlink(missing_ok=True)
        try:
            value = super().__call__(config)
        except Exception as error:
            record.write_text(directory / "error.txt", f"{error}\n")
            raise
        record.write_text(directory / "cell.json", json.dumps({"seconds": time.perf_counter() - begin}) + "\n")
        return value


@dataclass
class Cells:
    """The cells of a table: composed, looked up, run.

    Args:
        store: the folder of finished cells.
        checkpoints: the folder of checkpoints that tables name and that have no config.
        options: of every config group, by group.
        extra: overrides of every cell.
    """

    store: Path
    checkpoints: Path
    options: Mapping[str, set[str]]
    extra: Mapping[str, str]
    _hashes: dict[str, str] = field(default_factory=dict, init=False)
    _composed: dict[str, DictConfig] = field(default_factory=dict, init=False)

    def words(self, cell: Cell) -> dict[str, str]:
        """The overrides of a cell; a checkpoint that is a directory instead of a config is loaded from there."""
        words = dict(cell.overrides)
        name = words.get("checkpoint", "")
        if name and name not in self.options.get("checkpoint", ()) and (self.checkpoints / name).is_dir():
            words |= {"checkpoint": "path", "checkpoint.file": quoted(self.checkpoints / name)}
        return words | dict(self.extra)

    def compose(self, cell: Cell) -> DictConfig:
        """The config of a cell."""
        words = self.words(cell)
        text = " ".join([cell.job, *(f"{k}={v}" for k, v in words.items())])
        if text not in self._composed:
            self._composed[text] = compose(cell.job, [f"{k}={v}" for k, v in words.items()])
        return self._composed[text]

    def runs(self, cell: Cell, seeds: Sequence[int]) -> list[Run]:
        """The runs of a cell, one a seed.

        Raises:
            Missing: a dataset, checkpoint or weights of the feature network are not there.
            Exception: the config or what it names is wrong, as raised there.
        """
        words, config = self.words(cell), self.compose(cell)
        inputs = {name: self._hash(name, config) for name in ("dataset", "checkpoint") if name in config}
        found = []
        for seed in seeds:
            with open_dict(config):
                config.seed = seed
            key = digest(cell.job, config, inputs, timed="batch_size" in cell.overrides)
            all_words = tuple(f"{k}={v}" for k, v in (words | {"seed": str(seed)}).items())
            found.append(Run(cell.job, all_words, self.store / cell.job / key[:16], work(config)))
        if cell.metric not in UNSCORED and "features" in config and any(run.metrics() is None for run in found):
            self._hash("features", config)
        return found

    def _hash(self, name: str, config: DictConfig) -> str:
        """The hash of a dataset's content or a checkpoint's weights; that the feature network's weights are there."""
        node = config[name]
        key = name + json.dumps(OmegaConf.to_container(node, resolve=True), default=str, sort_keys=True)
        if key not in self._hashes:
            try:
                made = instantiate(node)
                made = made() if name == "features" else made
            except InstantiationException as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    raise Missing(f"{name}: {error.__cause__}") from error
                raise
            except FileNotFoundError as error:
                raise Missing(f"{name}: {error}") from error
            self._hashes[key] = str(getattr(made, {"dataset": "fingerprint"}.get(name, "sha256"), ""))
        return self._hashes[key]

    def launch(self, runs: Sequence[Run]) -> dict[Path, str]:
        """Runs them through the launcher that was chosen for this command.

        Returns:
            one line about each that failed, by directory.
        """
        failed: dict[Path, str] = {}
        for job in dict.fromkeys(run.job for run in runs):
            failed |= self._launch(job, [run for run in runs if run.job == job])
        return failed

    def _launch(self, job: str, runs: Sequence[Run]) -> dict[Path, str]:
        """Those of one job, which one launcher takes."""
        hydra, own_config = HydraConfig.get(), HydraConfig.instance().cfg
        sources = [s.path for s in hydra.runtime.config_sources if s.provider == "command-line"]
        task = CellTask(job, tuple(word for path in sources for word in ("--config-dir", path)))
        loader = GlobalHydra.instance().config_loader()
        own = [o for o in hydra.overrides.hydra if o.lstrip("+").startswith(("hydra.job_logging", "hydra.verbose"))]
        common = [
            "hydra.mode=MULTIRUN",
            f"hydra.job.name={job}",
            f"hydra.sweep.dir={quoted(self.store / job)}",
        ]
        common += [f"hydra/launcher={hydra.runtime.choices['hydra/launcher']}", *own]
        master = loader.load_configuration(job, common, RunMode.MULTIRUN)
        with open_dict(master):
            master.hydra.launcher = hydra.launcher
        context = HydraContext(config_loader=loader, callbacks=_no_callbacks())
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=master)
        # quoted, as a key may read as a number: 12e400 is no directory inf
        batch = [[*run.words, f"hydra.sweep.subdir={quoted(run.directory.name)}"] for run in runs]
        try:
            results = launcher.launch(batch, initial_job_idx=0)
        finally:
            HydraConfig.instance().cfg = own_config  # launchers put theirs there
        return {
            run.directory: one_line(result._return_value)
            for run, result in zip(runs, results, strict=True)
            if result.status == JobStatus.FAILED
        }


def digest(job: str, config: DictConfig, inputs: Mapping[str, str], timed: bool = False) -> str:
    """What a result is made by, as a sha256: the resolved config without trainer (but its precision), logger, paths and
    batch size, and the hashes of dataset and weights.

    Args:
        timed: the table sets the batch size, because its metric depends on it: a part of the key then.
    """
    outside = [key for key in OUTSIDE if not (timed and key == "batch_size")]
    kept = {}
    for key in (str(name) for name in config if name not in outside):
        node = config[key]  # interpolations of what is left out resolve too
        kept[key] = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    precision = (config.get("trainer") or {}).get("precision")
    whole = {"job": job, "config": _without_paths(kept), "inputs": dict(inputs), "precision": precision}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


def work(config: DictConfig) -> float:
    """The steps of a run, over all its samples."""
    if "max_steps" in config:
        return float(config.max_steps * config.batch_size)
    sampler = config.get("sampler") or {}
    steps = sampler.get("nfe") or sampler.get("steps") or 1
    return float((config.get("num_samples") or config.get("num_images") or 1) * steps)


def stale(runs: Sequence[Run]) -> bool:
    """Whether the package's code has changed between the revision that made any of the runs and today's."""
    return any(
        _changed_since(json.loads(file.read_text())["starts"][-1])
        for r in runs
        if (file := r.directory / "run.json").exists()
    )


def _changed_since(start: dict[str, Any], seen: dict[str, bool] = {}) -> bool:  # noqa: B006 - asks git once a revision
    package = Path(__file__).parents[1]
    revision = (start["git"] or {}).get("revision")
    if revision is None:
        from steadyflow import __version__

        return start["versions"].get("steadyflow") != __version__
    if revision not in seen:
        command = ["git", "-C", str(package), "diff", "--quiet", revision, "HEAD", "--", "."]
        seen[revision] = subprocess.run(command, capture_output=True).returncode != 0
    return seen[revision]


def forget(runs: Sequence[Run]) -> None:
    """Removes the directories of runs that are to be made again."""
    for run in runs:
        if (run.directory / "run.json").exists():
            shutil.rmtree(run.directory)


def one_line(error: BaseException) -> str:
    """One line about why a cell failed."""
    if isinstance(error, Crash):
        lines = str(error).strip().splitlines()
        return lines[-2] if len(lines) > 1 else lines[0]
    if isinstance(error, Mistake):
        return str(error).partition(" (in the run ")[0]
    return explain(error) or f"{type(error).__name__}: {error}".splitlines()[0]


def _without_paths(node: Any) -> Any:
    if isinstance(node, dict):
        return {k: _without_paths(v) for k, v in node.items() if not (k in PATHS and isinstance(v, str))}
    return [_without_paths(v) for v in node] if isinstance(node, list) else node


def quoted(path: str | Path) -> str:
    """A path as a quoted value of an override."""
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _no_callbacks() -> Any:
    from hydra._internal.callbacks import Callbacks

    return Callbacks()
