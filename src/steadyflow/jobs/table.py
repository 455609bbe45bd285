"""`steadyflow table`: our numbers beside the published ones, and the cells that were missing for it."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Column as RichColumn
from rich.table import Table as RichTable

from steadyflow import cli
from steadyflow.jobs import record
from steadyflow.mistakes import Failed
from steadyflow.tables import outcomes as states
from steadyflow.tables.cells import Cell, Table, files_needed, overrides, read
from steadyflow.tables.outcomes import Outcome
from steadyflow.tables.render import comma_separated, entries, latex, legend, markdown

NOT_RESULTS = "Settings, not results: Pokle 2025, Tables 4.4, 4.7, 4.8, 7.3; definitions: Zhang 2023, Tables 2.1, 6.1."


def run(cfg: DictConfig) -> dict[str, Any] | None:
    """Fills a table: looks its cells up in the store, runs those that are missing, writes table.md, .csv, .tex, .png.
    Before them what they are made from, as a network to train, where that is not finished.

    What cannot be run is said first: the methods that this version does not have, the files to put somewhere. With
    `dry` only the cells are listed, with the time they will take.

    Returns:
        counts of cells by state; None for the list of all tables.

    Raises:
        Failed: a cell failed; the table stands nevertheless.
        ValueError: a table that is not written as tables are, or has no such scale.
    """
    name = str(HydraConfig.get().runtime.choices["table"])
    folders = [Path(s.path) for s in HydraConfig.get().runtime.config_sources if s.schema == "file"]
    options = config_options(folders)
    if name == "all":
        list_tables(folders, options)
        return None
    content: Any = OmegaConf.to_container(cfg["table"], resolve=True)
    table = read(name, content, cfg.scale)
    table = table if cfg.seeds is None else replace(table, seeds=tuple(cfg.seeds))
    console = Console()
    console.print(f"[bold]{table.title}[/] ({name}, scale {table.scale}, {len(table.cells)} cells)", highlight=False)
    make_first(console, table, cfg.dry)

    from steadyflow.jobs.cell_runs import Cells, Missing, Run, forget, one_line, quoted, stale

    checkpoints = Path(cfg.checkpoint_dir).expanduser().resolve()
    extra = overrides(cfg.set)
    if any(word.startswith("data_dir=") for word in HydraConfig.get().overrides.task):
        extra["data_dir"] = quoted(cfg.data_dir)
    cells = Cells(Path(cfg.results_dir).expanduser().resolve(), checkpoints, options, extra)
    found: dict[Cell, Outcome] = {}
    runs: dict[Cell, list[Run]] = {}
    for cell in table.cells:
        if outcome := obstacle(cell, options, checkpoints):
            found[cell] = outcome
            continue
        try:
            runs[cell] = cells.runs(cell, table.seeds)
        except Missing as missing:
            found[cell] = Outcome("missing", note=str(missing))
        except Exception as error:
            found[cell] = Outcome("failed", note=one_line(error))
    tell_obstacles(console, found)

    every = list({run.directory: run for of in runs.values() for run in of}.values())  # in whatever order of words
    old = [run for run in every if run.metrics() is not None and stale([run])]
    waiting = [run for run in every if run.metrics() is None or (cfg.force and run in old)]
    failed: dict[Path, str] = {}
    if cfg.dry:
        if waiting and estimate(every) is None:
            failed = cells.launch(waiting[:1])
            waiting = waiting[len(waiting[:1]) - len(failed) :]
        return tell_plan(console, every, waiting, failed, len(found))
    if waiting:
        console.print(
            f"{len(every) - len(waiting)} of {len(every)} runs stand; {len(waiting)} to run{_soon(waiting, every)}"
        )
        if cfg.force:
            forget([run for run in waiting if run in old])
        failed = cells.launch(waiting)
    for cell, of in runs.items():
        if wrong := [failed[run.directory] for run in of if run.directory in failed]:
            found[cell] = Outcome("failed", note=wrong[0], runs=tuple(str(run.directory) for run in of))
        else:
            metrics = [found_metrics for run in of if (found_metrics := run.metrics()) is not None]
            found[cell] = states.done(cell, metrics, [str(run.directory) for run in of], stale(of))
    if table.relative_to:
        units = {cell.column: outcome for cell, outcome in found.items() if cell.row == table.relative_to}
        found = {
            cell: states.over(outcome, units.get(cell.column, Outcome("absent"))) for cell, outcome in found.items()
        }
    return finish(console, Path(HydraConfig.get().runtime.output_dir) / table.scale, table, found)


def make_first(console: Console, table: Table, dry: bool) -> None:
    """Runs the commands that a table is made from, but those that are finished; one that was killed goes on.

    Raises:
        Failed: a command failed.
    """
    for directory, command in table.first.items():
        if (Path(directory) / "metrics.json").exists():
            continue
        data = [word for word in HydraConfig.get().overrides.task if word.startswith("data_dir=")]
        words = ["steadyflow", *command.split(), f"hydra.run.dir={directory}", *data]
        console.print(f"first: {' '.join(words)}", highlight=False, markup=False, soft_wrap=True)
        if not dry and subprocess.run([sys.executable, "-m", *words]).returncode != 0:
            raise Failed(f"the table is made from {directory}, and '{' '.join(words)}' failed")


def obstacle(cell: Cell, options: dict[str, set[str]], checkpoints: Path) -> Outcome | None:
    """Why a cell cannot be run in this version or without further files, None where nothing is in its way."""
    lacking = [name for name in dict.fromkeys([cell.job, *cell.needs]) if not _there(name, cell, options, checkpoints)]
    files = {name: key for key, name in files_needed(cell)}
    if methods := [name for name in lacking if name not in files]:
        return Outcome("needs", note=f"needs {', '.join(methods)}: not in this version")
    lines = []
    for name in lacking:
        if files[name] == "checkpoint":
            lines.append(
                f"checkpoint {name}: put its directory (model.safetensors, config.yaml) at {checkpoints / name}"
            )
        else:
            lines.append(
                f"dataset {name}: describe it in DIR/dataset/{name}.yaml (as image_folder) and add --config-dir DIR"
            )
    return Outcome("missing", note="; ".join(lines)) if lines else None


def _there(name: str, cell: Cell, options: dict[str, set[str]], checkpoints: Path) -> bool:
    """Whether a need is met: an option of the group that the cell chooses it in (or of any), a job, a checkpoint."""
    for key, value in cell.overrides.items():
        if name in (value, f"{key}_{value}"):
            return value in options.get(key, ()) or (key == "checkpoint" and (checkpoints / value).is_dir())
    return name in options["job"] or any(name in of for of in options.values())


def config_options(folders: list[Path]) -> dict[str, set[str]]:
    """The options of every config group but tables, by group; the jobs there are under `job`."""
    options: dict[str, set[str]] = {"job": {job for job in cli.JOBS if cli.built(job)}}
    for folder in folders:
        for file in folder.glob("*/**/*.yaml"):
            group = file.parent.relative_to(folder).as_posix()
            if group != "table":
                options.setdefault(group, set()).add(file.stem)
    return options


def all_tables(folders: list[Path]) -> Iterator[Table]:
    """Every table, at the scale it has by default.

    Raises:
        ValueError: a file that is no table, by its name.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    files = {file.stem: file for folder in folders for file in sorted(folder.glob("table/*.yaml"))}
    for name, file in sorted(files.items(), key=lambda item: _natural(item[0])):
        if name != "all":
            yield read(name, yaml.load(file.read_text(), Loader=loader))


def list_tables(folders: list[Path], options: dict[str, set[str]]) -> None:
    """Prints all tables: source, cells, and of how many every method is in this version."""
    shown = RichTable(
        RichColumn("table", no_wrap=True), "source", "title", RichColumn("cells", justify="right"), "built"
    )
    checkpoints, cells, ready = Path(os.environ.get("STEADYFLOW_DATA", "~/.cache/steadyflow/data")).expanduser(), 0, 0
    checkpoints = (checkpoints / ".." / "checkpoints").resolve()
    for table in all_tables(folders):
        can = sum(obstacle(cell, options, checkpoints) is None for cell in table.cells)
        cells, ready = cells + len(table.cells), ready + can
        shown.add_row(table.name, table.source, table.title, str(len(table.cells)), str(can))
    console = Console()
    console.print(shown)
    console.print(
        f"{cells} cells, {ready} of which this version can fill where their data and checkpoints are: "
        "steadyflow table table=NAME [scale=mini|full] [dry=true]",
        highlight=False,
        markup=False,
    )
    console.print(NOT_RESULTS, highlight=False)


def tell_obstacles(console: Console, found: dict[Cell, Outcome]) -> None:
    """What cannot be run, before anything is."""
    notes = Counter((outcome.state, outcome.note) for outcome in found.values())
    for (state, note), count in notes.items():
        what = {"missing": "missing ", "failed": "error "}.get(state, "")
        said = f"  {count} cell{'s' * (count > 1)}: {what}{note}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)


def estimate(runs: list[Any]) -> float | None:
    """Seconds per unit of work, from the runs whose time is known."""
    rates = [seconds / run.work for run in runs if (seconds := run.seconds()) is not None]
    return median(rates) if rates else None


def _soon(waiting: list[Any], every: list[Any]) -> str:
    rate = estimate(every)
    return "" if rate is None else f", about {_duration(rate * sum(run.work for run in waiting))} one after another"


def tell_plan(
    console: Console, every: list[Any], waiting: list[Any], failed: dict[Path, str], held_up: int
) -> dict[str, Any]:
    """Lists the runs with the time each takes or will take, and counts the cells that nothing can be run for."""
    rate = estimate(every)
    shown = RichTable("run", "overrides", "state", "seconds")
    for run in every:
        seconds = run.seconds() if run not in waiting else None if rate is None else rate * run.work
        state = failed.get(run.directory) or ("to run" if run in waiting else "stands")
        words = escape(" ".join(run.words))
        shown.add_row(run.directory.name[:8], words, escape(state), "" if seconds is None else f"{seconds:.1f}")
    console.print(shown)
    total = None if rate is None else rate * sum(run.work for run in waiting)
    said = (
        "nothing" if not waiting else "no estimate" if total is None else f"about {_duration(total)}, one after another"
    )
    rest = f"; cells that cannot be run, see above: {held_up}" if held_up else ""
    console.print(f"{len(waiting)} of {len(every)} runs are missing: {said}{rest}")
    return {"runs": len(every), "missing": len(waiting), "seconds": total}


def finish(console: Console, directory: Path, table: Table, found: dict[Cell, Outcome]) -> dict[str, Any]:
    """Writes and prints the table.

    Raises:
        Failed: where a cell failed.
    """
    from steadyflow.tables.picture import draw

    filled = {(cell.row, cell.column): outcome for cell, outcome in found.items()}
    directory.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("md", markdown), ("csv", comma_separated), ("tex", latex)):
        record.write_text(directory / f"table.{suffix}", text(table, filled))
    temporary = directory / f".table.png.{os.getpid()}.tmp"
    draw(temporary, table, filled)
    temporary.replace(directory / "table.png")

    texts, notes = entries(table, filled)
    shown = RichTable("", *table.columns)
    for row in table.rows:
        of = [texts.get((row, column)) for column in table.columns]
        shown.add_row(
            row, *["" if e is None else "\n".join(t for t in (e.ours, e.published, e.difference) if t) for e in of]
        )
    if console.measure(shown).maximum <= console.width:
        console.print(shown)
    else:
        console.print("(the table is wider than this terminal)", highlight=False)
    for line in [
        *legend(table, filled),
        *[f"[{i}] {note}" for i, note in enumerate(notes, 1)],
        str(directory / "table.md"),
    ]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    counts: dict[str, Any] = dict(Counter(outcome.state for outcome in found.values()))
    if counts.get("failed"):
        raise Failed(f"{counts['failed']} of {len(found)} cells failed; their errors stand in {directory / 'table.md'}")
    return counts


def _natural(name: str) -> list[Any]:
    """So that 5_2 comes before 5_10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("_")]


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
