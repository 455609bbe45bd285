"""What became of a table's cells: numbers over seeds, or why there are none; and how they compare."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any, Literal

from steadyflow.tables.cells import Cell, Published

HIGHER = ("psnr", "ssim", "inception_score", "precision", "recall", "accuracy", "images_per_second", "aa_score")
LOWER = (
    *("fid", "kid", "lpips", "loss", "nll", "seconds", "nfe", "residual", "relative_l2", "rmse", "minutes"),
    "consistency",
)


@dataclass(frozen=True)
class Outcome:
    """Of one cell.

    Attributes:
        state: done; failed (its run raised), absent (the run has no such number), needs (a method that is not in this
            version), missing (files that are not there), open (can be run, and was not yet).
        value: mean over the seeds, in the source's units.
        spread: standard deviation over the seeds (of a sample: n - 1), None for one.
        count: seeds that are done.
        stale: at least one run was made by an older revision of the code.
        note: one line: the error, the reason, or what is needed.
        runs: directories.
    """

    state: Literal["done", "failed", "absent", "needs", "missing", "open"]
    value: float | None = None
    spread: float | None = None
    count: int = 0
    stale: bool = False
    note: str = ""
    runs: tuple[str, ...] = ()


def direction(metric: str) -> int:
    """-1 where lower is better, +1 where higher is, 0 where neither is known: judged by the metric's name."""
    for sign, names in ((1, HIGHER), (-1, LOWER)):
        if any(metric == name or metric.startswith(f"{name}_") or metric.endswith(f"_{name}") for name in names):
            return sign
    return -1 if metric.rpartition("/")[2].endswith("loss") else 0


def done(cell: Cell, metrics: Sequence[Mapping[str, Any]], runs: Sequence[str], stale: bool) -> Outcome:
    """The outcome of a cell from the metrics of its runs, one a seed."""
    runs = tuple(runs)
    values: list[float] = []
    for found in metrics:
        value = found.get(cell.metric)
        if not isinstance(value, int | float) or isinstance(value, bool):
            known = ", ".join(sorted(k for k, v in found.items() if isinstance(v, int | float)))
            reason = found.get("reason", {}).get(cell.metric) if cell.metric in found else None
            note = f"{cell.metric}: {reason}" if reason else f"the run has no {cell.metric}; it has {known or 'none'}"
            return Outcome("absent", count=len(values), stale=stale, note=note, runs=runs)
        values.append(cell.factor * float(value))
    return Outcome("done", fmean(values), stdev(values) if len(values) > 1 else None, len(values), stale, "", runs)


def over(outcome: Outcome, unit: Outcome) -> Outcome:
    """A number divided by that of another cell, without its spread; absent where there is none to divide by."""
    if outcome.value is None:
        return outcome
    if unit.value is None:
        return replace(outcome, state="absent", value=None, spread=None, note="no number to divide by")
    return replace(outcome, value=outcome.value / unit.value, spread=None, stale=outcome.stale or unit.stale)


def difference(outcome: Outcome, printed: Published) -> float | None:
    """Ours minus the source's, where both are numbers."""
    if outcome.value is None or printed.value is None or printed.bound:
        return None
    return outcome.value - printed.value


def number(value: float | None, spread: float | None = None) -> str:
    """A number to four significant digits; one with a spread to two digits of it."""
    if value is None:
        return ""
    if spread is None or spread == 0 or not math.isfinite(spread) or not math.isfinite(value):
        return f"{value:.4g}" if not 1e4 <= abs(value) < 1e7 else f"{value:.0f}"
    places = max(0, 1 - math.floor(math.log10(abs(spread))))
    if places > 6:
        return f"{value:.4g} ± {spread:.1e}"
    return f"{value:.{places}f} ± {spread:.{places}f}"


def signed(value: float | None) -> str:
    """A difference to three significant digits, with its sign."""
    return "" if value is None else f"{value:+.3g}" if not 1e3 <= abs(value) < 1e7 else f"{value:+.0f}"
