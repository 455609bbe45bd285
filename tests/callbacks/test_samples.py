"""Samples on disk, and what a run leaves at its end."""

import csv
import json
import zipfile

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from steadyflow.callbacks.progress import StepProgress
from steadyflow.callbacks.results import SampleResults, merged
from steadyflow.callbacks.samples import SampleFiles, SampleWriter
from steadyflow.data import open_images
from steadyflow.denoisers import Gaussian
from steadyflow.grids import Uniform
from steadyflow.modules.sampling import Samples, Sampling
from steadyflow.paths import VariancePreserving
from steadyflow.samplers import DDIM

PATH = VariancePreserving()


def images(index):
    """An image a number, (n, 1, 8, 8): constant, of that grey value."""
    return index.to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()


def write(files, *batches, label=True):
    for batch in batches:
        index = torch.tensor(batch)
        files.write(Samples(index, index % 3 if label else None, images(index)))


@pytest.mark.parametrize("format", ["npz", "png"])
def test_what_is_written_is_found(tmp_path, format):
    files = SampleFiles(tmp_path, format)
    assert files.index().tolist() == []
    write(files, [0, 1, 2], [6, 7, 8], [3, 5])
    assert files.index().tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    first = files.first_images(4)
    assert first[:, 0, 0, 0].tolist() == [0, 1, 2, 3]  # in the order of their numbers, not of their files


def test_shards_have_the_promised_arrays(tmp_path):
    write(SampleFiles(tmp_path), [4, 5])
    with np.load(tmp_path / "samples" / "00000004.npz") as shard:
        assert {k: (shard[k].dtype.name, shard[k].shape) for k in shard.files} == {
            "images": ("uint8", (2, 8, 8, 1)),
            "index": ("int64", (2,)),
            "label": ("int64", (2,)),
        }
        assert shard["label"].tolist() == [1, 2]


def test_pngs_are_joined_into_one_zip_with_labels(tmp_path):
    files = SampleFiles(tmp_path, "png")
    write(files, [0, 3], [2, 1], [4], label=False)
    files.join(torch.arange(5) % 3)
    assert [f.name for f in (tmp_path / "samples").iterdir()] == ["images.zip"]
    read = open_images(tmp_path)
    assert (read.index.tolist(), read.label.tolist()) == ([0, 1, 2, 3, 4], [0, 1, 2, 0, 1])
    (index, x) = next(read.batches(8))
    assert torch.equal(x, images(index))
    whole = (tmp_path / "samples" / "images.zip").read_bytes()

    again = SampleFiles(tmp_path / "again", "png")
    write(again, [0], [1, 2], [3, 4], label=False)
    again.join(torch.arange(5) % 3)
    assert (again.folder / "images.zip").read_bytes() == whole  # whatever the batches were
    again.join(None)
    assert (again.folder / "images.zip").read_bytes() == whole  # and nothing left to join


def test_a_killed_process_leaves_nothing_behind(tmp_path):
    files = SampleFiles(tmp_path, "png")
    write(files, [0, 1], [2])
    parts = {f.name: f.read_bytes() for f in files.folder.iterdir()}
    files.join(None)
    for name, content in parts.items():  # killed between the whole zip and the removal of its parts
        (files.folder / name).write_bytes(content)
    (files.folder / ".00000003.zip.77.tmp").touch()
    (tmp_path / ".metrics.json.77.tmp").touch()
    files.tidy()
    assert [f.name for f in tmp_path.rglob("*")] == ["samples", "images.zip"]
    assert files.index().tolist() == [0, 1, 2]


def test_vectors(tmp_path):
    files = SampleFiles(tmp_path, vector=True)
    x = torch.randn(6, 2)
    for rows in ([4, 5], [0, 1, 2, 3]):
        files.write(Samples(torch.tensor(rows), torch.tensor(rows) % 2, x[rows]))
    index, samples, label = files.vectors()
    assert (index.tolist(), label.tolist()) == ([0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 0, 1])
    assert np.array_equal(samples, x.numpy())
    (files.folder / "00000004.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"00000004\.npz is no npz file, or a damaged one .*; remove it"):
        files.index()


@pytest.mark.parametrize(("format", "vector"), [("jpg", False), ("png", True)])
def test_a_format_there_is_not(tmp_path, format, vector):
    with pytest.raises(ValueError, match=f"format must be npz.*got '{format}'"):
        SampleFiles(tmp_path, format, vector)


def test_vectors_are_drawn_over_the_data(tmp_path):
    files = SampleFiles(tmp_path, vector=True)
    files.write(Samples(torch.arange(50), None, torch.rand(50, 2) + torch.tensor([3.0, 0.0])))
    files.draw(tmp_path / "grid.png", reference=torch.rand(50, 2))
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB")).astype(int)
    blue = (pixels[..., 2] > pixels[..., 0] + 60).nonzero()[1]
    grey = ((pixels.max(2) == pixels.min(2)) & (abs(pixels[..., 0] - 204) < 3)).nonzero()[1]
    assert len(blue) > 200
    assert len(grey) > 200
    assert blue.mean() > grey.mean() + 200  # to the right, where they are


class Scores(L.Callback):
    def __init__(self):
        self.results = {"fid": 3.5, "kid": None, "protocol": {"fid": {"count": 7}}, "reason": {"kid": "too few"}}


def finish(directory, index, loggers=False, callbacks=(), **options):
    gaussian = Gaussian(torch.zeros(1, 8, 8), 0.1)
    module = Sampling(gaussian, DDIM(PATH, Uniform(), 4), (1, 8, 8), 0, index, batch_size=3)
    files = SampleFiles(directory)
    results = SampleResults(files, protocol={"sampler": "DDIM"})
    L.Trainer(
        accelerator="cpu",
        logger=loggers,
        callbacks=[SampleWriter(files), *callbacks, results],
        enable_checkpointing=False,
        enable_model_summary=False,
        **{"enable_progress_bar": False} | options,
    ).predict(module, return_predictions=False)
    return module, json.loads((directory / "metrics.json").read_text())


def test_metrics_picture_and_loggers(tmp_path):
    loggers = [CSVLogger(tmp_path, None, "logs"), TensorBoardLogger(tmp_path, None, "board")]
    module, metrics = finish(tmp_path, torch.arange(7), loggers, [Scores()])
    assert (metrics["fid"], metrics["kid"], metrics["nfe"]) == (3.5, None, 4.0)
    assert metrics["seconds_per_image"] == pytest.approx(module.seconds / 4)  # samples 3..6, the first batch is warm-up
    assert metrics["reason"] == {"kid": "too few"}
    assert metrics["protocol"]["fid"] == {"count": 7}
    assert metrics["protocol"]["nfe"] == {"sampler": "DDIM", "devices": 1, "batch_size": 3, "count": 7}
    assert metrics["protocol"]["seconds_per_image"]["count"] == 4
    with (tmp_path / "logs" / "metrics.csv").open() as file:
        row = next(csv.DictReader(file))
    assert (float(row["fid"]), float(row["nfe"])) == (3.5, 4.0)
    events = b"".join(f.read_bytes() for f in (tmp_path / "board").glob("events*"))
    assert b"fid" in events
    assert (tmp_path / "grid.png").read_bytes()[:4] == b"\x89PNG"
    assert b"samples" in events

    _, again = finish(tmp_path, torch.arange(0), callbacks=[Scores()])  # nothing was missing
    assert again == metrics


def test_later_results_win():
    parts = [{"a": 1, "b": 2, "protocol": {"a": {"n": 1}}}, {"b": 3, "protocol": {"b": {}}, "reason": {"b": "x"}}]
    assert merged(parts) == {"a": 1, "b": 3, "protocol": {"a": {"n": 1}, "b": {}}, "reason": {"b": "x"}}


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_progress_within_the_batch(tmp_path, bar, capsys):
    seen = []

    class Watch(StepProgress):
        def on_predict_start(self, trainer, pl_module):
            super().on_predict_start(trainer, pl_module)
            show = pl_module.progress

            def progress(fraction):
                show(fraction)
                live = trainer.progress_bar_callback
                if bar is RichProgressBar:
                    seen.append([(t.description.strip(), t.completed) for t in live.progress.tasks])
                else:
                    seen.append(live.predict_progress_bar.postfix)

            pl_module.progress = progress

    finish(tmp_path, torch.arange(6), callbacks=[Watch(), bar()], enable_progress_bar=True)
    if bar is RichProgressBar:
        inner = [dict(s)["% of the batch"] for s in seen]
        assert [dict(s)["Predicting"] for s in seen] == [0] * 4 + [1] * 4
        assert inner == [25, 50, 75, 100] * 2
    else:
        assert seen == ["25% of batch", "50% of batch", "75% of batch", "100% of batch"] * 2


def test_zip_of_parts_is_a_plain_zip(tmp_path):
    files = SampleFiles(tmp_path, "png")
    write(files, [0, 1])
    files.join(None)
    with zipfile.ZipFile(files.folder / "images.zip") as file:
        assert file.namelist() == ["00000000.png", "00000001.png"]
        assert file.testzip() is None
