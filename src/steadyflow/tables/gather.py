"""Finished runs below a folder as rows of parameters and metrics; pivots of them."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from steadyflow.tables.outcomes import direction, number

Value = str | float | int | bool | None
IGNORED = ("trainer", "logger", "hydra", "resume", "output_dir", "data_dir", "batch_size")  # no parameters of a sweep


@dataclass(frozen=True)
class RunRow:
    """One finished run: its directory and the numbers it found."""

    name: str
    directory: Path
    metrics: dict[str, float]

    @cached_property
    def overrides(self) -> dict[str, Value]:
        """Its own overrides, by key."""
        words = _read(self.directory / ".hydra" / "overrides.yaml") or _record(self.directory).get("overrides") or []
        parts = (str(word).lstrip("+").partition("=") for word in words if not str(word).startswith("~"))
        return {key: _value(text) for key, _, text in parts}

    @cached_property
    def leaves(self) -> dict[str, Value]:
        """All values of its config, by dotted key."""
        record = _record(self.directory)
        return dict(_leaves(record.get("config") or record.get("composed") or {}))

    @cached_property
    def choices(self) -> dict[str, Value]:
        """The option chosen in each config group."""
        hydra = _read(self.directory / ".hydra" / "hydra.yaml") or {}
        return dict(hydra.get("hydra", {}).get("runtime", {}).get("choices", {}))

    def value(self, key: str) -> Value:
        """A parameter: an override, else what the config has there, else the option of that group; else a metric, as
        nfe is. Several keys, comma-separated: their values side by side."""
        if "," in key:
            return " ".join(str(self.value(part)) for part in key.split(","))
        return next((of[key] for of in (self.overrides, self.leaves, self.choices, self.metrics) if key in of), None)


def gather(directory: Path, format: int) -> tuple[list[RunRow], int]:
    """The finished runs below a folder (those with metrics.json), and how many are not finished.

    Args:
        directory: any folder of runs and multiruns.
        format: of run.json, the one this version reads.

    Raises:
        FileNotFoundError: no such folder, or no run there.
        ValueError: a run of another version, or a damaged metrics.json.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"dir={directory}: no such folder; name one that holds runs, e.g. dir=outputs/multirun")
    files = sorted(directory.rglob("metrics.json"), key=lambda file: _natural(file.relative_to(directory)))
    unfinished = sum(not file.with_name("metrics.json").exists() for file in directory.rglob("run.json"))
    if not files:
        state = f"{unfinished} runs are begun below it, none is finished yet" if unfinished else "no run below it"
        raise FileNotFoundError(f"dir={directory}: {state} (a run leaves run.json and, when it ends, metrics.json)")
    rows = []
    for file in files:
        found = _record(file.parent).get("format")
        if found != format:
            said = "no run.json beside metrics.json" if not (file.parent / "run.json").exists() else f"format {found}"
            raise ValueError(
                f"{file.parent} holds a run of an incompatible version ({said}; this one reads format {format}): run "
                "it again, or move it out of the folder"
            )
        try:
            metrics = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is damaged ({error}); remove it and run again") from None
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        name = file.parent.relative_to(directory).as_posix()
        rows.append(RunRow(directory.name if name == "." else name, file.parent, numbers))
    return rows, unfinished


def swept(rows: Sequence[RunRow]) -> list[str]:
    """The parameters in which the runs differ: those that were overridden; where two runs with the same of those differ
    in their configs, also the keys that tell them apart."""
    keys = dict.fromkeys(key for row in rows for key in row.overrides if not _ignored(key))
    names = [key for key in keys if len({str(row.value(key)) for row in rows}) > 1]
    seen: dict[tuple[str, ...], RunRow] = {}
    for row in rows:
        other = seen.setdefault(tuple(str(row.value(key)) for key in names), row)
        here, there = row.leaves, other.leaves
        more = [k for k in here if k in there and str(here[k]) != str(there[k]) and not _ignored(k) and k not in names]
        names += [key for key in more if not any(key.startswith(f"{name}.") for name in names)]
    return names


def metric_names(rows: Iterable[RunRow]) -> list[str]:
    """Every metric that a run has; spreads (X_std of an X) left out."""
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    return [name for name in names if not (name.endswith("_std") and name.removesuffix("_std") in names)]


def best(rows: Sequence[RunRow], metrics: Sequence[str]) -> dict[str, int]:
    """The index of the best row of each metric whose better direction is known, and that differs between rows."""
    found = {}
    for metric in metrics:
        values = {
            i: row.metrics[metric] for i, row in enumerate(rows) if math.isfinite(row.metrics.get(metric, math.nan))
        }
        sign = direction(metric)
        if sign and len(set(values.values())) > 1 and metric != "nfe":
            found[metric] = max(values, key=lambda i: sign * values[i])
    return found


def comma_separated(rows: Sequence[RunRow], parameters: Sequence[str], metrics: Sequence[str]) -> str:
    """A line a run: its parameters, its metrics with their spreads in full, and the metrics it is the best in."""
    spreads = [f"{m}_std" for m in metrics if any(f"{m}_std" in row.metrics for row in rows)]
    tops = best(rows, metrics)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["run", *parameters, *metrics, *spreads, "best_in"])
    for i, row in enumerate(rows):
        top = " ".join(metric for metric, at in tops.items() if at == i)
        values = [row.metrics.get(name, "") for name in (*metrics, *spreads)]
        writer.writerow([row.name, *["" if (v := row.value(key)) is None else v for key in parameters], *values, top])
    return file.getvalue()


def cells(rows: Sequence[RunRow], parameters: Sequence[str], metrics: Sequence[str]) -> list[list[str]]:
    """The rows as text: run, parameters, metrics; the best of each metric in **bold**."""
    tops = best(rows, metrics)
    lines = []
    for i, row in enumerate(rows):
        line = [row.name, *[str(row.value(key)) for key in parameters]]
        for metric in metrics:
            text = number(row.metrics.get(metric), row.metrics.get(f"{metric}_std"))
            line.append(f"**{text}**" if tops.get(metric) == i else text)
        lines.append(line)
    return lines


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], left: int) -> str:
    """A Markdown table whose first `left` columns are text."""
    rule = "|" + "---|" * left + "---:|" * (len(head) - left)
    texts = ["| " + " | ".join(str(word).replace("|", "\\|") for word in line) + " |" for line in (head, *lines)]
    return "\n".join([texts[0], rule, *texts[1:]]) + "\n"


@dataclass(frozen=True)
class Pivot:
    """One metric over two parameters: means and spreads over the runs that share both."""

    metric: str
    row: str
    column: str
    rows: tuple[Value, ...]
    columns: tuple[Value, ...]
    values: dict[tuple[Value, Value], list[float]]

    def mean(self, row: Value, column: Value) -> float | None:
        found = self.values.get((row, column))
        return fmean(found) if found else None

    def spread(self, row: Value, column: Value) -> float | None:
        found = self.values.get((row, column), [])
        return stdev(found) if len(found) > 1 else None

    def cells(self) -> list[list[str]]:
        """As text, the best in **bold**."""
        means = {at: m for at in self.values if (m := self.mean(*at)) is not None and math.isfinite(m)}
        sign = direction(self.metric)
        top = max(means, key=lambda at: sign * means[at]) if sign and means else None
        lines = []
        for row in self.rows:
            line = [str(row)]
            for column in self.columns:
                text = number(self.mean(row, column), self.spread(row, column))
                line.append(f"**{text}**" if (row, column) == top else text)
            lines.append(line)
        return lines


def pivot(rows: Sequence[RunRow], metric: str, row: str, column: str | None) -> Pivot:
    """A metric over the values of one or two parameters (`column` None: a single column)."""
    values: dict[tuple[Value, Value], list[float]] = {}
    for run in rows:
        if metric in run.metrics:
            at = (run.value(row), metric if column is None else run.value(column))
            values.setdefault(at, []).append(run.metrics[metric])
    return Pivot(metric, row, column or "", _ordered(r for r, _ in values), _ordered(c for _, c in values), values)


def _ordered(values: Iterable[Value]) -> tuple[Value, ...]:
    """Each once; numbers by size, everything else as it comes."""
    once = list(dict.fromkeys(values))
    return tuple(sorted(once, key=float)) if all(isinstance(v, int | float) for v in once) else tuple(once)  # type: ignore[arg-type]


def _record(directory: Path) -> dict[str, Any]:
    file = directory / "run.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


def _read(file: Path) -> Any:
    return yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if file.exists() else None


def _value(text: str) -> Value:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:
            return float(value)  # 1e-3, which YAML takes for a word
        except ValueError:
            return value
    return value if isinstance(value, int | float) or value is None else text


def _leaves(node: Any, prefix: str = "") -> Iterable[tuple[str, Value]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}{key}.")
    else:
        yield prefix[:-1], node if isinstance(node, str | int | float | bool | None) else str(node)


def _ignored(key: str) -> bool:
    return any(key == name or key.startswith((f"{name}.", f"{name}/")) for name in IGNORED)


def _natural(path: Path) -> list[tuple[int, int, str]]:
    split: Callable[[str], tuple[int, int, str]] = lambda p: (0, int(p), "") if p.isdigit() else (1, 0, p)  # noqa: E731
    return [split(part) for part in path.parts]
