"""`steadyflow sample`, from the command line to the files, with exact denoisers."""

import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from steadyflow import cli
from steadyflow.callbacks.samples import SampleFiles
from steadyflow.checkpoints import embedded, load, save
from steadyflow.data import Digits, open_images
from steadyflow.denoisers import VelocityDenoiser
from steadyflow.grids import Quadratic
from steadyflow.jobs.sample import check_null
from steadyflow.networks import MLP
from steadyflow.noise import NoiseSource
from steadyflow.paths import ConditionalOT, VariancePreserving
from steadyflow.samplers import DDIM

DIGITS = ["checkpoint=analytic", "sampler.steps=5", "logger=none", "+trainer.enable_progress_bar=false"]
POINTS = [*DIGITS, "dataset=gaussian_mixture", "callbacks=none"]


def sample(directory, *overrides, base=DIGITS) -> int:
    return cli.main(["sample", *base, f"hydra.run.dir={directory}", *overrides])


def done(directory, *overrides, base=DIGITS):
    """The samples of a run in the order of their numbers, as float64, and its metrics."""
    assert sample(directory, *overrides, base=base) == 0
    metrics = json.loads((Path(directory) / "metrics.json").read_text())
    if base is POINTS:
        return SampleFiles(Path(directory), vector=True).vectors()[1].astype(float), metrics
    files = open_images(directory)
    batches = list(files.batches(64))
    x, index = torch.cat([x for _, x in batches]), torch.cat([i for i, _ in batches])
    return x[index.argsort()].double().numpy(), metrics


def mistake(capsys, *argv) -> str:
    """The one line said about a run that has to end with exit code 2."""
    capsys.readouterr()
    assert cli.main(["sample", *argv]) == 2
    said = capsys.readouterr().err.splitlines()
    lines = [line for line in said if line.startswith("steadyflow sample: error: ")]
    assert len(lines) == 1, said
    return lines[0].removeprefix("steadyflow sample: error: ")


def same(x, y, levels=1):
    """The same images: to the last bit of float32, which the rounding to bytes can show as one level."""
    assert x.shape == y.shape
    assert np.abs(x - y).max() <= levels
    assert (x != y).mean() < 1e-4


def test_what_a_run_leaves(tmp_path):
    x, metrics = done(tmp_path, "num_samples=24", "batch_size=8", "logger=csv", "sampler.steps=20")
    assert x.shape == (24, 1, 32, 32)
    shards = sorted((tmp_path / "samples").iterdir())
    assert [s.name for s in shards] == ["00000000.npz", "00000008.npz", "00000016.npz"]
    with np.load(shards[1]) as shard:
        assert {k: (shard[k].dtype, shard[k].shape) for k in shard.files} == {
            "images": (np.uint8, (8, 32, 32, 1)),
            "index": (np.int64, (8,)),
            "label": (np.int64, (8,)),
        }
        assert shard["index"].tolist() == list(range(8, 16))
        assert shard["label"].tolist() == [i % 10 for i in range(8, 16)]  # balanced where there are classes
    for name in ("fid", "kid"):
        assert np.isfinite(metrics[name])
        assert {"features", "reference", "count", "resize"} <= metrics["protocol"][name].keys()
    assert metrics["nfe"] == 20
    assert metrics["protocol"]["seconds_per_image"]["count"] == 16  # the first batch is warm-up
    assert metrics["seconds_per_image"] > 0
    grid = Image.open(tmp_path / "grid.png").copy()
    assert grid.size == (2 + 10 * 34, 2 + 3 * 34)  # ten columns, a class each
    assert np.array_equal(np.asarray(grid)[2:34, 36:68], x[1, 0])
    assert (tmp_path / ".hydra" / "config.yaml").exists()
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["config"]["sampler"]["steps"] == 20
    assert len(run["starts"]) == 1
    assert "fid" in (tmp_path / "logs" / "version_0" / "metrics.csv").read_text()
    digits = Digits()  # the exact denoiser of a finite set ends on its members
    data = digits.images.flatten(1).double()
    distance, nearest = torch.cdist(torch.from_numpy(x).flatten(1), data).min(1)
    assert (distance / 32 < 3).all()  # grey levels, root mean square
    assert digits.labels[nearest].tolist() == [i % 10 for i in range(24)]


def test_same_images_for_any_batch_size(tmp_path):
    x, _ = done(tmp_path / "32", "num_samples=12", "callbacks=none", "sampler.eta=1")
    for batch_size in (1, 5):
        y, _ = done(
            tmp_path / str(batch_size), "num_samples=12", "callbacks=none", "sampler.eta=1", f"batch_size={batch_size}"
        )
        same(x, y)
    other, _ = done(tmp_path / "seed", "num_samples=12", "callbacks=none", "sampler.eta=1", "seed=1")
    assert np.abs(x - other).max() > 100


@pytest.mark.parametrize("format", ["npz", "png"])
def test_interrupted_and_continued(tmp_path, monkeypatch, format):
    options = ["num_samples=13", "batch_size=3", f"format={format}"]
    x, whole = done(tmp_path / "whole", *options)
    write, written = SampleFiles.write, []

    def interrupted(self, samples):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(samples)
        write(self, samples)

    monkeypatch.setattr(SampleFiles, "write", interrupted)
    assert sample(tmp_path / "killed", *options) == 130
    monkeypatch.undo()
    folder = tmp_path / "killed" / "samples"
    assert sorted(SampleFiles(tmp_path / "killed", format).index()) == list(range(6))
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    (folder / ".00000006.npz.1.tmp").write_bytes(b"half")

    y, metrics = done(tmp_path / "killed", *options[:1], "batch_size=5", *options[2:])
    assert np.array_equal(x, y) or same(x, y) is None
    assert metrics["protocol"]["nfe"]["count"] == 7  # only what was missing
    assert metrics["fid"] == pytest.approx(whole["fid"], rel=1e-6)
    assert not list(folder.glob(".*"))
    if format == "npz":
        assert {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}.items() >= before.items()
    else:
        assert [f.name for f in folder.iterdir()] == ["images.zip"]

    z, again = done(tmp_path / "killed", *options[:1], *options[2:])  # nothing is missing
    assert np.array_equal(y, z)
    assert again == metrics


def test_resume_needs_no_repeated_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", *POINTS, "num_samples=6", "seed=4"]) == 0
    (directory,) = (p.parent for p in tmp_path.glob("outputs/sample/*/*/run.json"))
    file = next((directory / "samples").iterdir())
    x = np.load(file)["samples"]
    for resume in ("latest", directory):
        file.unlink()
        assert cli.main(["sample", f"resume={resume}", "batch_size=2"]) == 0
        found, y, _ = SampleFiles(directory, vector=True).vectors()
        assert found.tolist() == list(range(6))
        np.testing.assert_allclose(x, y, atol=1e-6)
        for shard in (directory / "samples").iterdir():
            shard.unlink()
        np.savez(file, samples=x, index=np.arange(6))
    assert len(list(tmp_path.rglob("run.json"))) == 1  # nowhere else
    assert "seed: 4" in (directory / ".hydra" / "config.yaml").read_text()
    said = mistake(capsys, "resume=latest", "sampler.steps=9")
    assert f"{directory} holds a run with another config: sampler.steps (5 there, 9 here)" in said
    assert "no run.json there" in mistake(capsys, "resume=elsewhere")


def test_another_config_is_refused(tmp_path, capsys):
    assert sample(tmp_path, "num_samples=4", base=POINTS) == 0
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and f.suffix != ".log"}
    del before[tmp_path / ".hydra" / "hydra.yaml"]
    said = mistake(capsys, *POINTS, f"hydra.run.dir={tmp_path}", "num_samples=5", "seed=2", "sampler=heun")
    for key in ("num_samples (4 there, 5 here)", "seed (0 there, 2 here)", "sampler._target_", "sampler.churn"):
        assert key in said
    assert "trainer" not in said
    assert {f: f.read_bytes() for f in before} == before


def test_labels_and_guidance(tmp_path, capsys):
    options = ["num_samples=8", "callbacks=none", "label=3"]
    _, metrics = done(tmp_path / "plain", *options)
    assert open_images(tmp_path / "plain").label.tolist() == [3] * 8
    assert metrics["nfe"] == 5
    _, metrics = done(tmp_path / "guided", *options, "guidance_scale=2")
    assert metrics["nfe"] == 10
    assert metrics["protocol"]["nfe"]["guidance_scale"] == 2
    _, _ = done(tmp_path / "none", *options[:2], "label=null")
    assert open_images(tmp_path / "none").label.tolist() == [10] * 8  # the null label
    dir = f"hydra.run.dir={tmp_path / 'x'}"
    assert "label=3, but this checkpoint has no classes" in mistake(capsys, *POINTS, dir, "label=3")
    assert "guidance_scale=2.0 guides towards a class" in mistake(capsys, *POINTS, dir, "guidance_scale=2.0")
    assert not (tmp_path / "x" / "run.json").exists()  # refused before the directory is taken


def test_guidance_of_a_checkpoint_that_always_saw_a_class_is_warned_of(caplog):
    label = torch.tensor([1, 2])
    for dropout, scale, given, warned in ((0, 2.0, label, True), (0, 1.0, None, True), (0, 1.0, label, False),
                                          (0.1, 2.0, None, False)):  # fmt: skip
        caplog.clear()
        check_null(replace(embedded("digits32"), card={"label_dropout": dropout}), given, scale)
        assert [f"as {'label=null' if scale == 1 else 'guidance_scale=2'} asks" in r.getMessage()
                for r in caplog.records] == [True] * warned  # fmt: skip
    assert embedded("digits32").card["config"]["label_dropout"] == 0.1


def test_without_a_dataset_the_same_images_unscored(tmp_path, capsys):
    options = ["checkpoint=digits32", "num_samples=2", "sampler.steps=1"]
    x, _ = done(tmp_path / "with", *options, "callbacks=none")
    y, metrics = done(tmp_path / "without", *options, "dataset=none")
    np.testing.assert_array_equal(x, y)
    assert "fid" not in metrics
    assert "dataset: dataset=none has no images" in mistake(capsys, *DIGITS, "dataset=none")


def test_points(tmp_path):
    x, metrics = done(
        tmp_path,
        "num_samples=800",
        "batch_size=256",
        "sampler=heun",
        "sampler.steps=18",
        "callbacks=default",
        base=POINTS,
    )
    modes = 2 * np.stack([[np.cos(a), np.sin(a)] for a in np.arange(8) * np.pi / 4])
    distance = np.linalg.norm(x[:, None] - modes, axis=2)
    counts = np.bincount(distance.argmin(1), minlength=8)
    assert ((counts - 100) ** 2 / 100).sum() < 24.3  # chi-square, 7 degrees of freedom, 1 in 1000
    residual = x - modes[distance.argmin(1)]
    assert residual.std() == pytest.approx(0.3, rel=0.05)
    assert metrics["nfe"] == 35
    assert metrics["fid"] is None
    assert "vectors" in metrics["reason"]["fid"]
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (600, 600)


BROKEN = """
import torch
from steadyflow.checkpoints import analytic
from steadyflow.denoisers import Denoiser

class NotANumber(Denoiser):
    '''A denoiser that returns NaN for its third batch, once sigma is below 1/2.'''
    def __init__(self, denoiser):
        super().__init__()
        self.denoiser, self.calls = denoiser, 0
    def forward(self, x, alpha, sigma):
        self.calls += 1
        out = self.denoiser(x, alpha, sigma)
        return out * float("nan") if self.calls > 10 and float(sigma) < 0.5 else out

def broken(dataset, path):
    exact = analytic(dataset, path)
    return type(exact)("broken", NotANumber(exact.denoiser), path, exact.shape, 0, "0")
"""


def test_nan_is_located_and_what_was_finished_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(BROKEN)
    Path("conf/checkpoint").mkdir(parents=True)
    Path("conf/checkpoint/broken.yaml").write_text(
        "defaults: [{/path@path: vp}, _self_]\n_target_: mine.broken\ndataset: ${dataset}\n"
    )
    options = ["--config-dir", "conf", *POINTS, "checkpoint=broken", "num_samples=12", "batch_size=4"]
    said = mistake(capsys, *options, "hydra.run.dir=run")
    assert "samples 8 to 11: the state is not finite after step" in said
    assert "8 of 12 samples are finished and kept in" in said
    index, kept, _ = SampleFiles(Path("run"), vector=True).vectors()
    assert index.tolist() == list(range(8))
    x, _ = done(tmp_path / "exact", "num_samples=12", base=POINTS)
    np.testing.assert_allclose(kept, x[:8], atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sampler.stepz=5"], "no key or group 'sampler.stepz' in this config. Did you mean sampler.steps"),
        (["sampler=dddim"], "no option 'dddim' in the group sampler. Did you mean ddim"),
        (["sampler.steps=0"], "steps must be a positive integer, got 0; set steps (sampler.steps=20)"),
        (["num_samples=0"], "num_samples must be at least 1, got 0"),
        (["batch_size=0"], "batch_size must be at least 1, got 0"),
        (["seed=-1"], "the seed and the sample indices must lie in [0, 2^64), got -1"),
        (["trainer.precision=17"], "17"),
        (["classifier=x"], "classifier=x is no group; choose it by +checkpoint@classifier=x"),
        (["checkpoint@classifier=path"], "Did you mean checkpoint? (+checkpoint@classifier=... adds it.)"),
        (["format=jpg"], "format must be npz or png, got 'jpg'"),
        (["dataset=mnist", "data_dir=nowhere", "checkpoint=digits32"], "nowhere"),
        (["checkpoint=path", "checkpoint.file=nowhere"], "nowhere"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, overrides, message):
    monkeypatch.chdir(tmp_path)
    said = mistake(capsys, *DIGITS, "hydra.run.dir=run", *overrides)
    assert message in said, said
    assert not (tmp_path / "run" / "run.json").exists()  # so the corrected command can use the same folder


def test_an_output_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    said = mistake(capsys, *DIGITS, f"hydra.run.dir={tmp_path / 'file' / 'run'}")
    assert str(tmp_path / "file") in said


def test_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", "-m", *POINTS, "num_samples=4", "sampler.steps=2,3", "hydra.sweep.dir=sweep"]) == 0
    assert [json.loads(Path(f"sweep/{i}/metrics.json").read_text())["nfe"] for i in (0, 1)] == [2, 3]


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path, monkeypatch):
    """Each cell of a sweep is a run of its own, with the metrics and the picture."""
    monkeypatch.chdir(tmp_path)
    overrides = ["num_samples=2", "sampler.steps=2,3", "logger=wandb", "logger.offline=true", "hydra.sweep.dir=sweep"]
    assert cli.main(["sample", "-m", *POINTS, *overrides]) == 0
    for cell in (0, 1):
        (run,) = Path(f"sweep/{cell}/wandb").glob("offline-run-*")
        (log,) = run.glob("run-*.wandb")
        said, end = (b"seconds_per_image", b"nfe", b"media/images/samples"), time.monotonic() + 30
        while not all(word in log.read_bytes() for word in said):  # another process writes it
            assert time.monotonic() < end, log.read_bytes()
            time.sleep(0.1)
        assert list(run.glob("files/media/images/samples*.png"))


def saved(directory: Path) -> Path:
    """A checkpoint on disk: a small random network for points of the plane, with three classes."""
    torch.manual_seed(0)
    network = MLP(2, width=16, blocks=1, num_classes=3)
    torch.nn.init.normal_(next(p for p in network.parameters() if not p.any()), std=0.1)
    nodes = {
        "network": {"_target_": "steadyflow.networks.MLP", "dim": 2, "width": 16, "blocks": 1, "num_classes": 3},
        "path": {"_target_": "steadyflow.paths.ConditionalOT"},
        "denoiser": {"_target_": "steadyflow.denoisers.VelocityDenoiser"},
    }
    save(directory, VelocityDenoiser(network, ConditionalOT()), nodes, (2,), 3, {"made": "by a test"})
    return directory


def test_a_checkpoint_is_sampled_on_its_own_path_or_another(tmp_path):
    checkpoint = load(saved(tmp_path / "model"))
    options = [f"checkpoint.file={tmp_path / 'model'}", "num_samples=6", "checkpoint=path", "label=random", "seed=2"]
    x, _ = done(tmp_path / "own", *options, base=POINTS)
    label = torch.from_numpy(SampleFiles(tmp_path / "own", vector=True).vectors()[2])
    noise = NoiseSource(2, range(6), (2,))
    expected = DDIM(ConditionalOT(), Quadratic(), 5)(checkpoint.denoiser, noise, label=label)
    np.testing.assert_allclose(x, expected.double(), atol=1e-6)
    y, _ = done(tmp_path / "vp", *options, "path@sampler.path=vp", base=POINTS)
    expected = DDIM(VariancePreserving(), Quadratic(), 5)(checkpoint.denoiser, noise, label=label)
    np.testing.assert_allclose(y, expected.double(), atol=1e-6)
    assert np.abs(x - y).max() > 1e-3


def test_a_checkpoint_that_is_damaged_or_does_not_fit(tmp_path, capsys):
    directory = saved(tmp_path / "model")
    run = [f"hydra.run.dir={tmp_path / 'run'}", f"checkpoint.file={directory}"]
    said = mistake(capsys, *DIGITS, *run, "checkpoint=path")
    assert "makes samples of shape (2,), but dataset digits has (1, 32, 32)" in said
    weights = directory / "model.safetensors"
    content = bytearray(weights.read_bytes())
    found = hashlib.sha256(content).hexdigest()
    content[-1] ^= 1
    weights.write_bytes(content)
    said = mistake(capsys, *POINTS, *run, "checkpoint=path")
    for part in (str(weights), found[:8], hashlib.sha256(content).hexdigest()[:8]):
        assert part in said
    weights.write_bytes(content[:-100])
    assert str(weights) in mistake(capsys, *POINTS, *run, "checkpoint=path")
    assert not (tmp_path / "run" / "run.json").exists()


def test_changed_weights_are_another_run(tmp_path, capsys):
    directory = saved(tmp_path / "model")
    run = [f"hydra.run.dir={tmp_path / 'run'}", f"checkpoint.file={directory}", "checkpoint=path", "num_samples=4"]
    assert sample(tmp_path / "run", *run[1:], base=POINTS) == 0
    (directory / "config.yaml").unlink()
    config = load(saved(directory)).denoiser.network
    assert sample(tmp_path / "run", *run[1:], base=POINTS) == 0  # the same weights, saved again
    with torch.no_grad():
        next(config.parameters()).add_(0.1)
    nodes = yaml.safe_load((directory / "config.yaml").read_text())
    nodes = {name: nodes[name] for name in ("network", "path", "denoiser")}
    save(directory, VelocityDenoiser(config, ConditionalOT()), nodes, (2,), 3, {})
    assert "checkpoint (" in mistake(capsys, *POINTS, *run)
