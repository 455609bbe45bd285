"""`steadyflow train`: what a run leaves, how it continues, what it refuses."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from steadyflow import checkpoints, cli
from steadyflow.data import GaussianMixtureSamples
from steadyflow.data.batches import HeldOutBatches, TrainingBatches
from steadyflow.jobs.train import build
from steadyflow.launch import config_dir
from steadyflow.modules.losses import Constant, UniformTimes, denoising_loss

TINY = [
    "dataset=gaussian_mixture",
    "dataset.count=60",
    "network=mlp",
    "network.width=16",
    "network.blocks=1",
    "batch_size=16",
    "warmup=2",
    "val_every=6",
    "log_every=1",
    "+trainer.enable_progress_bar=false",
]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(name, *overrides): the exit code of a training in the directory `name`."""
    monkeypatch.chdir(tmp_path)
    return lambda name, *overrides: cli.main(["train", *TINY, f"hydra.run.dir={name}", *overrides])


@pytest.fixture
def mistake(run, capsys):
    """The one line said about a command that has to end with exit code 2."""

    def said(*overrides, name="refused"):
        assert run(name, *overrides) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("steadyflow train: error: ")
        return line.removeprefix("steadyflow train: error: ")

    return said


def test_a_run_leaves_the_averaged_weights_with_the_loss_it_says(run):
    assert run("one", "max_steps=8", "save_every=5", "seed=3") == 0
    made = checkpoints.load("one")
    metrics = json.loads(Path("one/metrics.json").read_text())
    assert (made.shape, made.num_classes) == ((2,), 0)
    held_out = HeldOutBatches(GaussianMixtureSamples(**mixture(), split="test", count=60), 60, seed=3)
    batch = next(iter(held_out))
    with torch.no_grad():
        t = UniformTimes(1e-3, 1.0)(made.path, batch.u)
        loss = denoising_loss(made.denoiser, batch.x0, batch.eps, t, Constant()).mean()
    assert metrics["val_loss"] == pytest.approx(float(loss), rel=1e-5)
    last = torch.load("one/checkpoints/last.ckpt", weights_only=True)
    averaged, plain = last["state_dict"], last["current_model_state"]
    own = made.denoiser.state_dict()
    assert all(torch.equal(averaged[f"denoiser.{key}"], value) for key, value in own.items())
    assert not all(torch.equal(plain[f"denoiser.{key}"], value) for key, value in own.items())
    card = made.card
    assert (card["steps"], card["seed"], card["config"]["max_steps"]) == (8, 3, 8)
    assert card["metrics"]["val_loss"] == metrics["val_loss"]
    assert metrics["parameters"] == sum(p.numel() for p in made.denoiser.parameters())
    rows = csv.DictReader(Path("one/logs/version_0/metrics.csv").read_text().splitlines())
    assert [int(r["step"]) for r in rows if r["train/loss"]] == list(range(8))


def mixture():
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        dataset = dict(compose("train", ["dataset=gaussian_mixture"]).dataset)
    return {key: dataset[key] for key in ("means", "covariances", "weights")}


def test_training_begins_with_the_weights_of_another_run(run, mistake):
    assert run("first", "max_steps=4", "seed=1") == 0
    assert run("tuned", "max_steps=1", "init=first", "lr=1e-12", "warmup=0", "seed=2") == 0
    first, tuned = (checkpoints.load(name).model.state_dict() for name in ("first", "tuned"))
    for key, value in first.items():
        torch.testing.assert_close(tuned[key], value, rtol=0, atol=1e-9)
    assert "init=first holds the weights of another network" in mistake("init=first", "network.width=8")
    assert "no checkpoint in nowhere" in mistake("init=nowhere")


def test_a_finished_run_is_left_as_it_is_and_another_config_is_refused_by_key(run, mistake):
    assert run("one", "max_steps=4") == 0
    before = {f: Path("one", f).read_bytes() for f in ("model/model.safetensors", "metrics.json")}
    assert run("one", "max_steps=4", "workers=0", "save_every=2") == 0  # what may differ
    assert {f: Path("one", f).read_bytes() for f in before} == before
    said = mistake("max_steps=4", "lr=0.5", name="one")
    assert "another config" in said
    assert "lr (0.001 there, 0.5 here)" in said
    assert {f: Path("one", f).read_bytes() for f in before} == before


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_an_epoch_ends_as_if_it_had_not_been(run, mistake, tmp_path):
    """SIGKILL, wherever it strikes; `resume=DIR` alone continues; the exported weights agree bit for bit."""
    overrides = ["max_steps=400", "save_every=10", "network.dropout=0.2", "accumulate=2"]
    assert run("straight", *overrides) == 0
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    command = [sys.executable, "-m", "steadyflow", "train", *TINY, *overrides, f"hydra.run.dir={tmp_path / 'killed'}"]
    process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 600
    while not last.exists():
        assert process.poll() is None, "it ended before it saved"
        assert time.monotonic() < deadline, "it never saved"
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    assert "another process writes to" in mistake(*overrides, name="killed")
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = torch.load(last, weights_only=True)["global_step"]
    assert 0 < step < 400
    assert step * 16 % 60, "an epoch had just ended"
    assert not (tmp_path / "killed" / "model").exists()
    assert cli.main(["train", "resume=killed"]) == 0
    for file in ("model/model.safetensors", "model/config.yaml"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "straight" / file).read_bytes()
    one, two = (json.loads((tmp_path / d / "metrics.json").read_text()) for d in ("straight", "killed"))
    assert one["val_loss"] == two["val_loss"]
    assert (tmp_path / "killed/logs/version_0").is_dir()  # the curve until then is kept
    assert (tmp_path / "killed/logs/version_1/metrics.csv").exists()


def test_a_loss_that_is_not_finite_is_one_line_that_names_the_step(mistake):
    said = mistake("max_steps=30", "save_every=2", "optimizer.lr=1e12", "clip=null", "warmup=0")
    assert "training loss is not finite at step" in said or "weights are not finite after step" in said


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["max_steps=0", "warmup=0"], "max_steps must be a positive integer, got 0"),
        (["batch_size=10", "accumulate=4"], "batch_size 10 must be a positive multiple of 4"),
        (["network.num_classes=5"], "5 classes and the dataset gaussian_mixture 0"),
        (["network.dim=3"], "does not take the dataset's shape (2,)"),
        (["label_dropout=0.1"], "label_dropout 0.1 needs a class-conditional network"),
        (["warmup=2000"], "need 0 <= warmup <= max_steps"),
        (["lr_decay=linear"], "lr_decay must be null or cosine"),
        (["save_every=0"], "save_every must be at least 1"),
        (["trainer.precision=bf16-true"], "set trainer.precision to bf16-mixed"),
    ],
)
def test_mistakes_are_one_line(mistake, overrides, message):
    said = mistake(*overrides)
    assert message in said
    assert not Path("refused/model").exists()


def options(group):
    return sorted(p.stem for p in (config_dir() / group).glob("*.yaml"))


@pytest.mark.parametrize("prediction", [p for p in options("prediction") if p != "noise"])
def test_every_path_times_and_weight_trains_every_prediction(prediction):
    """One loss and gradient of each combination is finite and not zero. (Linear diffusions, whose prediction is the
    noise: tests/modules/test_linear_training.py.)"""
    data = GaussianMixtureSamples([[0.0, 0.5], [1.0, 0.0]], 0.1, count=30)
    batch = TrainingBatches(data, 16, 1, seed=0).batch(0)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for path in [p for p in options("path") if p not in ("bdm", "cld")]:
            for times, weight in [
                *((t, "constant") for t in options("times")),
                *(("uniform", w) for w in options("weight")),
            ]:
                choices = [f"prediction={prediction}", f"path={path}", f"times={times}", f"weight={weight}"]
                cfg = compose("train", ["network=mlp", "network.width=8", "network.blocks=1", *choices])
                denoiser = build(cfg, data)
                torch.nn.init.normal_(denoiser.network.head.weight)
                t = instantiate(cfg.times)(denoiser.path, batch.u)
                loss = denoising_loss(denoiser, batch.x0, batch.eps, t, instantiate(cfg.weight)).mean()
                gradient = torch.autograd.grad(loss, denoiser.network.head.weight)[0]
                assert loss.isfinite(), choices
                assert loss > 0, choices
                assert gradient.isfinite().all(), choices
                assert gradient.any(), choices
