"""A filled table as Markdown, CSV and LaTeX."""

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass

from steadyflow.tables.cells import Table
from steadyflow.tables.outcomes import Outcome, difference, number, signed

Outcomes = Mapping[tuple[str, str], Outcome]
STALE = "†"
COLUMNS = (
    "row column metric overrides state ours spread seeds published published_spread bound difference stale note runs"
).split()


@dataclass(frozen=True)
class Entry:
    """One cell as text: our number, the source's, and the difference."""

    ours: str
    published: str
    difference: str
    footnote: int = 0  # of the note below the table; 0 for none


def entries(table: Table, outcomes: Outcomes) -> tuple[dict[tuple[str, str], Entry], list[str]]:
    """Each cell as text, and the notes that stand below the table, each once."""
    notes: dict[str, int] = {}
    texts = {}
    for cell in table.cells:
        outcome, at = outcomes[cell.row, cell.column], (cell.row, cell.column)
        footnote = notes.setdefault(outcome.note, len(notes) + 1) if outcome.note else 0
        ours = number(outcome.value, outcome.spread) + (STALE if outcome.stale and outcome.value is not None else "")
        ours = ours or {"failed": "failed", "open": "not run"}.get(outcome.state, "–")
        gap = signed(difference(outcome, cell.published)) if table.comparable else ""
        texts[at] = Entry(ours, cell.published.text.replace("+-", "±").replace("<=", "≤"), gap, footnote)
    return texts, list(notes)


def legend(table: Table, outcomes: Outcomes) -> list[str]:
    """What the numbers are."""
    printed = any(cell.published.text for cell in table.cells)
    done = [o for o in outcomes.values() if o.state == "done"]
    seeds = max((o.count for o in done), default=len(table.seeds))
    ours = "mean ± standard deviation over the seeds" if seeds > 1 else "ours"
    lines = [
        f"Scale {table.scale}; seeds {', '.join(map(str, table.seeds))}; {len(done)} of {len(table.cells)} cells run."
    ]
    if printed and table.comparable:
        lines.append(f"Each cell: {ours} (published, difference).")
    elif printed:
        lines.append(f"Each cell: {ours} (published). At this scale the data are others, so no difference is given.")
    elif done:
        lines.append(f"Each cell: {ours}.")
    if any(o.stale for o in outcomes.values()):
        lines.append(f"{STALE} run by an older revision of the code; force=true runs it again.")
    return lines


def markdown(table: Table, outcomes: Outcomes) -> str:
    """A Markdown page: title, source, the table, notes."""
    texts, notes = entries(table, outcomes)

    def text(row: str, column: str) -> str:
        if (row, column) not in texts:
            return ""
        entry = texts[row, column]
        beside = ", ".join(part for part in (entry.published, entry.difference) if part)
        mark = f"[{entry.footnote}]" if entry.footnote else ""
        return _escaped(f"{entry.ours}{mark}{f' ({beside})' if beside else ''}")

    lines = [f"# {table.title}", "", *([f"{table.source}.", ""] if table.source else [])]
    lines.append("| " + " | ".join(["", *map(_escaped, table.columns)]) + " |")
    lines.append("|---|" + "---:|" * len(table.columns))
    lines += [
        f"| {_escaped(row)} | " + " | ".join(text(row, column) for column in table.columns) + " |" for row in table.rows
    ]
    lines += ["", *[f"{line}  " for line in legend(table, outcomes)], ""]
    lines += [f"[{i}] {_escaped(note)}  " for i, note in enumerate(notes, 1)]
    lines += ["", " ".join(table.notes.split())] if table.notes else []
    return "\n".join(lines).rstrip() + "\n"


def comma_separated(table: Table, outcomes: Outcomes) -> str:
    """A line a cell, with every number in full."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for cell in table.cells:
        o, p = outcomes[cell.row, cell.column], cell.published
        gap = difference(o, p) if table.comparable else None
        line = [cell.row, cell.column, cell.metric, cell.text, o.state, o.value, o.spread, o.count, p.value, p.spread]
        line += [p.bound, gap, o.stale, o.note, " ".join(o.runs)]
        writer.writerow(dict(zip(COLUMNS, ("" if v is None else v for v in line), strict=True)))
    return file.getvalue()


def latex(table: Table, outcomes: Outcomes) -> str:
    """A tabular for booktabs, with the title and the source as its caption."""
    texts, notes = entries(table, outcomes)

    def text(row: str, column: str) -> str:
        if (row, column) not in texts:
            return ""
        entry = texts[row, column]
        beside = ", ".join(_math(part) for part in (entry.published, entry.difference) if part)
        mark = f"\\textsuperscript{{{entry.footnote}}}" if entry.footnote else ""
        return f"{_math(entry.ours)}{mark}{f' ({beside})' if beside else ''}"

    caption = _tex(f"{table.title}{f' ({table.source})' if table.source else ''}. {' '.join(legend(table, outcomes))}")
    lines = ["% needs \\usepackage{booktabs}", "\\begin{table}", "\\centering", f"\\caption{{{caption}}}"]
    lines += [f"\\begin{{tabular}}{{l{'r' * len(table.columns)}}}", "\\toprule"]
    lines.append(" & ".join(["", *map(_tex, table.columns)]) + r" \\")
    lines.append("\\midrule")
    lines += [" & ".join([_tex(row), *[text(row, column) for column in table.columns]]) + r" \\" for row in table.rows]
    lines += ["\\bottomrule", "\\end{tabular}"]
    lines += [f"\\par\\footnotesize\\textsuperscript{{{i}}} {_tex(note)}" for i, note in enumerate(notes, 1)]
    return "\n".join([*lines, "\\end{table}"]) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _math(text: str) -> str:
    """A number, or a word."""
    if not any(c.isdigit() for c in text):
        return _tex(text)
    for sign, name in {"±": r"\pm", "≤": r"\le", STALE: r"^{\dagger}"}.items():
        text = text.replace(sign, name)
    return f"${text}$"


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "±": r"$\pm$", STALE: r"$\dagger$", "–": "--", "~": r"\textasciitilde{}"}
    special |= {c: f"\\{c}" for c in "&%$#_{}"} | {"^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
    return "".join(special.get(c, c) for c in text)
