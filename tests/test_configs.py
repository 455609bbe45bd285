"""Every primary config and every option of every group composes, and names classes with arguments they take."""

import inspect
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig

import steadyflow.jobs.record  # noqa: F401 - the resolver of hydra.run.dir
from steadyflow import cli

CONFIGS = Path(__file__).parents[1] / "configs"
JOBS = [job for job in cli.JOBS if cli.built(job)]
PLUGINS = {"sweep=ray": "hydra_ray_launcher", "sweep=joblib": "hydra_joblib_launcher"}
PLUGINS["sweep=optuna"] = "hydra_optuna_sweeper"
PLUGINS["trainer=slurm"] = "hydra_submitit_launcher"


@pytest.fixture(autouse=True)
def _configs() -> Iterator[None]:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield


def options() -> list[str]:
    """GROUP=OPTION for every file below a folder of configs."""
    files = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent != CONFIGS)
    return [f"{p.parent.relative_to(CONFIGS).as_posix()}={p.stem}" for p in files]


def targets(node: object, key: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every node that is to be instantiated, with its key. Interpolations stay as they are."""
    if isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation():
        if "_target_" in node:
            yield key, node
        for name in node:
            yield from targets(node._get_node(name), f"{key}.{name}".lstrip("."))
    elif isinstance(node, ListConfig) and not node._is_none() and not node._is_interpolation():
        for i in range(len(node)):
            yield from targets(node._get_node(i), f"{key}.{i}")


def check(config: DictConfig) -> int:
    """Each `_target_` exists and takes the keys beside it. Returns how many there are."""
    count = 0
    for key, node in targets(config):
        count += 1
        called = get_object(node._target_)
        arguments = [str(name) for name in node if str(name)[0] != "_" or not str(name).endswith("_")]
        try:
            inspect.signature(called).bind_partial(**dict.fromkeys(arguments))
        except TypeError as error:
            pytest.fail(f"{key}: {node._target_}: {error}")
    return count


@cache
def groups(job: str) -> tuple[str, ...]:
    """What the job chooses: GROUP or GROUP@PACKAGE."""
    return tuple(compose(job, return_hydra_config=True).hydra.runtime.choices)


@pytest.mark.parametrize("job", JOBS)
def test_primary_config(job: str) -> None:
    assert (CONFIGS / f"{job}.yaml").is_file()
    config = compose(job)
    assert {"seed", "data_dir", "objective"} <= set(config)
    check(config)


def test_there_is_no_config_without_a_job() -> None:
    assert {p.stem for p in CONFIGS.glob("*.yaml")} - {"common"} == set(JOBS)


@pytest.mark.parametrize("option", options())
def test_option(option: str) -> None:
    """In every job that has the group, an experiment in its own (JOB_..., inversion_..., or sample), a sweep in any.

    A dataset that only changes another one's settings is tried in the job that is quickest to compose.
    """
    if option in PLUGINS and not find_spec(f"hydra_plugins.{PLUGINS[option]}"):
        pytest.skip(f"{PLUGINS[option]} is not installed")
    group, _, name = option.partition("=")
    if group == "experiment":
        verb = name.replace("inversion_", "invert_")
        own = [job for job in JOBS if verb.startswith(f"{job}_")] or ["sample"]
        overrides = [(job, f"+{option}") for job in own]
    elif group == "sweep":
        overrides = [("restore" if name.startswith("c_pigdm") else "sample", f"+{option}")]
    elif group == "checkpoint" and "checkpoints.public" in (CONFIGS / group / f"{name}.yaml").read_text():
        overrides = [("prepare", option)]  # one job stands for all: there are dozens
    elif group == "checkpoint/running":
        overrides = [("sample", "checkpoint=path", option)]
    elif group == "dataset" and "\ndefaults: [" in (CONFIGS / group / f"{name}.yaml").read_text():
        overrides = [("prepare", option)]
    else:
        overrides = [(job, f"{g}={name}") for job in JOBS for g in groups(job) if g.partition("@")[0] == group]
    assert overrides, f"no job has the group {group}"
    for job, *words in overrides:
        check(compose(job, words))


def test_the_check_sees_a_wrong_argument() -> None:
    config = compose("train", ["+path.beta_mn=1"])
    with pytest.raises(pytest.fail.Exception, match=r"path: steadyflow.paths.* unexpected keyword argument 'beta_mn'"):
        check(config)
