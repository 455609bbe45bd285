"""What a run leaves in its directory beside its results: `run.json`, and the right to continue there.

`run.json` holds the composed and the resolved config, the overrides, the hashes of what was read, and for each start
the versions, git state, hardware and precision settings. It decides whether a later start continues the same run.
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

FORMAT = 1  # of run.json and metrics.json; one that a later version can no longer read is another number
PACKAGES = ("steadyflow", "torch", "torchvision", "lightning", "hydra-core", "numpy", "torchmetrics", "clean-fid")
IGNORED = ("trainer", "logger", "hydra", "resume", "output_dir", "data_dir")  # may differ between starts of one run


def run_directory(resume: str | None, otherwise: str) -> str:
    """The directory of this start: `otherwise`, or with `resume` the directory of an earlier run.

    A resolver (`run_dir`), so that Hydra's log, `.hydra/` and every `${hydra:runtime.output_dir}` agree:

        hydra.run.dir: ${run_dir:${resume},outputs/sample/${now:%Y-%m-%d}/${now:%H-%M-%S}}

    Args:
        resume: a directory, `latest` (the run started last below the first two parts of `otherwise`), or None.
        otherwise: the directory of a new run, outputs/<job>/<date>/<time>.

    Raises:
        FileNotFoundError: no run.json there.
    """
    if resume is None:
        return otherwise
    if resume != "latest":
        if not (Path(resume) / "run.json").exists():
            raise FileNotFoundError(f"resume={resume}: no run.json there, so no run to continue; check the path")
        return resume
    root = Path(*Path(otherwise).parts[:2])
    runs = sorted(root.rglob("run.json"), key=lambda file: file.stat().st_mtime)
    if not runs:
        raise FileNotFoundError(f"resume=latest: no run below {root.absolute()}; name its directory (resume=DIR)")
    return str(runs[-1].parent)


OmegaConf.register_new_resolver("run_dir", run_directory, replace=True)


def resumed(cfg: DictConfig) -> DictConfig:
    """The config to run: `cfg`, or with `resume` the recorded overrides of that run with this start's after them.

    So `resume=latest` alone continues a run, and an override that would change its results is refused by `claim`.

    Raises:
        ValueError: `resume` in a multirun.
    """
    if cfg.resume is None:
        return cfg
    hydra = HydraConfig.get()
    record = Path(hydra.runtime.output_dir) / "run.json"
    if not record.exists():
        raise ValueError(f"resume={cfg.resume} continues one run, but this start writes to {record.parent}")
    overrides = [*_overrides(json.loads(record.read_text())["overrides"]), f"resume={cfg.resume}"]
    return compose(config_name=hydra.job.config_name, overrides=overrides)


def claim(
    directory: Path, cfg: DictConfig, *, inputs: Mapping[str, str] | None = None, ignore: Sequence[str] = ()
) -> bool:
    """Takes the directory for this run, or finds that this very run was begun there: True in that case.

    The composed configs (interpolations unresolved, so a moved folder is the same run) must agree in every key but
    IGNORED, trainer.precision excepted, and `ignore`. Only the first process of a distributed run writes.

    Args:
        directory: where the run writes; made when absent.
        cfg: the job's composed config, after `resumed`.
        inputs: hashes of what the run reads, such as checkpoint=sha256; they must agree too.
        ignore: further keys (with what is below them) that may change between starts of the run, e.g. batch_size.

    Raises:
        ValueError: the directory holds a run with another config, naming the keys that differ; another process writes
            there now; or it is not writable.
    """
    facts: dict[str, Any] = {"composed": OmegaConf.to_container(cfg), "inputs": dict(inputs or {})}
    file, hydra = directory / "run.json", directory / ".hydra"
    used = file.exists()
    record: dict[str, Any] = json.loads(file.read_text()) if used else {"overrides": [], "starts": []}
    differing = _differences(record, facts, (*IGNORED, *ignore)) if used else []
    if not differing:
        overrides = _overrides(record["overrides"] if cfg.get("resume") else [])
        facts |= {"format": FORMAT, "config": OmegaConf.to_container(cfg, resolve=True), "overrides": overrides}
        record |= facts
    if is_first_process():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _lock(directory)
            if not differing:
                record["starts"].append(environment())
                write_text(file, json.dumps(record, indent=2, default=str) + "\n")
            if hydra.is_dir():  # Hydra wrote this start's defaults there: put back what the directory is made by
                write_text(hydra / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(record["composed"])))
                write_text(hydra / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(record["overrides"])))
        except OSError as error:
            raise ValueError(
                f"cannot write to {directory} ({error.strerror}); set hydra.run.dir to a folder you can write to"
            ) from None
    if differing:
        more = f" and {len(differing) - 12} more" if len(differing) > 12 else ""
        raise ValueError(
            f"{directory} holds a run with another config: {', '.join(differing[:12])}{more}; choose "
            f"another hydra.run.dir, or continue that run as it was with resume={directory}"
        )
    return used


_locked: int | None = None  # the file that locks the directory which this process claimed last


def _lock(directory: Path) -> None:
    """Keeps other processes from claiming the directory until this one claims another or ends, however it ends."""
    global _locked
    if _locked is not None:
        os.close(_locked)
    _locked = os.open(directory / ".lock", os.O_CREAT | os.O_WRONLY)
    try:
        fcntl.lockf(_locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(
            f"another process writes to {directory} now; wait until it has ended, or choose another hydra.run.dir"
        ) from None
    except OSError:
        pass  # a file system without locks


def is_first_process() -> bool:
    """Whether this is rank 0 of a distributed run, before a process group exists (or the only process)."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return not any(int(rank) for rank in ranks if rank)


def write_text(file: Path, text: str) -> None:
    """Writes a file whole or not at all: to a temporary name, then renamed."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    temporary.replace(file)


def environment() -> dict[str, Any]:
    """Versions, git state (of the package's own checkout, None where it is installed), hardware and precision."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "git": _git(Path(__file__).parent),
        "hardware": {
            "host": platform.node(),
            "machine": platform.machine(),
            "system": platform.platform(),
            "cpus": os.cpu_count(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
            "cuda": torch.version.cuda if cuda else None,
            "cudnn": torch.backends.cudnn.version() if cuda else None,
        },
        "precision": {
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
            "tf32_cudnn": torch.backends.cudnn.allow_tf32,
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "threads": torch.get_num_threads(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(folder: Path) -> dict[str, Any] | None:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", "record.py")  # a site-packages below someone's repository is not ours
        return {"revision": git("rev-parse", "HEAD").strip(), "modified": bool(git("status", "--porcelain").strip())}
    except (OSError, subprocess.CalledProcessError):
        return None


def _overrides(before: Sequence[str]) -> list[str]:
    """The recorded overrides `before`, then this start's: of two for the same key, the later."""
    here = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    latest = {_key(override): override for override in (*before, *here)}
    return [override for key, override in latest.items() if key != "resume"]


def _key(override: str) -> str:
    return override.split("=")[0].lstrip("+~")


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}{key}.")
    else:
        yield prefix[:-1], node


def _differences(there: dict[str, Any], here: dict[str, Any], ignored: Sequence[str]) -> list[str]:
    """`key (a there, b here)` for every key that differs, the ignored ones (and all below them) left out."""

    def kept(key: str) -> bool:
        return key == "trainer.precision" or not any(key == i or key.startswith(i + ".") for i in ignored)

    def text(key: str, values: dict[str, Any]) -> str:
        if key == "trainer.precision":
            value = str(values.get(key, "32-true"))
            return {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}.get(value, value)
        return str(values.get(key, "absent"))

    old, new = (dict(_leaves(part["composed"])) | dict(_leaves(part["inputs"])) for part in (there, here))
    return [
        f"{key} ({text(key, old)} there, {text(key, new)} here)"
        for key in dict.fromkeys([*old, *new])
        if kept(key) and text(key, old) != text(key, new)
    ]
