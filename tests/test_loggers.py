"""The loggers tell the same story: one training run's curve in each, and the picture of a sampling run."""

import csv
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from steadyflow import cli
from steadyflow.mistakes import explain

TRAIN = ["train", "dataset=toy2d", "network=mlp", "network.width=8", "batch_size=8", "max_steps=4", "warmup=0"]
QUIET = ["log_every=1", "validate=false", "ema=null", "+trainer.enable_progress_bar=false"]


def trained(directory: Path, logger: str) -> Path:
    assert cli.main([*TRAIN, *QUIET, f"logger={logger}", f"hydra.run.dir={directory}"]) == 0
    return directory


def curve_in_csv(directory: Path) -> dict[int, float]:
    (file,) = directory.glob("logs/*/metrics.csv")
    with file.open() as lines:
        return {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(lines) if row["train/loss"]}


@pytest.mark.slow
def test_the_curve_is_the_same_in_csv_and_tensorboard(tmp_path: Path) -> None:
    expected = curve_in_csv(trained(tmp_path / "csv", "csv"))
    assert len(expected) == 4
    assert np.isfinite(list(expected.values())).all()
    events = EventAccumulator(str(trained(tmp_path / "board", "tensorboard") / "tensorboard"))
    events.Reload()
    assert {event.step: pytest.approx(event.value, rel=1e-6) for event in events.Scalars("train/loss")} == expected
    assert not list(trained(tmp_path / "none", "none").rglob("*metrics.csv"))


@pytest.mark.slow
def test_tensorboard_has_the_picture_and_the_metrics_of_a_sampling_run(tmp_path: Path) -> None:
    options = ["checkpoint=analytic", "dataset=toy2d", "num_samples=4", "sampler.steps=2", "callbacks=none"]
    quiet = ["+trainer.enable_progress_bar=false", "logger=tensorboard", f"hydra.run.dir={tmp_path}"]
    assert cli.main(["sample", *options, *quiet]) == 0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("nfe")] == [2]
    (image,) = events.Images("samples")
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert image.width > 100


def test_wandb_without_a_key_is_one_line() -> None:
    errors = pytest.importorskip("wandb.errors")
    line = explain(errors.UsageError("No API key configured. Use `wandb login` to log in."))
    assert line == "No API key configured. Use `wandb login` to log in; or without an account: logger.offline=true"
