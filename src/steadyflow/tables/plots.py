"""Metrics of a sweep as pictures: lines over a parameter, heat maps over two."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from steadyflow.tables.gather import Pivot, Value
from steadyflow.tables.outcomes import direction, number


def lines(file: Path, table: Pivot) -> None:
    """Writes a PNG: the metric against the row parameter, one line for each value of the column parameter; bars are
    standard deviations over the runs that share both. Axes are logarithmic where the numbers span over two decades."""
    figure = Figure(figsize=(6.4, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    numeric = all(isinstance(x, int | float) for x in table.rows)
    for column in table.columns:
        xs = [x for x in table.rows if table.mean(x, column) is not None]
        where = [float(x) for x in xs] if numeric else [float(table.rows.index(x)) for x in xs]  # type: ignore[arg-type]
        means = [table.mean(x, column) for x in xs]
        spreads = [table.spread(x, column) or 0.0 for x in xs]
        label = f"{_short(table.column)} {column}" if table.column and isinstance(column, int | float) else str(column)
        axes.errorbar(where, means, spreads if any(spreads) else None, marker="o", ms=4, lw=1.4, capsize=3, label=label)  # type: ignore[arg-type]
    if not numeric:
        axes.set_xticks(range(len(table.rows)), [str(x) for x in table.rows])
    values = [v for found in table.values.values() for v in found if math.isfinite(v)]
    if values and min(values) > 0 and max(values) > 100 * min(values):
        axes.set_yscale("log")
    if numeric and len(table.rows) > 2 and min(table.rows) > 0 and max(table.rows) > 100 * min(table.rows):  # type: ignore[type-var,operator]
        axes.set_xscale("log")
    elif numeric and all(isinstance(x, int) for x in table.rows):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=table.row, ylabel=_titled(table.metric))
    axes.grid(alpha=0.3)
    if table.column:
        axes.legend(frameon=False)
    figure.savefig(file, format="png")


def heat_map(file: Path, table: Pivot) -> None:
    """Writes a PNG: the means as colours and numbers (dark is better where that is known), rows downwards."""
    values = np.array([[_number(table, r, c) for c in table.columns] for r in table.rows], dtype=float)
    texts = [[number(table.mean(r, c), table.spread(r, c)) for c in table.columns] for r in table.rows]
    longest = max(len(text) for line in texts for text in line)
    labels = [str(r) for r in table.rows]
    width = 1.6 + 0.09 * max(map(len, labels)) + max(0.85, 0.1 * longest) * len(table.columns)
    figure = Figure(figsize=(max(width, 4.2), 1.4 + 0.55 * len(table.rows)), dpi=130, layout="constrained")
    axes = figure.subplots()
    colours = "viridis" if direction(table.metric) < 0 else "viridis_r"
    image = axes.imshow(values, cmap=colours, aspect="auto")
    axes.set_xticks(range(len(table.columns)), [str(c) for c in table.columns])
    axes.set_yticks(range(len(table.rows)), labels)
    axes.set(xlabel=table.column, ylabel=table.row, title=_titled(table.metric))
    for i, line in enumerate(texts):
        for j, text in enumerate(line):
            red, green, blue, _ = image.cmap(image.norm(values[i, j]))
            dark = not math.isnan(values[i, j]) and 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            axes.text(j, i, text or "–", ha="center", va="center", size=9, color="white" if dark else "black")
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, fraction=0.05)
    figure.savefig(file, format="png")


def _number(table: Pivot, row: Value, column: Value) -> float:
    mean = table.mean(row, column)
    return math.nan if mean is None else mean


def _titled(metric: str) -> str:
    return f"{metric} ({'lower' if direction(metric) < 0 else 'higher'} is better)" if direction(metric) else metric


def _short(key: str) -> str:
    return key.rpartition(".")[2]
