"""Objects from plain data {_target_, arguments}, for files that may come from anybody."""

import difflib
import importlib
import inspect
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

LETTERS, PLACES = 2**17, 2**16  # that a file of YAML may have, and hold: ours have thousands, and a hundred
TRUSTED = ("steadyflow.networks", "steadyflow.paths", "steadyflow.diffusions", "steadyflow.denoisers")


def nearest(word: str, known: Collection[str]) -> str:
    """'; did you mean ...?' with the known word nearest to `word`, or nothing."""
    near = difflib.get_close_matches(word, list(islice(known, 10_000)), n=1, cutoff=0.5)  # a file may have millions
    return f"; did you mean {shown(near[0])}?" if near else ""


def shown(value: object, limit: int = 80) -> str:
    """A text, or the repr of anything else, on one line of no more than `limit` characters: a file may hold any."""
    text = (value if isinstance(value, str) else repr(value))[: limit + 1]
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class _Loader(yaml.SafeLoader):
    """YAML without merged keys (<<), of which ten lines can hold billions."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        pass


def read_yaml(text: str, where: str | Path) -> Any:
    """What YAML holds, as plain data that can be written out: no more than PLACES, however often it repeats its parts.

    Raises:
        ValueError: it is none, or holds more.
    """
    if len(text) > LETTERS:
        raise ValueError(f"{where} has {len(text)} characters, which is no YAML of a checkpoint's: {LETTERS} at most")
    try:
        found = yaml.load(text, _Loader)
    except Exception as error:  # YAMLError; of a date or number that is none, of lists in lists without end: others
        raise ValueError(f"{where} is no YAML: {shown(' '.join(str(error).split()), 300)}") from error
    left, rest = PLACES, [found]
    while rest:
        value = rest.pop()
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        left -= len(parts)
        if left < 0:
            raise ValueError(f"{where} repeats its parts, or itself, until it holds more than {PLACES}")
        rest += parts
    return found


def build(
    node: Any, where: str, trusted: Collection[str] | None = (), kinds: tuple[type, ...] = (object,), **given: Any
) -> Any:
    """The object that a node describes: its class called with its other entries and with `given`.

    Nodes among the arguments are built too. Only classes are called, and only those defined in the modules (or in
    modules below those) of TRUSTED and `trusted`, so that reading a stranger's file runs none of the stranger's code.

    Args:
        node: {"_target_": "package.module.Class", argument: plain data or node, ...}.
        where: what an error says first: the file and the key.
        trusted: module prefixes trusted beyond TRUSTED; None trusts every module.
        kinds: what its class, and those of the nodes inside, must be: known before anything of theirs takes memory.
        given: arguments that are not in the node.

    Raises:
        ValueError: what is wrong with the node, with the nearest right name.
    """
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        raise ValueError(f"{where} must be a mapping with a _target_, got {shown(node)}")
    cls = _resolve(node["_target_"], where, trusted)
    if not issubclass(cls, kinds):
        raise ValueError(f"{where}: {node['_target_']} is no {' or '.join(kind.__name__ for kind in kinds)}")
    known = inspect.signature(cls).parameters
    arguments = {}
    for key, value in node.items():
        if key == "_target_":
            continue
        if key in given or key not in known:
            raise ValueError(f"{where}: {node['_target_']} takes no {shown(repr(key))} here{nearest(str(key), known)}")
        nested = isinstance(value, dict) and "_target_" in value
        arguments[key] = build(value, f"{where}.{key}", trusted, kinds) if nested else value
    required = {k for k, p in known.items() if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if missing := sorted(required - arguments.keys() - given.keys()):
        raise ValueError(f"{where}: {node['_target_']} needs {', '.join(missing)}")
    try:
        return cls(**arguments, **given)
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError) as error:
        said = shown(" ".join(str(error).split()), 1000)
        raise ValueError(f"{where}: {node['_target_']} refuses its arguments: {said}") from error


def _resolve(target: str, where: str, trusted: Collection[str] | None) -> type:
    """The class of a dotted name, if it is trusted."""
    module, _, name = target.rpartition(".")
    if not _is_trusted(module, trusted):
        hint = nearest(target, [f"{prefix}.{name}" for prefix in TRUSTED for name in _classes(prefix)])
        prefix = module.partition(".")[0] or target
        raise ValueError(
            f"{where}: _target_ {shown(target)} is outside {', '.join(TRUSTED)}{hint or ';'} if the class is yours, or "
            f"you trust whoever wrote it, load with trusted=['{shown(prefix)}']"
        )
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise ValueError(f"{where}: _target_ {shown(target)} cannot be found: {shown(str(error))}") from error
    if not isinstance(found, type) or not _is_trusted(found.__module__, trusted):
        raise ValueError(f"{where}: {module} has no class {shown(repr(name))}{nearest(name, _classes(module))}")
    return found


def _is_trusted(module: str, trusted: Collection[str] | None) -> bool:
    return trusted is None or any(f"{module}.".startswith(f"{prefix}.") for prefix in (*TRUSTED, *trusted) if prefix)


def _classes(module: str) -> list[str]:
    """The public classes that a module defines or exports."""
    package = module.partition(".")[0]
    members = inspect.getmembers(importlib.import_module(module), inspect.isclass)
    return [name for name, cls in members if not name.startswith("_") and cls.__module__.partition(".")[0] == package]
