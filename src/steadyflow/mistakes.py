"""Which exceptions are the user's to put right, and what to say about them in one line."""

import difflib
import inspect
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.errors import CompactHydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

PACKAGE = str(Path(__file__).parent)
PLUGINS = {"joblib": "joblib", "ray": "ray", "submitit_slurm": "slurm", "submitit_local": "slurm"}  # launcher: extra
KINDS = {int: "a whole number", float: "a number", bool: "true or false"}
NULLABLE = ("clip",)  # numbers of primary configs that null switches off


class Mistake(Exception):
    """A mistake of the user's, already said in one line."""


class Failed(Exception):
    """Part of a job's work failed and the rest was done, said in one line: exit code 1."""


def did_you_mean(word: str, known: list[str]) -> str:
    """' Did you mean ...?' with the known words nearest to `word`, or nothing."""
    near = difflib.get_close_matches(word, known, n=2, cutoff=0.65)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def check_kinds(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """That the numbers and switches of a primary config are still such.

    Args:
        config: composed. defaults: what the primary config says itself.

    Raises:
        Mistake: one of them is of another kind.
    """
    for key, default in defaults.items():
        kinds = {type(default)} | ({NoneType} if key in NULLABLE else set())
        if type(default) in KINDS and (expected := _expected(config[key], kinds)):
            raise Mistake(f"{key} must be {expected}, got {config[key]!r}")


def _expected(value: Any, kinds: set[Any]) -> str:
    """What a value should be, or nothing where it is of these kinds, or they are more than numbers and switches."""
    if not kinds <= {*KINDS, NoneType} or type(value) in kinds or (type(value) is int and float in kinds):
        return ""
    return " or ".join([name for kind, name in KINDS.items() if kind in kinds] + ["null"] * (NoneType in kinds))


def explain(error: BaseException) -> str | None:
    """One line about an error raised while a job ran, or None for a bug, whose traceback has to be seen.

    The library raises ValueError, FileNotFoundError and FloatingPointError where the user can put something right, so
    these count when raised in a frame of this package; so do the operating system's refusals, and configs that cannot
    be read or instantiated. The same classes raised elsewhere are bugs.
    """
    if isinstance(error, InstantiationException):
        return _explain_instantiation(error)
    if isinstance(error, MissingMandatoryValue):
        return f"{_flat(error)}; give it as {error.full_key}=..."
    if isinstance(error, Mistake | CompactHydraException | OmegaConfBaseException):
        return _flat(error)
    if isinstance(error, OSError) and error.errno is not None:
        return f"{error.strerror}: {error.filename}" if error.filename is not None else _flat(error)
    if type(error).__name__ == "MisconfigurationException":  # Lightning's, not imported here: it takes seconds
        return _flat(error) + (" Choose trainer=cpu." if "No supported gpu" in str(error) else "")
    if type(error).__module__.startswith("wandb."):  # no key, no connection
        return f"{_flat(error).rstrip('.')}; or without an account: logger.offline=true"
    if isinstance(error, ValueError | FileNotFoundError | FloatingPointError):
        frames = traceback.extract_tb(error.__traceback__)
        return _flat(error) if frames and frames[-1].filename.startswith(PACKAGE) else None
    return None


def _explain_instantiation(error: InstantiationException) -> str | None:
    """A `_target_` that cannot be found or refuses its arguments."""
    key = re.search(r"full_key: (\S+)", str(error))
    where = f"{key[1]}: " if key else ""
    cause = error.__cause__
    if cause is None:
        return where + _flat(error)
    call = cause.__traceback__.tb_frame.f_locals if cause.__traceback__ else {}  # of Hydra: what it gave to which class
    if isinstance(cause, TypeError | ValueError) and callable(call.get("_target_")):
        for name, parameter in inspect.signature(call["_target_"]).parameters.items():
            kind, value = parameter.annotation, call["kwargs"].get(name)
            kinds = {*get_args(kind)} if get_origin(kind) in (Union, UnionType) else {kind}
            if name in call["kwargs"] and (expected := _expected(value, kinds)):
                return f"{where}{name} must be {expected}, got {value!r}"
    if isinstance(cause, TypeError | ValueError | ImportError):  # wrong arguments, or none of that name
        return where + _flat(cause)
    line = explain(cause)
    return None if line is None else where + line


def explain_composition(
    error: Exception, overrides: list[str], config_name: str, configs: Path, config_dir: str | None
) -> str | None:
    """One line about an error that Hydra raised before or between runs, or None for a bug.

    Args:
        error: what was raised.
        overrides: the command line's.
        config_name, configs, config_dir: what was composed, to look for near matches of a misspelt key.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        return _explain_missing(error, configs)
    if isinstance(error, OverrideParseException):
        return f"cannot read '{error.override}': {_flat(error)}"
    if isinstance(error, CompactHydraException):
        text = str(error) or str(error.__cause__ or error.__class__.__name__)
        if found := re.search(r"Could not (?:override|delete(?: from config)?\.?) '([^']+)'", text):
            if hint := re.search(r"Did you mean to override (\S+)\?", text):
                adds = f" (+{found[1]}=... adds it.)" if "@" in found[1] else ""
                return f"no group '{found[1]}' in this config. Did you mean {hint[1]}?{adds}"
            return _explain_key(found[1], overrides, config_name, configs, config_dir)
        if isinstance(error.__cause__, OmegaConfBaseException) and str(error):
            return f"{_flat(error)} ({_flat(error.__cause__)})"
        return _flat(text)
    if isinstance(error, YAMLError | ImportError | ValueError):
        if str(error).startswith("Config group override must be"):  # which, it does not say
            wrong = next((override for override in overrides if override.endswith("=null")), "an override")
            return f"{wrong}: a group takes the name of an option"
        return _flat(error)
    return explain(error)


def _explain_missing(error: MissingConfigException, configs: Path) -> str:
    """A config that no source has: an option of a group, or a primary config."""
    name = error.missing_cfg_file or ""
    group, _, option = name.rpartition("/")
    if group == "hydra/launcher" and option in PLUGINS:
        return f"{name} needs its plugin: pip install 'steadyflow[{PLUGINS[option]}]'"
    options = list(error.options or []) or sorted(file.stem for file in (configs / group).glob("*.yaml") if group)
    if not options:
        return _flat(str(error).partition("Config search path")[0].partition("Search path")[0])
    near = did_you_mean(option, options)
    more = "" if near else f" There are {len(options)}: see --help"
    listed = f" Options: {', '.join(options)}" if len(options) <= 25 else more
    return f"no option '{option}' in the group {group}.{near}{listed}"


def _explain_key(key: str, overrides: list[str], config_name: str, configs: Path, config_dir: str | None) -> str:
    """A key that the config does not have, with the keys it has that look like it."""
    sources = create_config_search_path(str(configs))
    if config_dir is not None:
        sources.prepend("command-line", Path(config_dir).resolve().as_uri(), SearchPathQuery(provider="schema"))
    loader, config, hint = ConfigLoaderImpl(sources), None, ""
    for attempt in ([o for o in overrides if not o.lstrip("+~").startswith((key, "hydra.mode"))], []):
        try:
            config = loader.load_configuration(config_name, attempt, RunMode.RUN)
            break
        except CompactHydraException:  # another override is wrong too
            continue
    if config is not None:
        known = list({*_keys(config), *(choice.partition("@")[0] for choice in config.hydra.runtime.choices)})
        hint = did_you_mean(key, known)
        if not hint:  # the right name in the wrong place
            leaf = key.rpartition(".")[2]
            near = difflib.get_close_matches(leaf, {k.rpartition(".")[2] for k in known}, n=1, cutoff=0.7)
            places = [k for k in known if near and k.rpartition(".")[2] == near[0] and not k.startswith("hydra.")]
            hint = f" Did you mean {' or '.join(places[:3])}?" if places else ""
    return f"no key or group '{key}' in this config.{hint} (+{key}=... adds a key.)"


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    """All keys, dotted."""
    keys: list[str] = []
    for name in config:
        key = prefix + str(name)
        keys.append(key)
        node = config._get_node(name)
        if isinstance(node, DictConfig) and not node._is_interpolation() and not node._is_none():
            keys += _keys(node, f"{key}.")
    return keys


def _flat(message: object) -> str:
    """A message of several lines as one, without the lines that repeat OmegaConf's and Hydra's internals."""
    lines = [line.strip() for line in str(message).splitlines()]
    dropped = ("object_type=", "reference_type=", "full_key: ", "Set the environment", "Are you sure")
    kept = [line for line in lines if line and not line.startswith(dropped)]
    key = re.search(r"full_key: (\S+)", str(message))
    text = re.sub(r"^\w+ raised while resolving interpolation: ", "", " ".join(kept)) or type(message).__name__
    return f"{text} (at {key[1]})" if key and key[1] not in text else text
