"""A table as a config: rows and columns are overrides of a job, beside the values its source printed."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
WORKS = {
    "000": "Pokle 2025",  # Deep Equilibrium Models and Diffusion Models in Practice, thesis, CMU-ML-25-100
    "001": "Zhang 2023",  # Learning, Sampling and Inference with Stochastic Differential Equations, Georgia Tech
    "002": "Fast Samplers for Inverse Problems",  # in Iterative Refinement Models: C-PiGDM
}
KEYS = {"title", "source", "job", "notes", "set", "needs", "first", "scale", "seeds", "factor"}  # of a table
KEYS |= {"columns", "rows", "published", "relative_to"}
PARTS = {"rows": {"set", "needs", "where", "scale"}, "columns": {"set", "needs", "metric", "factor", "job"}}


@dataclass(frozen=True)
class Published:
    """A printed value.

    Attributes:
        text: as printed; "" where the source has no value.
        value, spread: the number and what stands behind +-, None where there is none.
        bound: "<=" or ">" where the source prints a bound instead of a number.
    """

    text: str = ""
    value: float | None = None
    spread: float | None = None
    bound: str = ""


@dataclass(frozen=True)
class Cell:
    """One number of a table: the overrides of the run that makes it, and which of the run's metrics it is.

    Attributes:
        row, column: labels.
        job: that makes the run.
        overrides: by key, without the seed.
        metric: a key of the run's metrics.json.
        factor: what that is multiplied by, to be in the units of the source.
        needs: names (of options, jobs, files) without which it cannot be run.
        published: the source's value.
    """

    row: str
    column: str
    job: str
    overrides: Mapping[str, str] = field(hash=False)
    metric: str
    factor: float
    needs: tuple[str, ...]
    published: Published

    @property
    def text(self) -> str:
        """The overrides as on a command line."""
        return " ".join(f"{key}={value}" for key, value in self.overrides.items())


@dataclass(frozen=True)
class Table:
    """A table at one scale.

    Attributes:
        rows, columns: what each label is made of: those of the groups around it and its own.
        cells: those there are, row by row; they need not form a product.
        first: the runs that the cells are made from, by directory, each a command.
        relative_to: the row by whose number, in each column, the numbers are divided; "" for none.
    """

    name: str
    title: str
    source: str
    scale: str
    seeds: tuple[int, ...]
    rows: Mapping[str, tuple[str, ...]]
    columns: Mapping[str, tuple[str, ...]]
    cells: tuple[Cell, ...]
    notes: str
    first: Mapping[str, str]
    relative_to: str

    @property
    def comparable(self) -> bool:
        """Whether our numbers are of the source's datasets and checkpoints, so that a difference means something."""
        return self.scale == "full"


def published(value: Any) -> Published:
    """A printed value as it is typed in a table: a number, null, "a +- b", "<= a" or "> a".

    Raises:
        ValueError: anything else.
    """
    if value is None:
        return Published()
    text = str(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Published(text, float(value))
    if found := re.fullmatch(rf"({NUMBER}) \+- ({NUMBER})", text):
        return Published(text, float(found[1]), float(found[2]))
    if found := re.fullmatch(rf"(<=|>) ({NUMBER})", text):
        return Published(text, float(found[2]), bound=found[1])
    raise ValueError(f"published value {text!r}: expected a number, null, 'a +- b', '<= a', '> a' or none")


def read(name: str, config: Mapping[str, Any], scale: str | None = None) -> Table:
    """A table of its config.

        title: ...                            source: {work: "000", table: "3.1"}, or any text
        job: sample                           set, needs: of every cell; a column may have a job of its own
        columns: {LABEL: {metric: fid, set: "sampler=ddim", needs: [...], factor: 1}}
        rows: {LABEL: {set: "sampler.steps=10", needs: [...], where: {SR: "sampler.weight=1"}}}
        published: {ROW: [a value for each column; `none` where the source has no such cell]}, or null
        scale: {mini: "dataset=digits checkpoint=digits32 num_samples=256"}      further overrides, by scale;
                                              also {set: ..., needs: [...], first: {...}}; and in a row, of that row
        seeds: [0, 1, 2]                      of each cell, [0] without
        relative_to: ROW                      each number over that of its column in this row
        first: {outputs/net: "train +experiment=..."}     runs that the cells read, as commands without hydra.run.dir; a
                                              scale's own in their place

    A row (a column) that holds `rows` (`columns`) is a group of them. What it says holds for all of them, and their
    labels begin with its own, as in `published`; groups of the same rows share them by YAML's anchors:

        rows:
          SR x8:
            set: task=sr8
            rows:
              PiGDM: {set: "sampler=pigdm sampler.eta=1", rows: &nfe {NFE 5: {set: sampler.steps=5}, ...}}
              DDNM: {set: sampler=ddnm, rows: *nfe}                 "SR x8, PiGDM, NFE 5", ..., "SR x8, DDNM, NFE 5"

    `set` holds overrides as on a command line, `where` those of a row in the columns whose label begins so. Where
    several name one key, the scale's wins over the row's, that over the column's, and that over the table's, and a
    row's over that of its group; a need that is only the value of an override that lost is none.

    Args:
        name: the config's.
        config: its content.
        scale: one of `scale`, or full (without overrides where it is not among them); None for mini where there is
            one, else full.

    Raises:
        ValueError: a key that a table, a row or a column does not have, a missing one, two rows of one label, another
            number of published values than columns, a `where` without such a column, or a scale that the table does
            not have.
    """
    wrong = sorted(set(config) - KEYS) + [
        f"no {key}" for key in ("title", "job", "columns", "rows") if key not in config
    ]
    if wrong:
        raise ValueError(f"table {name}: {', '.join(wrong)}; a table has the keys {', '.join(sorted(KEYS))}")
    scales: Mapping[str, Any] = {"full": ""} | dict(config.get("scale") or {})
    chosen = scale or ("mini" if "mini" in scales else "full")
    if chosen not in scales:
        raise ValueError(f"table {name} has no scale {chosen!r}; it has {', '.join(scales)}")
    rows, columns = ungrouped(name, "rows", config["rows"]), ungrouped(name, "columns", config["columns"])
    for column, (_, c) in columns.items():
        if "metric" not in c:
            raise ValueError(
                f"table {name}, column {column}: no metric; a column is {{metric: fid, set: sampler=ddim}}"
            )
    values = {
        str(row): of for row, of in (config.get("published") or dict.fromkeys(rows, [None] * len(columns))).items()
    }
    relative_to = str(config.get("relative_to") or "")
    if relative_to and relative_to not in rows:
        raise ValueError(f"table {name}: relative_to says {relative_to}, and no row is called so")
    if list(values) != list(rows):
        raise ValueError(f"table {name}: the rows of `published` must be those of `rows`, in their order")
    further = scales[chosen] if isinstance(scales[chosen], Mapping) else {"set": scales[chosen]}
    common, first = overrides(str(further.get("set") or "")), further.get("first", config.get("first"))
    cells = []
    for row, (_, r) in rows.items():
        extra = common | overrides(r["scale"].get(chosen, ""))
        if nowhere := [k for k in r["where"] if not any(column.startswith(k) for column in columns)]:
            raise ValueError(f"table {name}, row {row}: no column begins with {nowhere[0]!r}")
        if len(values[row]) != len(columns):
            raise ValueError(f"table {name}, row {row}: {len(values[row])} published values for {len(columns)} columns")
        for (column, (_, c)), value in zip(columns.items(), values[row], strict=True):
            if value == "none":
                continue
            own = (
                overrides(str(config.get("set") or ""))
                | overrides(c["set"])
                | overrides(r["set"])
                | overrides(" ".join(words for k, words in r["where"].items() if column.startswith(k)))
            )
            needs = dict.fromkeys([*_names(config), *r["needs"], *c["needs"]])
            for key, lost in own.items():
                if key in extra and extra[key] != lost:
                    needs.pop(lost, None)
            needs |= dict.fromkeys(_names(further))
            factor = float(c.get("factor") or config.get("factor") or 1)
            job = str(c.get("job") or config["job"])
            cells.append(Cell(row, column, job, own | extra, c["metric"], factor, tuple(needs), published(value)))
    return Table(
        name,
        str(config["title"]),
        _source(config.get("source")),
        chosen,
        tuple(config.get("seeds") or [0]),
        {row: labels for row, (labels, _) in rows.items()},
        {column: labels for column, (labels, _) in columns.items()},
        tuple(cells),
        str(config.get("notes") or "").strip(),
        {str(directory): str(command) for directory, command in (first or {}).items()},
        relative_to,
    )


def ungrouped(name: str, kind: str, content: Any) -> dict[str, tuple[tuple[str, ...], dict[str, Any]]]:
    """The rows (columns) of a table by label, in order: the labels it is made of, and what it says after its groups.

    Raises:
        ValueError: what is no row (column) and no group of them; two of one label.
    """
    found: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {}

    def take(parts: Any, above: tuple[str, ...], outer: Mapping[str, Any]) -> None:
        place = f"table {name}, {kind} of {', '.join(above)}" if above else f"table {name}, {kind}"
        if not isinstance(parts, Mapping) or not parts:
            raise ValueError(f"{place}: expected {{LABEL: {{set: key=value}}, ...}}, found {parts!r}")
        for own, part in parts.items():
            if wrong := sorted(set(part) - PARTS[kind] - {kind}) if isinstance(part, Mapping) else [repr(part)]:
                keys = ", ".join(sorted(PARTS[kind] | {kind}))
                raise ValueError(f"{place}, {own}: found {', '.join(wrong)}, expected the keys {keys}")
            labels, whole = (*above, str(own)), _within(outer, part)
            if kind in part:
                take(whole.pop(kind), labels, whole)
            elif (label := ", ".join(labels)) in found:
                raise ValueError(f"{place}: {label} is there twice")
            else:
                found[label] = (labels, whole)

    take(content, (), {})
    return found


def _within(outer: Mapping[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
    """What a row or column says together with its group: the words of both, of the rest its own."""
    whole = {**outer, **part, "needs": [*_names(outer), *_names(part)]}
    whole["set"] = " ".join(str(of["set"]) for of in (outer, part) if of.get("set"))
    for key in ("where", "scale"):
        both = [of.get(key) or {} for of in (outer, part)]
        whole[key] = {k: " ".join(str(of[k]) for of in both if of.get(k)) for k in {**both[0], **both[1]}}
    return whole


def overrides(text: str) -> dict[str, str]:
    """'a=1 b=2' by key.

    Raises:
        ValueError: a word without `=`.
    """
    words = text.split()
    if wrong := [word for word in words if "=" not in word]:
        raise ValueError(f"{wrong[0]!r} in {text!r} is no override (key=value)")
    return dict(word.split("=", 1) for word in words)


def files_needed(cell: Cell) -> Iterator[tuple[str, str]]:
    """(key, name) of the needs that are files rather than methods: a dataset, a checkpoint."""
    for key in ("dataset", "checkpoint"):
        if (name := cell.overrides.get(key)) in cell.needs and name is not None:
            yield key, name


def _names(part: Mapping[str, Any]) -> list[str]:
    needs = part.get("needs") or []
    return [needs] if isinstance(needs, str) else [str(name) for name in needs]


def _source(source: Any) -> str:
    if not isinstance(source, Mapping):
        return str(source or "")
    place = ", ".join(
        f"{'Fig.' if k == 'figure' else str(k).capitalize()} {v}" for k, v in source.items() if k != "work"
    )
    return f"{WORKS.get(str(source.get('work')), source.get('work'))}, {place}"
