"""`steadyflow report`: the runs below a folder as one table, with pivots and pictures."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table as RichTable

from steadyflow.jobs import record
from steadyflow.mistakes import did_you_mean
from steadyflow.tables.gather import (
    Pivot,
    RunRow,
    cells,
    comma_separated,
    gather,
    markdown,
    metric_names,
    pivot,
    swept,
)

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Gathers what the runs below cfg.dir found, while a sweep still runs too, and writes

        report.csv, report.md       a line a run: swept parameters, metrics, the best of each marked
        pivot_METRIC.md, heat_METRIC.png        with rows (and columns): means ± standard deviations over the others
        lines_METRIC.png            with x (and lines): the metric against a parameter, a line for each value of another

    Returns:
        runs, unfinished: how many; parameters, metrics: their names.

    Raises:
        FileNotFoundError: no run there.
        ValueError: a metric that no run has, a parameter that no config has, a run of an incompatible version.
    """
    return write(cfg, Path(HydraConfig.get().runtime.output_dir))


class AtTheEnd(Callback):
    """Hydra's callback that reports a multirun when its last run has ended, to the folder `report` of the sweep's.

        hydra: {callbacks: {report: {_target_: steadyflow.jobs.report.AtTheEnd, rows: sampler.steps, columns: seed}}}

    Args:
        metric, rows, columns, x, lines: see configs/report.yaml. Metrics that no run has are left out.
    """

    def __init__(self, **options: Any):
        names = ("metric", "rows", "columns", "x", "lines")
        if wrong := sorted({*options} - {*names}):
            raise ValueError(f"a report at the end has no {', '.join(wrong)}; it has {', '.join(names)}")
        self.options = dict.fromkeys(names) | options

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        directory = Path(config.hydra.sweep.dir)
        known = metric_names(gather(directory, record.FORMAT)[0])
        options = self.options | {"metric": [name for name in _list(self.options["metric"]) if name in known]}
        (directory / "report").mkdir(exist_ok=True)
        write(OmegaConf.create({"dir": str(directory), "logger": None, **options}), directory / "report")


def write(cfg: DictConfig, out: Path) -> dict[str, Any]:
    """Writes the report of cfg.dir to `out`; returns and raises as `run`."""
    source = Path(cfg.dir).expanduser()
    rows, unfinished = gather(source, record.FORMAT)
    parameters, known = swept(rows), metric_names(rows)
    metrics = _list(cfg.metric) or known
    for metric in metrics:
        if not any(metric in row.metrics for row in rows):
            near = did_you_mean(metric, known)
            raise ValueError(f"metric={metric}: no run below {source} has it.{near} There are {', '.join(known)}")
    down, across, x, each = (",".join(_list(cfg[name])) or None for name in ("rows", "columns", "x", "lines"))
    for name, keys in (("rows", down), ("columns", across), ("x", x), ("lines", each)):
        for key in keys.split(",") if keys else ():
            _check(name, key, rows, parameters)

    head, lines = ["run", *parameters, *metrics], cells(rows, parameters, metrics)
    state = f"{len(rows)} runs below {source}" + (f"; {unfinished} more are not finished" if unfinished else "")
    pages = [f"# {state}\n\n" + markdown(head, lines, 1 + len(parameters))]
    record.write_text(out / "report.csv", comma_separated(rows, parameters, metrics))
    pictures = []
    for metric in metrics:
        if down is not None:
            table = pivot(rows, metric, down, across)
            first = f"{metric}: {down}" + (f" \\ {across}" if across else "")
            page = markdown([first, *map(str, table.columns)], table.cells(), 1)
            record.write_text(out / f"pivot_{metric}.md", page)
            pages.append(page)
            if across is not None:
                pictures.append(_picture(out / f"heat_{metric}.png", "heat_map", table))
        if x is not None and metric != x:
            pictures.append(_picture(out / f"lines_{metric}.png", "lines", pivot(rows, metric, x, each)))
    record.write_text(out / "report.md", "\n".join(pages))

    console = Console()
    shown = RichTable(*head, title=state, title_justify="left")
    for line in lines:
        shown.add_row(*[f"[bold]{word.strip('*')}[/]" if word.startswith("**") else word for word in line])
    console.print(shown)
    for page in pages[1:]:
        console.print(page.replace("**", ""), markup=False, highlight=False, soft_wrap=True)
    for file in (out / "report.md", *pictures):
        console.print(str(file), highlight=False, markup=False, soft_wrap=True)
    send(cfg.logger, head, lines, pages, pictures)
    return {"runs": len(rows), "unfinished": unfinished, "parameters": parameters, "metrics": metrics}


def send(
    node: DictConfig | None, head: list[str], lines: list[list[str]], pages: list[str], pictures: list[Path]
) -> None:
    """The same table and pictures to the logger: TensorBoard as text and images, Weights & Biases as a table."""
    if not node:
        return
    import numpy as np
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
    from PIL import Image

    logger = instantiate(node)
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text("report", "\n".join(pages))
        for file in pictures:
            logger.experiment.add_image(file.stem, np.asarray(Image.open(file).convert("RGB")), dataformats="HWC")
        logger.experiment.flush()
    elif isinstance(logger, WandbLogger):
        logger.log_table("report", columns=head, data=[[word.strip("*") for word in line] for line in lines])
        for file in pictures:
            logger.log_image(file.stem, [str(file)])
        logger.experiment.finish()
    else:
        log.info("%s takes no tables; the report is in its folder", type(logger).__name__)


def _list(value: Any) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _check(name: str, key: str, rows: list[RunRow], parameters: list[str]) -> None:
    if all(row.value(key) is None for row in rows):
        raise ValueError(
            f"{name}={key}: no run has such a parameter.{did_you_mean(key, parameters)} "
            f"The runs differ in {', '.join(parameters) or 'none'}"
        )


def _picture(file: Path, kind: str, table: Pivot) -> Path:
    from steadyflow.tables import plots

    draw: Callable[[Path, Pivot], None] = getattr(plots, kind)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    draw(temporary, table)
    temporary.replace(file)
    return file
