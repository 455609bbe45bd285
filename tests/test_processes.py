"""The command in processes of its own: interruption, launchers, and DDP inside a sweep."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TRAIN = ["train", "dataset=toy2d", "network=mlp", "network.width=8", "batch_size=8", "warmup=0", "ema=null"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def steadyflow(folder: Path, *argv: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the installed command in `folder`."""
    command = [str(Path(sys.executable).parent / "steadyflow"), *argv]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, f"{done.stdout}\n{done.stderr}"
    return done


@pytest.mark.slow
def test_ctrl_c_ends_a_training_run_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "steadyflow", *TRAIN, "max_steps=1000000", "save_every=5", "hydra.run.dir=run"]
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=err)
        while process.poll() is None and not (tmp_path / "run/checkpoints/last.ckpt").exists():
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert (tmp_path / "err").read_text().splitlines() == ["steadyflow train: interrupted"]


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [True, False], ids=["from the terminal", "to one process"])
def test_ctrl_c_ends_a_sweep_and_the_process_of_its_run(everyone: bool, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, pathlib, time\n\n\nclass Slow:\n    def __init__(self, split):\n"
        "        pathlib.Path('pid').write_text(str(os.getpid()))\n        time.sleep(300)\n"
    )
    data = ["+trainer.devices=2", "~dataset", "+dataset={_target_: mine.Slow, split: train}"]
    command = [sys.executable, "-m", "steadyflow", "prepare", "-m", *data]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    pid = tmp_path / "pid"
    while process.poll() is None and not (pid.exists() and pid.read_text()):
        time.sleep(0.1)
    if everyone:
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "steadyflow prepare: interrupted\n"), out
    assert int(pid.read_text()) != process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.slow
def test_each_ddp_run_of_a_sweep_is_a_process_of_its_own(tmp_path: Path) -> None:
    overrides = ["trainer=ddp_cpu", "max_steps=2", "seed=0,1", "validate=false", "logger=none"]
    done = steadyflow(tmp_path, *TRAIN, "-m", *overrides, "hydra.sweep.dir=sweep")
    assert done.stdout.count("Launching 2 jobs locally") == 1
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir()) == ["0", "1", "multirun.yaml"]
    for seed in ("0", "1"):
        cell = tmp_path / "sweep" / seed
        record = json.loads((cell / "run.json").read_text())
        assert (record["config"]["seed"], record["config"]["trainer"]["devices"]) == (int(seed), 2)
        assert len(record["starts"]) == 1
        assert json.loads((cell / "metrics.json").read_text())["steps"] == 2
        assert f"- seed={seed}" in (cell / ".hydra" / "overrides.yaml").read_text()
        assert (cell / "train_ddp_process_1.log").is_file()  # the second process had the first's directory


@pytest.mark.slow
def test_a_mistake_in_such_a_process_is_told_once(tmp_path: Path) -> None:
    sweep = ["-m", "+trainer.devices=2", "dataset=gaussian_mixture", "dataset.covariances=-1"]
    done = steadyflow(tmp_path, "prepare", *sweep, "hydra.sweep.dir='a=1, b'", code=2)
    assert done.stderr.startswith(
        "steadyflow prepare: error: dataset: each covariance must be symmetric and positive definite"
    )
    assert done.stderr.endswith("(in the run +trainer.devices=2 dataset=gaussian_mixture dataset.covariances=-1)\n")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "a=1, b" / "0" / ".hydra" / "config.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["+sweep=joblib", "hydra/launcher=submitit_local"])
def test_launchers(launcher: str, tmp_path: Path) -> None:
    """The user's class is found and the mistake of one run is told, from workers that share nothing with the sweep."""
    name = "joblib" if "joblib" in launcher else "submitit"
    pytest.importorskip(f"hydra_plugins.hydra_{name}_launcher")
    (tmp_path / "mine.py").write_text(
        "from steadyflow.data import GaussianMixtureSamples\n\n\nclass Mine(GaussianMixtureSamples):\n    pass\n"
    )
    sweep = [launcher] if name == "joblib" else ["-m", launcher]
    data = ["dataset=gaussian_mixture", "dataset._target_=mine.Mine", "dataset.covariances=0.09,-1"]
    done = steadyflow(tmp_path, "prepare", *sweep, "hydra.sweep.dir=sweep", *data, code=2)
    assert done.stderr.startswith("steadyflow prepare: error: ")
    assert "dataset.covariances=-1)" in done.stderr
    assert done.stderr.count("\n") == 1
