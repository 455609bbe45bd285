"""The presets `+sweep=...`: each makes a multirun by itself."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from steadyflow import cli

CONFIGS = Path(__file__).parents[2] / "configs"
POINTS = ["dataset=gaussian_mixture", "checkpoint=analytic", "callbacks=none", "logger=none", "num_samples=2"]
SWEEPS = {  # preset: the plugin it needs, how its parameters are given, and how many runs that makes
    "grid": (None, ["sampler=ddim,heun", "sampler.steps=2,3"], 4),
    "joblib": ("hydra_joblib_launcher", ["sampler.steps=2,3", "hydra.launcher.n_jobs=1"], 2),
    "optuna": (
        "hydra_optuna_sweeper",
        [
            "objective=nfe",
            "sampler.steps=range(2,5)",
            "hydra.sweeper.n_trials=8",
            "hydra.sweeper.storage=sqlite:///a.db",
        ],
        8,
    ),
    "ray": ("hydra_ray_launcher", ["sampler.steps=2,3"], 2),
}


def test_every_preset_is_run_here_and_is_a_multirun() -> None:
    presets = {file.stem: yaml.safe_load(file.read_text()) for file in (CONFIGS / "sweep").glob("*.yaml")}
    assert presets.keys() == {*SWEEPS, "c_pigdm_grid"}  # test_restore.py runs that one
    assert all(preset["hydra"]["mode"] == "MULTIRUN" for preset in presets.values())


@pytest.mark.filterwarnings("ignore")  # of the plugins
@pytest.mark.parametrize("preset", SWEEPS)
def test_preset(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin, parameters, count = SWEEPS[preset]
    if plugin and not find_spec(f"hydra_plugins.{plugin}"):
        pytest.skip(f"{plugin} is not installed")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", *POINTS, f"+sweep={preset}", *parameters, "hydra.sweep.dir=sweep"]) == 0
    found = sorted((tmp_path / "sweep").glob("*/metrics.json"))
    assert [file.parent.name for file in found] == [str(n) for n in range(count)]
    configs = [yaml.safe_load((file.parent / ".hydra" / "config.yaml").read_text())["sampler"] for file in found]
    if preset == "grid":
        pairs = [(config["_target_"].rpartition(".")[2], config["steps"]) for config in configs]
        assert pairs == [("DDIM", 2), ("DDIM", 3), ("Heun", 2), ("Heun", 3)]
    if preset == "optuna":
        best = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
        fewest = min(json.loads(file.read_text())["nfe"] for file in found)
        assert (best["best_params"], best["best_value"]) == ({"sampler.steps": int(fewest)}, fewest)
        assert (tmp_path / "a.db").stat().st_size > 0
