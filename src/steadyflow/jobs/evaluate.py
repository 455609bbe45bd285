"""`steadyflow evaluate`: scores images on disk."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from steadyflow.callbacks.evaluation import Evaluation
from steadyflow.data import open_images
from steadyflow.jobs import likelihood, record
from steadyflow.metrics.evaluator import grouped

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Scores cfg.images, writes metrics.json and prints a table. With metrics=nll or elbo, see `likelihood.score`.

    Returns:
        What metrics.json holds: numbers by name (None where one cannot be had), `protocol`, `reason`.

    Raises:
        FileNotFoundError: no images there.
        ValueError: too few images for a metric, images of different sizes, pairs that do not match; or not one metric
            that can be had.
    """
    cfg = record.resumed(cfg)
    directory = Path(HydraConfig.get().runtime.output_dir)
    if "likelihood" in cfg:
        results = likelihood.score(cfg, directory)
        Console().print(table(results))
        return results
    if "_target_" not in (cfg.callbacks.get("evaluation") or {}) or not cfg.callbacks.evaluation.metrics:
        raise ValueError("no metric is chosen; set callbacks, e.g. callbacks=default or callbacks=[fid,accuracy]")
    images = open_images(cfg.images)
    target = None if cfg.paired_with is None else open_images(cfg.paired_with)
    evaluation: Evaluation = instantiate(cfg.callbacks.evaluation)
    if target is not None and not any("target" in metric.needs for metric in evaluation.metrics.values()):
        raise ValueError("paired_with is set, but no metric of pairs is chosen; add one, e.g. callbacks=paired")
    record.claim(directory, cfg)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    results = evaluation.evaluator(device).score(images, target, strict=True)
    record.write_text(directory / "metrics.json", json.dumps(results, indent=2) + "\n")
    Console().print(table(results))
    if all(value is None for key, value in results.items() if key not in ("protocol", "reason")):
        raise ValueError("no metric could be had: " + "; ".join(grouped(results["reason"])))
    log.info("%s", directory / "metrics.json")
    return results


def table(results: dict[str, Any]) -> Table:
    """A row per metric: its number with its spread, and what it was compared with or why there is none."""
    shown = (
        "count",
        "of",
        "checkpoint",
        "trace",
        "bound",
        "steps",
        "variance",
        "features",
        "resize",
        "reference",
        "subset_size",
        "k",
        "splits",
        "data_range",
        "window",
    )
    rows = Table("metric", "value", "", title="evaluation")
    for key, value in results.items():
        if key in ("protocol", "reason") or key.endswith("_std"):
            continue
        spread = results.get(f"{key}_std")
        number = "-" if value is None else f"{value:.4g}"
        number += f" +- {spread:.2g}" if spread is not None and math.isfinite(spread) else ""
        protocol = results["protocol"].get(key, {})
        said = ", ".join(f"{k} {protocol[k]}" for k in shown if protocol.get(k) not in (None, "none"))
        rows.add_row(key, number, results["reason"].get(key, said).split(";")[0])
    return rows
