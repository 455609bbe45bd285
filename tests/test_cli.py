"""The command line: what it lists, what it runs, and what it says about every kind of mistake."""

import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import steadyflow.jobs
from steadyflow import __version__, cli

PROBE = """
import time
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate

def run(cfg):
    print("ran", cfg.steps, HydraConfig.get().runtime.output_dir)
    if cfg.what == "missing":
        return cfg.nested.beta
    if cfg.what == "bug":
        return {}["no such key"]
    if cfg.what == "ctrl-c":
        raise KeyboardInterrupt
    if cfg.what == "lightning's ctrl-c":  # Trainer.fit ends so
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)
    if cfg.what == "denied":
        open("/", "w")
    if cfg.what == "elsewhere":
        int("a ValueError from outside the package")
    if cfg.what == "make":
        print("made", instantiate(cfg.thing))
    return {"fid": 2.0 * cfg.steps, "note": "text"}
"""
CONFIG = """
defaults:
  - common
  - trainer: cpu
  - logger@nested.gamma: none
  - _self_
steps: 3
what: nothing
nested:
  alpha: 1
  beta: ???
thing: null
"""


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job `probe` and its config, outside the package, in an empty working directory."""
    for file, text in (("jobs/probe.py", PROBE), ("conf/probe.yaml", CONFIG)):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(text)
    monkeypatch.setattr(steadyflow.jobs, "__path__", [*steadyflow.jobs.__path__, str(tmp_path / "jobs")])
    monkeypatch.setitem(cli.JOBS, "probe", "a test")
    monkeypatch.delitem(sys.modules, "steadyflow.jobs.probe", raising=False)
    monkeypatch.chdir(tmp_path)


def run(*argv: str) -> int:
    return cli.main(["probe", "--config-dir", "conf", *argv])


def mistake(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line said about a command that has to end with exit code 2."""
    assert run(*argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("steadyflow probe: error: "), said
    assert said.count("\n") == 1, said
    return said.removeprefix("steadyflow probe: error: ").strip()


# ---- what it lists


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_lists_the_jobs(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    listed = [line.split()[0] for line in out.split("jobs:\n")[1].split("\n\n")[0].splitlines()]
    assert listed == "train sample restore invert evaluate table report prepare".split()
    assert [job for job in listed if f"{job} " in out and cli.built(job)] == [j for j in cli.JOBS if cli.built(j)]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"steadyflow {__version__}\n"


def test_listing_is_quick_and_imports_neither_torch_nor_hydra() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "steadyflow", "--help"]
    seconds, imported = [], ""
    for _ in range(3):
        begin = time.perf_counter()
        imported = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        seconds.append(time.perf_counter() - begin)
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in imported.splitlines()}
    assert "steadyflow" in names
    assert names.isdisjoint({"torch", "hydra", "omegaconf", "lightning", "numpy"})
    assert min(seconds) < 1


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["sampel"], "no job 'sampel'. Did you mean sample?"),
        (["xyz"], "no job 'xyz'. Jobs: train sample restore invert evaluate table report prepare"),
        (["steps=3"], "'steps=3' names no job."),
    ],
)
def test_unknown_job(argv: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"steadyflow: error: {line}")
    assert err.count("\n") == 1


def test_a_job_that_is_not_built_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.JOBS, "dream", "not there")
    assert cli.main(["dream", "steps=3"]) == 2
    assert capsys.readouterr().err.startswith("steadyflow: error: 'dream' is not built yet in version")


@pytest.mark.usefixtures("probe")
def test_job_help_lists_groups_with_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: steadyflow probe ")
    assert "\ntrainer: cpu, ddp, ddp_cpu, gpu, slurm\n" in out
    assert "\nlogger: csv, none, tensorboard, wandb\n" in out
    assert "\nnested:\n" in out
    assert "\n  alpha: 1\n" in out
    assert "hydra/" not in out


@pytest.mark.usefixtures("probe")
def test_cfg_prints_the_composed_config_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    from omegaconf import OmegaConf

    assert run("steps=7", "trainer=ddp_cpu", "--cfg", "job") == 0
    config = OmegaConf.create(capsys.readouterr().out)
    assert (config.steps, config.trainer.devices, config.trainer._target_) == (7, 2, "lightning.Trainer")
    assert not Path("outputs").exists()


@pytest.mark.usefixtures("probe")
def test_runs_below_outputs_with_overrides_and_flags_in_any_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["steps=4", "--config-dir", "conf", "probe", "--run", "what=nothing"]) == 0
    _, steps, directory = capsys.readouterr().out.split()
    assert steps == "4"
    assert Path(directory).relative_to(Path.cwd()).parts[:2] == ("outputs", "probe")
    assert (Path(directory) / "probe.log").is_file()
    assert "steps: 4" in (Path(directory) / ".hydra" / "config.yaml").read_text()


# ---- mistakes: one line, exit code 2


@pytest.mark.usefixtures("probe")
@pytest.mark.parametrize("sweep", [[], ["-m"]])
@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("stps=1", "no key or group 'stps' in this config. Did you mean steps?"),
        ("trainer.device=2", "no key or group 'trainer.device' in this config. Did you mean trainer.devices"),
        ("alpha=2", "no key or group 'alpha' in this config. Did you mean nested.alpha?"),
        ("logger=csv", "no group 'logger' in this config. Did you mean logger@nested.gamma?"),
        ("trainer=null", "trainer=null: a group takes the name of an option"),
        ("triner=gpu", "no key or group 'triner' in this config. Did you mean trainer?"),
        ("~stps", "no key or group 'stps' in this config. Did you mean steps?"),
        ("trainer=gpo", "no option 'gpo' in the group trainer. Did you mean gpu? Options: cpu, ddp, ddp_cpu, gpu, sl"),
        ("hydra/launcher=jolib", "no option 'jolib' in the group hydra/launcher. Did you mean joblib?"),
        ("steps=[1", "cannot read 'steps=[1': "),
        ("steps", "cannot read 'steps': "),
        ("--multirum", "unrecognized arguments: --multirum Did you mean --multirun"),
        ("--cfg=jobs", "argument --cfg/-c: invalid choice: 'jobs'"),
        ("--config-name=prob", "Cannot find primary config 'prob'."),
        ("what=missing", "Missing mandatory value: nested.beta; give it as nested.beta=..."),
        ("steps=abc", "steps must be a whole number, got 'abc'"),
        ("steps=2.5", "steps must be a whole number, got 2.5"),
        ("steps=null", "steps must be a whole number, got None"),
        ("steps=${stps}", "Interpolation key 'stps' not found"),
        ("what=denied", "Is a directory: /"),
        ("objective=fd", "objective=fd: not among the results of this run (fid)"),
    ],
)
def test_mistakes(sweep: list[str], override: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(capsys, *sweep, override).startswith(line)


@pytest.mark.usefixtures("probe")
@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["steps=1,2"], "Ambiguous value for argument 'steps=1,2' "),
        (["hydra.run.dir=${stps}"], "Interpolation key 'stps' not found"),
        (["hydra.run.dir=/proc/here"], "No such file or directory: /proc/here"),
        (["--config-dir", "cnf"], "Additional config directory"),
        (["--cfg", "job", "--info"], "Only one of --run, --multirun, --cfg, --info and --shell_completion can be"),
        (["--experimental-rerun", "x"], "--experimental-rerun is not offered"),
        (["-m", "hydra/launcher=ray"], "hydra/launcher/ray needs its plugin: pip install 'steadyflow[ray]'"),
        (["-m", "trainer=cpu,gpo"], "no option 'gpo' in the group trainer. Did you mean gpu?"),
        (
            ["-m", "what=missing,nothing"],
            "Missing mandatory value: nested.beta; give it as nested.beta=... (in the run what=missing)",
        ),
        (["-m", "steps=1,2", "hydra.sweep.dir=/proc/here"], "No such file or directory: /proc/here"),
    ],
)
def test_mistakes_of_single_runs_and_of_sweeps(argv: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "hydra/launcher=ray" in argv:
        pytest.importorskip("hydra_plugins")
        if find_spec("hydra_plugins.hydra_ray_launcher"):
            pytest.skip("the plugin is installed")
    assert mistake(capsys, *argv).startswith(line)


@pytest.mark.usefixtures("probe")
def test_a_broken_config_file_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("conf/probe.yaml").write_text("steps: [1\n")
    assert 'in "' + str(Path("conf/probe.yaml").resolve()) + '", line 2' in mistake(capsys)


@pytest.mark.usefixtures("probe")
@pytest.mark.parametrize(
    ("thing", "line"),
    [
        ("{_target_: steadyflow.paths.ConditionalTO}", "thing: Error loading 'steadyflow.paths.ConditionalTO'"),
        ("{_target_: mymodule.Thing}", "thing: Error loading 'mymodule.Thing': ModuleNotFoundError"),
        ("{_target_: builtins.object, beta: 1}", "thing: object() takes no arguments"),
        (
            "{_target_: steadyflow.paths.VariancePreserving, beta_mn: 1}",
            "thing: VariancePreserving.__init__() got an unexpected keyword argument 'beta_mn'",
        ),
        ("{a: {_target_: steadyflow.paths.VariancePreserving, beta_min: -1}}", "thing.a: need "),  # the library's own
        ("{_target_: steadyflow.paths.VariancePreserving, beta_min: x}", "thing: beta_min must be a number, got 'x'"),
        ("{_target_: lightning.Trainer, accelerator: abacus}", "thing: You selected an invalid accelerator name"),
        ("{_target_: builtins.open, file: nowhere}", "thing: No such file or directory: nowhere"),
    ],
)
def test_mistakes_in_what_is_instantiated(thing: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(capsys, "what=make", f"thing={thing}").startswith(line)


# ---- bugs keep their traceback


@pytest.mark.usefixtures("probe")
@pytest.mark.parametrize(("what", "error"), [("bug", KeyError), ("elsewhere", ValueError)])
def test_a_bug_is_raised(what: str, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        run(f"what={what}")
    assert caught.traceback[-1].path.name == "probe.py"


@pytest.mark.usefixtures("probe")
def test_a_bug_in_a_sweep_shows_its_traceback_and_its_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-m", "what=nothing,bug") == 1
    err = capsys.readouterr().err
    assert 'jobs/probe.py", line ' in err
    assert err.endswith("KeyError: 'no such key'\nin the run what=bug\n")


@pytest.mark.usefixtures("probe")
def test_full_errors_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    from omegaconf.errors import MissingMandatoryValue

    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(MissingMandatoryValue):
        run("what=missing")


@pytest.mark.usefixtures("probe")
@pytest.mark.parametrize("sweep", [[], ["-m"]])
@pytest.mark.parametrize("what", ["ctrl-c", "lightning's ctrl-c"])
def test_interruption(sweep: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*sweep, f'what="{what}"') == 130
    assert capsys.readouterr().err == "steadyflow probe: interrupted\n"


# ---- sweeps


def test_multirun_runs_every_combination(probe: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-m", "probe", "--config-dir", "conf", "steps=1,2", "nested.alpha=range(2)"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("ran")]
    assert [line[1] for line in lines] == ["1", "1", "2", "2"]
    assert [Path(line[2]).name for line in lines] == ["0", "1", "2", "3"]
    assert all(Path(line[2]).relative_to(Path.cwd()).parts[:3] == ("outputs", "multirun", "probe") for line in lines)


@pytest.mark.parametrize(("objective", "expected"), [("null", [2.0, 4.0]), ("fid", [2.0, 4.0])])
def test_a_sweeper_sees_the_objective(
    probe: None, objective: str, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    seen: list[object] = []
    sweep = BasicSweeper.sweep

    def record(self: BasicSweeper, arguments: list[str]) -> object:
        batches = sweep(self, arguments)
        seen.extend(job.return_value for job in batches[0])
        return batches

    monkeypatch.setattr(BasicSweeper, "sweep", record)
    assert run("-m", "steps=1,2", f"objective={objective}") == 0
    assert [value if objective == "fid" else value["fid"] for value in seen] == expected  # type: ignore[index]


# ---- extension from the working directory


@pytest.mark.usefixtures("probe")
def test_target_and_config_group_of_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mymodule.py").write_text(
        "class Thing:\n    def __init__(self, size): self.size = size\n"
        "    def __repr__(self): return f'Thing({self.size})'\n"
    )
    Path("conf/thing").mkdir()
    Path("conf/thing/mine.yaml").write_text("_target_: mymodule.Thing\nsize: 5\n")
    try:
        assert run("what=make", "+thing=mine", "thing.size=6") == 0
    finally:
        sys.modules.pop("mymodule", None)
    assert "made Thing(6)" in capsys.readouterr().out


# ---- tab completion


def complete(line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COMP_LINE", line)
    assert cli.main(["-sc", "query=bash"]) == 0
    return capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("steadyflow ", ["train"]),
        ("steadyflow tra", ["train"]),
        ("steadyflow -m tra", ["train"]),
        ("steadyflow train trai", ["trainer="]),
        ("steadyflow train trainer=", ["trainer=cpu", "trainer=ddp", "trainer=ddp_cpu"]),
        ("steadyflow train -m seed=1,2 trainer=d", ["trainer=ddp", "trainer=ddp_cpu"]),
        ("steadyflow train trainer.dev", ["trainer.devices="]),
    ],
)
def test_completion(
    line: str, some: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = complete(line, capsys, monkeypatch)
    assert set(some) <= set(words)
    assert all(word.startswith(line.split(" ")[-1]) for word in words)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_completion_in_bash() -> None:
    script = """
        PATH=$1:$PATH
        eval "$(steadyflow -sc install=bash)"
        COMP_LINE="steadyflow train trainer=d" COMP_CWORD=2 COMP_POINT=26
        hydra_bash_completion
        echo "${COMPREPLY[@]}"
    """
    command = ["bash", "-c", script, "bash", str(Path(sys.executable).parent)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "trainer=ddp trainer=ddp_cpu\n"


def test_completion_scripts_of_the_other_shells(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-sc", "install=fish"]) == 0
    assert "-sc query=fish" in capsys.readouterr().out
    assert cli.main(["-sc", "install=tcsh"]) == 2
    assert capsys.readouterr().err.startswith("steadyflow sample: error: No completion plugin for 'tcsh'")
