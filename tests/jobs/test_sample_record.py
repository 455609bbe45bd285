"""run.json: the right to continue in a directory."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, read_write

import steadyflow
from steadyflow.jobs.record import claim, environment, resumed, run_directory

PRIMARY = """
defaults: [{sampler: ddim}, _self_]
resume: null
seed: 0
batch_size: 32
data_dir: here
root: ${data_dir}/x
trainer: {devices: 1, precision: 32}
hydra: {run: {dir: "${run_dir:${resume},outputs/job/new}"}}
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A start of a job as Hydra makes it: start(*overrides) -> (cfg, directory), with the files Hydra writes."""
    monkeypatch.chdir(tmp_path)
    configs = tmp_path / "configs"
    (configs / "sampler").mkdir(parents=True)
    (configs / "job.yaml").write_text(PRIMARY)
    (configs / "sampler" / "ddim.yaml").write_text("{name: ddim, steps: 20}")
    (configs / "sampler" / "heun.yaml").write_text("{name: heun, steps: 20, churn: 0}")
    with initialize_config_dir(str(configs), version_base="1.3"):

        def start(*overrides):
            cfg = compose("job", list(overrides), return_hydra_config=True)
            directory = tmp_path / cfg.hydra.run.dir
            with read_write(cfg.hydra.runtime):
                cfg.hydra.runtime.output_dir = str(directory)
            HydraConfig.instance().set_config(cfg)
            (directory / ".hydra").mkdir(parents=True, exist_ok=True)
            plain = OmegaConf.masked_copy(cfg, [k for k in cfg if k != "hydra"])
            (directory / ".hydra" / "config.yaml").write_text(OmegaConf.to_yaml(plain))
            return plain, directory

        yield start
    HydraConfig.instance().cfg = None


def test_same_config_continues_and_another_is_refused_by_key(start):
    cfg, directory = start("seed=1")
    assert claim(directory, cfg, ignore=["batch_size"]) is False
    before = (directory / "run.json").read_text()
    cfg, _ = start("seed=1", "batch_size=7", "trainer.devices=2", "data_dir=/elsewhere", "trainer.precision=32-true")
    assert claim(directory, cfg, ignore=["batch_size"]) is True
    assert len(json.loads((directory / "run.json").read_text())["starts"]) == 2
    (directory / "run.json").write_text(before)

    cfg, _ = start("seed=2", "sampler=heun", "trainer.precision=bf16", "trainer.devices=3")
    with pytest.raises(ValueError) as error:
        claim(directory, cfg)
    message = str(error.value)
    assert "seed (1 there, 2 here), " in message
    assert "sampler.name (ddim there, heun here)" in message
    assert "sampler.churn (absent there, 0 here)" in message
    assert "trainer.precision (32-true there, bf16-mixed here)" in message
    assert "steps" not in message
    assert "devices" not in message
    assert (directory / "run.json").read_text() == before
    assert yaml.safe_load((directory / ".hydra" / "config.yaml").read_text())["seed"] == 1  # Hydra had written seed 2
    cfg, _ = start("seed=1", "batch_size=7")
    with pytest.raises(ValueError, match="batch_size"):
        claim(directory, cfg)


def test_changed_inputs_are_refused(start):
    cfg, directory = start()
    claim(directory, cfg, inputs={"checkpoint": "aa"})
    with pytest.raises(ValueError, match=r"checkpoint \(aa there, bb here\)"):
        claim(directory, cfg, inputs={"checkpoint": "bb"})


def test_resume_takes_the_recorded_overrides(start):
    cfg, directory = start("seed=3", "sampler=heun", "trainer.devices=2")
    claim(directory, cfg)
    cfg, again = start("resume=latest", "trainer.devices=1")
    assert (again, cfg.seed) == (directory, 0)
    cfg = resumed(cfg)
    assert (cfg.seed, cfg.sampler.name, cfg.trainer.devices) == (3, "heun", 1)
    assert claim(again, cfg) is True
    assert yaml.safe_load((directory / ".hydra" / "config.yaml").read_text())["seed"] == 3
    record = json.loads((directory / "run.json").read_text())
    assert record["overrides"] == ["seed=3", "sampler=heun", "trainer.devices=1"]
    cfg, _ = start(f"resume={directory}", "seed=4")
    with pytest.raises(ValueError, match=r"seed \(3 there, 4 here\)"):
        claim(directory, resumed(cfg))


def test_resume_finds_the_last_started_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_directory(None, "outputs/job/d/t") == "outputs/job/d/t"
    with pytest.raises(FileNotFoundError, match="no run below"):
        run_directory("latest", "outputs/job/d/t")
    for i, name in enumerate(["b/2", "a/1", "c/3"]):
        (tmp_path / "outputs/job" / name).mkdir(parents=True)
        file = tmp_path / "outputs/job" / name / "run.json"
        file.touch()
        os.utime(file, (i, i))
    assert run_directory("latest", "outputs/job/d/t") == "outputs/job/c/3"
    assert run_directory("outputs/job/a/1", "outputs/job/d/t") == "outputs/job/a/1"
    with pytest.raises(FileNotFoundError, match=r"no run\.json"):
        run_directory("outputs/job/a", "outputs/job/d/t")


def test_unwritable_directory_says_so(start, tmp_path):
    cfg, _ = start()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to .*file/run .*set hydra.run.dir"):
        claim(tmp_path / "file" / "run", cfg)


def test_only_the_first_process_writes(start, monkeypatch):
    cfg, directory = start()
    monkeypatch.setenv("LOCAL_RANK", "1")
    claim(directory, cfg)
    assert not (directory / "run.json").exists()


def test_environment_records_what_runs():
    found = environment()
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert found["precision"]["threads"] == torch.get_num_threads()
    assert found["precision"]["float32_matmul_precision"] == torch.get_float32_matmul_precision()
    source = Path(steadyflow.__file__).parent
    head = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True)
    tracked = subprocess.run(["git", "-C", source, "ls-files", "noise.py"], capture_output=True, text=True).stdout
    assert (found["git"] or {}).get("revision") == (head.stdout.strip() if tracked else None)
