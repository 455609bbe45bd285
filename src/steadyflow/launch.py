"""A job through Hydra: compose, run, and say in one line what the user can put right."""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from hydra import version as hydra_version
from hydra._internal import utils as hydra_utils
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

import steadyflow.jobs.record  # noqa: F401 - the resolver of hydra.run.dir
from steadyflow.mistakes import Failed, Mistake, check_kinds, did_you_mean, explain, explain_composition

RESULT = "STEADYFLOW_RESULT"  # set for a cell that runs in a process of its own: the file its outcome is written to


class Crash(Exception):
    """A bug in one run of a sweep. Holds its traceback as text: exceptions lose theirs on the way between processes."""


def config_dir() -> Path:
    """The folder of configs: inside the installed package, or at the top of the checkout."""
    package = Path(__file__).parent
    return next(d for d in (package / "configs", package.parents[1] / "configs") if d.is_dir())


@dataclass
class Task:
    """What Hydra runs, here or in a launcher's worker: steadyflow.jobs.JOB.run(config).

    Args:
        job: the job's name.
        flags: the command line's own config sources (--config-dir ...), which a run in its own process repeats.
        first: whether this process speaks to the user: none started by DDP or by a sweep.
    """

    job: str
    flags: tuple[str, ...] = ()
    first: bool = True
    value: Any = field(default=None, init=False)  # of the latest run in this process
    error: Exception | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.__module__ = f"steadyflow.jobs.{self.job}"  # Hydra names the run and its log after the last part

    def __call__(self, config: DictConfig) -> Any:
        hydra = HydraConfig.get()
        if hydra.runtime.cwd not in sys.path:
            sys.path.append(hydra.runtime.cwd)  # `_target_` may name the user's own modules
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_worth_saying)
        warnings.filterwarnings(
            "ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning
        )  # Lightning
        sweep = hydra.mode == RunMode.MULTIRUN
        try:
            check_kinds(config, _defaults(hydra))
            if sweep and _starts_processes(config):
                self.value = self._in_own_process(hydra)
            else:
                if _starts_processes(config):
                    _end_after_interruption(self)
                job = import_module(f"steadyflow.jobs.{self.job}")
                logging.getLogger("lightning").handlers.clear()  # Hydra's log has its messages already
                result = job.run(config)
                self.value = _objective(result, config.get("objective"))
            return self.value
        except SystemExit as stop:
            if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning exits 1 after a graceful shutdown
                raise KeyboardInterrupt from None
            raise
        except Exception as error:
            if not sweep:
                self.error = error
                raise
            cell = " ".join(hydra.overrides.task)
            if message := explain(error):
                raise Mistake(f"{message} (in the run {cell})") from error
            raise Crash(f"{''.join(traceback.format_exception(error))}in the run {cell}") from error

    def _in_own_process(self, hydra: HydraConf) -> Any:
        """This run of a sweep as a command of its own.

        Lightning's DDP starts its other processes by repeating the command line, which here would repeat the sweep.
        """
        skipped = ("hydra.mode", "hydra.run", "hydra.sweep", "hydra.launcher", "hydra/launcher", "hydra/sweeper")
        directory = str(hydra.runtime.output_dir).replace("\\", "\\\\").replace('"', '\\"')
        overrides = [
            *hydra.overrides.task,
            *(o for o in hydra.overrides.hydra if not o.lstrip("+~").startswith(skipped)),
            "hydra.mode=RUN",
            f'hydra.run.dir="{directory}"',
            f"hydra.job.num={hydra.job.num}",
            f"hydra.job.id='{hydra.job.id}'",
        ]
        with tempfile.TemporaryDirectory() as folder:
            outcome = Path(folder) / "outcome.json"
            command = [sys.executable, "-m", "steadyflow", self.job, *self.flags, *overrides]
            process = subprocess.Popen(command, env=os.environ | {RESULT: str(outcome)}, cwd=hydra.runtime.cwd)
            try:
                code = process.wait()
            except KeyboardInterrupt:
                _end(process)
                raise
            if code == 130:
                raise KeyboardInterrupt
            told = json.loads(outcome.read_text()) if outcome.is_file() else {}
        if "mistake" in told:
            raise Mistake(told["mistake"])
        if code != 0 or "value" not in told:
            raise Crash(f"The process ended with exit code {code}; what it said stands above.")
        return told["value"]


def launch(job: str, argv: list[str]) -> int:
    """Run JOB with Hydra's flags and overrides.

    Returns:
        The exit code: 0; 2 after one line on stderr; 1 for a bug in a sweep. A bug in a single run is raised.
    """
    result_file = os.environ.pop(RESULT, None)  # not for the processes that DDP starts
    rank, parent = os.environ.get("LOCAL_RANK", "0"), os.getppid()
    task = Task(job, first=result_file is None and rank == "0")
    if not task.first:
        _end_with(parent)
    overrides: list[str] = []
    sources: dict[str, str | None] = {}
    try:
        hydra_version.setbase("1.3")
        arguments = _parse(argv)
        sources = {"--config-dir": arguments.config_dir, "--config-name": arguments.config_name}
        task.flags = tuple(word for flag, value in sources.items() if value for word in (flag, value))
        overrides = list(arguments.overrides)
        with (
            patch.object(hydra_utils, "run_and_report", lambda function: function()),  # it prints and exits
            patch.object(JobReturn, "return_value", property(_return_value, vars(JobReturn)["return_value"].fset)),
        ):
            hydra_utils._run_hydra(arguments, arguments.parser, task, str(config_dir()), job)
    except KeyboardInterrupt:
        if task.first:
            print(f"steadyflow {job}: interrupted", file=sys.stderr)
        return 130 if rank == "0" else 0  # Lightning kills the first process where another one fails
    except SystemExit as stop:  # after --help; Hydra ends with 1 where --cfg --package names nothing
        return 2 if arguments.cfg and stop.code else stop.code if isinstance(stop.code, int) else 0
    except Crash as crash:
        print(crash, file=sys.stderr)
        return 1
    except Failed as failed:
        print(f"steadyflow {job}: {failed}", file=sys.stderr)
        return 1
    except Exception as error:
        if error is task.error:
            message = explain(error)
        else:
            name, folder = sources.get("--config-name") or job, sources.get("--config-dir")
            message = explain_composition(error, overrides, name, config_dir(), folder)
        if message is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        if result_file:
            Path(result_file).write_text(json.dumps({"mistake": message}))
        elif task.first:
            print(f"steadyflow {job}: error: {message}", file=sys.stderr)
        else:
            time.sleep(3)  # a mistake that the first process made too, it has told, and ended
            if os.getppid() == parent:
                print(f"steadyflow {job}: error in process {rank}: {message}", file=sys.stderr)
        return 2
    if result_file:
        Path(result_file).write_text(json.dumps({"value": task.value}, default=float))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    """Hydra's command line, flags and overrides in any order."""
    parser = hydra_utils.get_args_parser()

    def error(message: str) -> NoReturn:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        word = next((w for w in message.split() if w.startswith("-")), "")
        raise Mistake(message + did_you_mean(word, flags))

    parser.error = error  # type: ignore[method-assign]
    arguments = parser.parse_intermixed_args(argv)
    if arguments.experimental_rerun:
        raise Mistake("--experimental-rerun is not offered; --config-dir RUN/.hydra --config-name config repeats a run")
    arguments.parser = parser
    return arguments


def _return_value(job: JobReturn) -> Any:
    """JobReturn.return_value without the line it prints on failure: the message here says more."""
    if isinstance(job._return_value, Exception):
        raise job._return_value
    return job._return_value


def _objective(result: Any, name: str | None) -> Any:
    """What a sweeper sees: the named metric, or the job's whole result."""
    if name is None:
        return result
    if not isinstance(result, dict) or result.get(name) is None:
        known = sorted(k for k, v in result.items() if isinstance(v, int | float)) if isinstance(result, dict) else []
        raise Mistake(f"objective={name}: not among the results of this run ({', '.join(known) or 'none'})")
    return result[name]


def _worth_saying(message: logging.LogRecord) -> bool:
    """Whether one of Lightning's messages is: not its advertisements, and an interruption is reported once, here."""
    return not message.getMessage().strip().startswith(("💡 Tip", "Detected KeyboardInterrupt"))


def _defaults(hydra: HydraConf) -> dict[str, Any]:
    """What the primary config says itself, and the one that all share; groups left out."""
    folders = [Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file"]
    names = ("common.yaml", f"{hydra.job.config_name}.yaml")
    files = [next((folder / name for folder in folders if (folder / name).is_file()), None) for name in names]
    found: list[Any] = [OmegaConf.to_container(OmegaConf.load(file)) for file in files if file]
    return {key: value for part in found for key, value in part.items()}


def _starts_processes(config: DictConfig) -> bool:
    """Whether Lightning will start processes for this config by repeating the command line."""
    trainer = config.get("trainer") or {}
    devices = trainer.get("devices", 1)
    if devices in (1, "1") or (not isinstance(devices, int | str) and len(devices) == 1):
        return False
    if "SLURM_NTASKS" not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    return not (SLURMEnvironment.detect() or TorchElasticEnvironment.detect())  # they have started them already


def _end_after_interruption(task: Task, seconds: float = 20) -> None:
    """Let Ctrl-C end this process, if it has to be without cleaning up, even where it waits for another process.

    Such waiting (the rendezvous of DDP above all) is outside Python, where an interruption is not seen.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def watch() -> None:
        while signal.SIGINT not in os.read(read, 64):
            pass
        time.sleep(seconds)
        if task.first:
            print(f"steadyflow {task.job}: interrupted", file=sys.stderr, flush=True)
        os._exit(130)

    threading.Thread(target=watch, daemon=True).start()


def _end_with(parent: int, seconds: float = 10) -> None:
    """End this process when the one that started it is gone: killed, it cannot say so."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        time.sleep(seconds)  # for what does not need the other
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for an interrupted process. The terminal interrupts it too; a signal to this process alone does not."""
    for send, seconds in ((None, 3), (signal.SIGINT, 30), (signal.SIGKILL, 10)):
        if send is not None:
            process.send_signal(send)
        try:
            process.wait(seconds)
            return
        except subprocess.TimeoutExpired:
            continue
