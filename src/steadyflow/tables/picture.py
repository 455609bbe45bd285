"""A filled table as a picture."""

from itertools import groupby
from pathlib import Path
from textwrap import wrap

from matplotlib.figure import Figure

from steadyflow.tables.cells import Table
from steadyflow.tables.outcomes import difference, direction
from steadyflow.tables.render import Outcomes, entries, legend

CHARACTER, LINE, SIZE = 0.087, 0.19, 9.0  # inches a character and a line of text of this size take


def draw(file: Path, table: Table, outcomes: Outcomes) -> None:
    """Writes a PNG: ours in bold, the published value below it in grey, the difference (blue where ours is better, red
    where it is worse); the label of a group once, and what it holds on one ground. Its size follows the content."""
    texts, notes = entries(table, outcomes)
    printed = any(entry.published for entry in texts.values())
    gaps = any(entry.difference for entry in texts.values())
    heads = {column: wrap(labels[-1], 16) or [""] for column, labels in table.columns.items()}
    above = [list(of) for _, of in groupby(table.columns, lambda column: table.columns[column][:-1])]
    pad = 0.06 if printed or gaps else 0.03
    height = LINE * (1 + printed + gaps) + 2 * pad
    depths = range(max(map(len, table.rows.values())))
    across = [CHARACTER * max(len(of[d]) for of in table.rows.values() if len(of) > d) + 0.15 for d in depths]
    first = sum(across) + 0.1
    widths = []
    for column in table.columns:
        of = [entry for (_, c), entry in texts.items() if c == column]
        strings = [*heads[column], *(e.ours + "[9]" * bool(e.footnote) for e in of), *(e.published for e in of)]
        widths.append(CHARACTER * max(map(len, [*strings, "0000"])) + 0.2)
    grouped = max(map(len, table.columns.values())) > 1
    for columns in above:  # a heading wider than what it heads
        last, room = list(table.columns).index(columns[-1]), CHARACTER * len(_group(table, columns[0])) + 0.2
        widths[last] += max(0.0, room - sum(widths[last + 1 - len(columns) : last + 1]))
    width = max(first + sum(widths), 5.5)
    title = wrap(table.title, int(width / CHARACTER / 1.25))
    below = [line for text in legend(table, outcomes) for line in wrap(text, int(width / CHARACTER * 1.1))]
    for i, note in enumerate(notes, 1):
        below += wrap(f"[{i}] {note}", int(width / CHARACTER * 1.1))[:3]
    head = LINE * (max(map(len, heads.values())) + grouped) + 0.12
    top = 0.28 * len(title) + (LINE if table.source else 0) + 0.15
    total = top + head + height * len(table.rows) + LINE * len(below) + 0.3

    figure = Figure(figsize=(width + 0.3, total), dpi=130)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-0.15, width + 0.15), ylim=(total, 0))
    axes.axis("off")
    for i, line in enumerate(title):
        axes.text(0, 0.25 + 0.28 * i, line, size=SIZE + 3, weight="bold", va="center")
    axes.text(0, top - 0.08, table.source, size=SIZE, color="0.4", va="center")
    right = [first + sum(widths[: i + 1]) - 0.1 for i in range(len(widths))]
    y = top + 0.06
    axes.plot([0, right[-1] + 0.1], [y, y], color="black", lw=1)
    at = dict(zip(table.columns, right, strict=True))
    for column, x in at.items():
        for i, line in enumerate(heads[column]):
            axes.text(x, y + 0.06 + LINE * (i + grouped + 0.5), line, size=SIZE, ha="right", va="center")
    for columns in above:
        if heading := _group(table, columns[0]):
            left, end = at[columns[0]] - widths[list(at).index(columns[0])] + 0.2, at[columns[-1]]
            axes.text((left + end) / 2, y + 0.06 + LINE / 2, heading, size=SIZE, ha="center", va="center")
            axes.plot([left, end], [y + 0.06 + LINE] * 2, color="0.5", lw=0.6)
    y += head
    axes.plot([0, right[-1] + 0.1], [y, y], color="black", lw=0.6)
    cells = {(cell.row, cell.column): cell for cell in table.cells}
    before: tuple[str, ...] = ()
    shaded = True
    for row, labels in table.rows.items():
        shaded ^= labels[:-1] != before[:-1] or len(depths) == 1
        if shaded:
            axes.fill_between([0, right[-1] + 0.1], y, y + height, color="0.955", lw=0)
        if before and len(depths) > 1 and labels[0] != before[0]:
            axes.plot([0, right[-1] + 0.1], [y, y], color="0.5", lw=0.6)
        for d, label in enumerate(labels):
            if labels[: d + 1] != before[: d + 1]:
                axes.text(0.05 + sum(across[:d]), y + height / 2, label, size=SIZE, va="center")
        before = labels
        for column, x in zip(table.columns, right, strict=True):
            if (row, column) not in texts:
                continue
            entry, cell, outcome = texts[row, column], cells[row, column], outcomes[row, column]
            lines = [(entry.ours, "black" if outcome.state == "done" else "0.55", "bold")]
            if entry.footnote:
                lines[0] = (
                    f"{entry.ours}[{entry.footnote}]",
                    "firebrick" if outcome.state == "failed" else "0.55",
                    "normal",
                )
            lines += [(entry.published, "0.35", "normal")] if printed else []
            if gaps:
                better = (difference(outcome, cell.published) or 0) * direction(cell.metric)
                lines.append(
                    (entry.difference, "tab:blue" if better > 0 else "tab:red" if better < 0 else "0.35", "normal")
                )
            for i, (text, colour, weight) in enumerate(lines):
                axes.text(
                    x,
                    y + pad + LINE * (i + 0.5),
                    text,
                    size=SIZE,
                    color=colour,
                    weight=weight,
                    ha="right",
                    va="center",
                )
        y += height
    axes.plot([0, right[-1] + 0.1], [y, y], color="black", lw=1)
    for i, line in enumerate(below):
        axes.text(0, y + 0.12 + LINE * (i + 0.5), line, size=SIZE - 1, color="0.3", va="center")
    figure.savefig(file, format="png")


def _group(table: Table, column: str) -> str:
    return ", ".join(table.columns[column][:-1])
