"""`steadyflow invert`, from the command line to the files, with the exact denoiser of the digits at 8 x 8."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from steadyflow import cli
from steadyflow.callbacks.inversions import InversionFiles
from steadyflow.data import Digits, open_images, to_uint8, write_png_zip, write_shard
from steadyflow.denoisers import Empirical
from steadyflow.grids import Quadratic
from steadyflow.jobs.pictures import condition_labels
from steadyflow.noise import NoiseSource
from steadyflow.paths import VariancePreserving
from steadyflow.samplers import DDIM

BASE = ["checkpoint=analytic", "dataset.size=8", "sampler.steps=6", "logger=none", "+trainer.enable_progress_bar=false"]
ALL = "method=[naive,deq,ddim_inversion,edict]"


def invert(directory, *overrides) -> int:
    return cli.main(["invert", *BASE, f"hydra.run.dir={directory}", *overrides])


def done(directory, *overrides) -> dict:
    assert invert(directory, *overrides) == 0
    return json.loads((Path(directory) / "metrics.json").read_text())


def mistake(capsys, directory, *overrides) -> str:
    """The one line said about a run that has to end with exit code 2."""
    capsys.readouterr()
    assert invert(directory, *overrides) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line.removeprefix("steadyflow invert: error: ")


def same(found, wanted, but=()):
    """The same inversions: to the rounding of another batch size; times are never the same."""
    assert found.keys() == wanted.keys()
    for name in found.keys() - {"seconds", "clock", *but}:
        np.testing.assert_allclose(found[name].astype(float), wanted[name].astype(float), rtol=1e-4, atol=1e-4)


def test_what_a_run_leaves(tmp_path, capsys):
    options = ["num_images=5", "batch_size=2", "first=3", "epochs=8", "logger=csv", "threshold=0.01"]
    metrics = done(tmp_path, ALL, *options)
    digits, methods = Digits("test", size=8), ["naive", "deq", "ddim_inversion", "edict"]
    target = torch.stack([digits[i][0] for i in range(3, 8)])
    label = digits.labels[3:8]
    files = InversionFiles(tmp_path, methods)
    assert sorted(f.name for f in (tmp_path / "inversions/naive").iterdir()) == [f"0000000{i}.npz" for i in (3, 5, 7)]
    # the latents make the images: by a sampler that this test builds itself
    whole = Empirical(torch.stack([x for x, _ in digits]), digits.labels)
    sampler = DDIM(VariancePreserving(), Quadratic(), 6)
    for method in methods[:3]:
        of = files.read(method)
        assert of["index"].tolist() == list(range(3, 8))
        assert of["label"].tolist() == label.tolist()  # each image's own
        noise = NoiseSource(0, range(3, 8), (1, 8, 8))
        x = sampler(whole, noise, start=torch.from_numpy(of["latent"]), label=label)
        loss = (x.double() - target.double()).square().flatten(1).sum(1)
        np.testing.assert_allclose(of["loss"], loss, rtol=1e-3, atol=1e-5)
        images = torch.from_numpy(of["images"]).permute(0, 3, 1, 2).int()
        assert (images - to_uint8(x).int()).abs().max() <= 1
        assert metrics[f"{method}/loss"] == pytest.approx(of["loss"].mean())
        assert metrics[f"{method}/loss_std"] == pytest.approx(of["loss"].std(ddof=1))
        assert metrics[f"{method}/minutes_per_image"] == pytest.approx(of["seconds"].mean() / 60)
    assert files.read("edict")["latent"].shape == (5, 2, 1, 8, 8)
    assert metrics["edict/loss"] < 1e-15
    assert metrics["edict/psnr"] is None
    assert metrics["reason"]["edict/psnr"] == "infinite: an image came back byte for byte"
    folder = open_images(tmp_path / "inversions/edict")  # for `steadyflow evaluate`
    assert torch.equal(torch.cat([images for _, images in folder.batches(5)]), digits.images[3:8])
    assert metrics["ddim_inversion/nfe"] == 6
    assert metrics["edict/nfe"] == 12
    epochs = files.read("deq")["epochs"]
    assert metrics["deq/nfe"] == pytest.approx(7 * epochs.mean())  # the chain and one step an epoch
    for method in ("naive", "deq"):  # the loss reported is the latent's, and the least of the curve
        of = files.read(method)
        np.testing.assert_allclose(of["loss"], np.nanmin(of["curve"], 1), rtol=1e-4)
    assert metrics["naive/nfe"] == pytest.approx(12 * files.read("naive")["epochs"].mean())  # recomputed once
    assert metrics["protocol"]["images"] == "digits test"

    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 + 5 * 10, 2 + 5 * 10)
        pixels = np.asarray(grid)
    assert np.array_equal(pixels[12:20, 2:10], to_uint8(target)[1, 0])  # original | naive | deq | ...
    assert np.array_equal(pixels[12:20, 22:30], files.read("deq")["images"][1, :, :, 0])
    with (tmp_path / "losses.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "deq" and row["index"] == "4"]
    curve = files.read("deq")["curve"][1]
    assert [int(row["epoch"]) for row in rows] == list(range(1, int(epochs[1]) + 1))
    np.testing.assert_allclose([float(row["loss"]) for row in rows], curve[: epochs[1]], rtol=1e-6)
    with Image.open(tmp_path / "losses.png") as plot:
        assert plot.size == (1300, 520)
    shown = capsys.readouterr().out
    assert all(f" {method} " in shown for method in methods)
    assert "deq/loss" in (tmp_path / "logs/version_0/metrics.csv").read_text()


def test_one_method_has_its_numbers_without_its_name(tmp_path):
    metrics = done(tmp_path, "num_images=2", "method=ddim_inversion", "method.ddim_inversion.corrections=3")
    for name in ("loss", "loss_std", "minutes_per_image", "epochs", "nfe"):
        assert metrics[name] == metrics[f"ddim_inversion/{name}"]
    assert metrics["nfe"] == 24


def test_the_same_for_any_batch_size(tmp_path):
    options = ["num_images=5", "method=[naive,deq]", "epochs=5", "threshold=14"]
    done(tmp_path / "a", *options, "batch_size=5")
    done(tmp_path / "b", *options, "batch_size=1")
    for method in ("naive", "deq"):
        a, b = (InversionFiles(tmp_path / name, [method]).read(method) for name in "ab")
        same(a, b, but=("nfe",))  # shared by the images of a batch
        assert a["nfe"].mean() == pytest.approx(b["nfe"].mean())
        assert len(set(a["epochs"])) > 1


def test_interrupted_and_continued(tmp_path, monkeypatch, capsys):
    options = ["num_images=5", "batch_size=2", "method=[naive,deq]", "epochs=4"]
    whole = done(tmp_path / "whole", *options)
    write, written = InversionFiles.write, []

    def interrupted(self, *arguments):
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # `kill` ends it too
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(arguments)
        write(self, *arguments)

    monkeypatch.setattr(InversionFiles, "write", interrupted)
    assert invert(tmp_path / "killed", *options) == 130
    monkeypatch.undo()
    files = InversionFiles(tmp_path / "killed", ["naive", "deq"])
    assert {k: sorted(v.tolist()) for k, v in files.index().items()} == {"naive": [0, 1, 2, 3], "deq": [0, 1]}
    assert not (tmp_path / "killed/metrics.json").exists()
    (files.folder / "deq" / ".00000002.npz.1.tmp").write_bytes(b"half")
    before = {f: f.stat().st_mtime_ns for f in files.folder.rglob("*.npz")}

    again = done(tmp_path / "killed", f"resume={tmp_path / 'killed'}")
    assert {f: f.stat().st_mtime_ns for f in files.folder.rglob("*.npz")}.items() >= before.items()
    assert not list(files.folder.rglob(".*"))
    for method in ("naive", "deq"):
        same(files.read(method), InversionFiles(tmp_path / "whole", [method]).read(method))
        assert again[f"{method}/loss"] == pytest.approx(whole[f"{method}/loss"], rel=1e-5)
    said = mistake(capsys, tmp_path / "killed", *options, "lr=0.02")
    assert "holds a run with another config" in said
    assert "lr (0.01 there, 0.02 here)" in said


@pytest.mark.slow
def test_two_processes_share_the_batches(tmp_path):
    """The latents, losses and numbers of one process."""
    options = ["num_images=3", "batch_size=1", "method=[naive,deq]", "epochs=4"]
    whole, two = done(tmp_path / "one", *options), tmp_path / "two"
    command = [sys.executable, "-m", "steadyflow", "invert", *BASE, *options, "trainer=ddp_cpu", f"hydra.run.dir={two}"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr
    metrics = json.loads((two / "metrics.json").read_text())
    for method in ("naive", "deq"):
        one = InversionFiles(tmp_path / "one", [method]).read(method)
        same(InversionFiles(two, [method]).read(method), one)
        assert metrics[f"{method}/loss"] == pytest.approx(whole[f"{method}/loss"], rel=1e-5)


def test_images_of_a_zip_and_of_a_run(tmp_path, capsys):
    digits = Digits("test", size=8)
    write_png_zip(tmp_path / "zip", torch.arange(5), digits.images[:5])
    write_shard(tmp_path / "run/samples", torch.arange(5), digits.images[:5], digits.labels[:5])
    options = ["method=edict", "num_images=3", "first=1"]
    for source, label in (("zip", [10] * 3), ("run", digits.labels[1:4].tolist())):  # without labels the null label
        metrics = done(tmp_path / f"from_{source}", *options, f"images={tmp_path / source}")
        assert metrics["protocol"]["images"] == str(tmp_path / source)
        found = InversionFiles(tmp_path / f"from_{source}", ["edict"]).read("edict")
        assert found["index"].tolist() == [1, 2, 3]
        assert found["label"].tolist() == label
        assert np.array_equal(found["images"][..., 0], digits.images[1:4, 0])
    said = mistake(capsys, tmp_path / "x", f"images={tmp_path / 'zip'}", "first=3", "num_images=4")
    assert said.endswith("zip has 5 images, too few for 3 to 6; set num_images, first")
    write_shard(tmp_path / "run/samples", torch.arange(5), digits.images[5:10], digits.labels[5:10])
    said = mistake(capsys, tmp_path / "from_run", *options, f"images={tmp_path / 'run'}")
    assert "images (" in said  # other images are another run


def test_labels():
    own = torch.tensor([7, 8, 9])
    assert condition_labels("auto", own, 3, 10).tolist() == [7, 8, 9]
    assert condition_labels("auto", None, 3, 10).tolist() == [10] * 3  # the null label
    assert condition_labels(None, own, 3, 10).tolist() == [10] * 3
    assert condition_labels(3, own, 3, 10).tolist() == [3] * 3
    assert condition_labels("auto", own, 3, 0) is None
    for mode, of, classes, message in (
        (3, own, 0, "label=3, but this checkpoint has no classes; set label=null"),
        (10, own, 10, r"class 10, but this checkpoint's classes are 0\.\.9"),
        ("auto", own, 8, r"class 9, but this checkpoint's classes are 0\.\.7"),
        (True, own, 10, "label must be auto, null or a class number; got True"),
    ):
        with pytest.raises(ValueError, match=message):
            condition_labels(mode, of, 3, classes)


def test_a_stochastic_sampler(tmp_path, capsys):
    metrics = done(tmp_path / "a", "method=deq_sddim", "num_images=2", "epochs=3", "sampler.steps=4")
    run = json.loads((tmp_path / "a/run.json").read_text())
    assert run["config"]["sampler"]["eta"] == 1.0  # what the method chooses
    assert metrics["loss"] > 0
    line = mistake(capsys, tmp_path / "b", "method=edict", "sampler.eta=0.5")
    assert line == "edict inverts deterministic DDIM, got eta=0.5; set sampler=ddim sampler.eta=0"


def test_the_same_time_for_each(tmp_path):
    options = ["num_images=2", "epochs=100000", "threshold=0", "lr=1e-6"]  # so slow that no image is found exactly
    metrics = done(tmp_path, "method=[naive,deq]", *options, "budget=0.3", "clock=process")
    for method in ("naive", "deq"):
        assert 0.1 < 60 * metrics[f"{method}/minutes_per_image"] < 0.6  # the last epoch may take longer than expected
    assert metrics["deq/epochs"] > metrics["naive/epochs"] > 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=nave"], "no option 'nave' in the group method. Did you mean naive"),
        (["method=[naive,deq_dim]"], "no option 'deq_dim' in the group method. Did you mean deq_ddim"),
        (["epochs=0"], "epochs must be a positive integer, got 0"),
        (["budget=0"], "budget must be positive (seconds for an image) or null, got 0"),
        (["budget=-1.5"], "budget must be positive (seconds for an image) or null, got -1.5"),
        (["num_images=0"], "need num_images >= 1 and first >= 0, got 0 and 0"),
        (["num_images=201"], "digits test has 200 images, too few for 0 to 200"),
        (["batch_size=0"], "batch_size must be at least 1, got 0"),
        (["label=11"], "class 11, but this checkpoint's classes are 0..9"),
        (["label=cat"], "label must be auto, null or a class number; got 'cat'"),
        (["checkpoint=digits32"], "makes samples of shape (1, 32, 32), but dataset digits test has (1, 8, 8)"),
        (["images=nowhere"], "nowhere does not exist"),
        (["method.deq.gradient=exact"], "gradient must be one_step, phantom or ift, got 'exact'"),
    ],
)
def test_mistakes(tmp_path, capsys, overrides, message):
    said = mistake(capsys, tmp_path / "run", *overrides)
    assert message in said, said


def test_mistakes_in_the_choice_of_groups(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(f"{__name__}.BASE", ["checkpoint=analytic", "logger=none"])
    said = mistake(capsys, tmp_path, "dataset=gaussian_mixture")
    assert "holds vectors (2,); images are needed" in said
    said = mistake(capsys, tmp_path, "sampler=rk45", "dataset.size=8")
    assert said == "inversion needs a one-step sampler, got RK45; set sampler=ddim"


def test_nan_is_located_and_what_was_finished_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Empirical, "forward", not_a_number(Empirical.forward))
    said = mistake(capsys, tmp_path, "num_images=4", "batch_size=2", "method=naive", "epochs=2")
    assert "naive, images 2 to 3: the loss is not finite at epoch 1 of 2" in said
    assert f"what is finished is kept in {tmp_path / 'inversions'}" in said
    assert InversionFiles(tmp_path, ["naive"]).index()["naive"].tolist() == [0, 1]


def not_a_number(forward):
    """A denoiser that returns NaN for images of the classes of the digits 2 and 3."""
    labels = Digits("test").labels[2:4]

    def broken(self, x, alpha, sigma, label=None):
        out = forward(self, x, alpha, sigma, label)
        return out * float("nan") if label is not None and torch.equal(label, labels) else out

    return broken
