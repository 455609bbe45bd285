"""A checkpoint on disk: a directory of three files, none of which holds code.

model.safetensors   the network's state dict
config.yaml         network, path and denoiser as {_target_, arguments}, shape, num_classes, and two sha256:
                    of the weights file, and of these entries themselves
card.md             how it was made; its front matter is the card as data
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self, cast, get_args

import torch
import yaml
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from steadyflow.checkpoints.formats import Converted, check_sizes
from steadyflow.checkpoints.nodes import build, nearest, read_yaml, shown
from steadyflow.checkpoints.weights import read_weights, write_weights
from steadyflow.data.image_writing import whole_file
from steadyflow.data.images import sha256_of
from steadyflow.denoisers import NetworkClassifier, NetworkDenoiser, NetworkNoise, VelocityNoise
from steadyflow.diffusions import LinearDiffusion
from steadyflow.paths import GaussianPath

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.yaml", "card.md"
NODES = ("network", "path", "denoiser")
ENTRIES = (*NODES, "shape", "num_classes", "sha256", "config_sha256")
CALLS = 2**16  # of torch's functions while a network is built: the largest published ones make 10000
Model = NetworkDenoiser | NetworkNoise | VelocityNoise | NetworkClassifier
Parts = tuple[Model, GaussianPath | LinearDiffusion, tuple[int, ...], int, str, dict[str, Any]]


def save(
    directory: str | Path,
    denoiser: Model,
    nodes: Mapping[str, Any],
    shape: Sequence[int],
    num_classes: int,
    card: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a checkpoint, each file whole or absent, config.yaml last.

    Args:
        directory: made where it is missing; files of an earlier save are replaced.
        denoiser: whose network's weights are saved.
        nodes: plain data {"network", "path", "denoiser"}, each {"_target_": ..., arguments}, from which `load` builds
            the denoiser again: what they build is compared with `denoiser` before anything is written.
        shape: S of one sample.
        num_classes: 0 without labels.
        card: plain data; config, seed, steps, git revision, metrics.
        dtype: of the weights in the file, as torch.float16; None keeps theirs. Buffers keep theirs in any case: the
            frequencies of a time embedding need it. `load` gives float32 (float64 for float64 weights).

    Raises:
        ValueError: nodes that build another denoiser, or data that is not plain.
    """
    directory = Path(directory)
    config: dict[str, Any] = {key: nodes.get(key) for key in NODES}
    config |= {"shape": [int(n) for n in shape], "num_classes": int(num_classes)}
    if unknown := sorted(set(nodes) - set(NODES)):
        raise ValueError(f"a checkpoint has no node {unknown[0]!r}{nearest(unknown[0], NODES)}")
    state = denoiser.network.state_dict()
    again = _build(config, "nodes", trusted=None)
    _check_state(again.network, state, "the network that the nodes build, against the one to save")
    t = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    if type(again) is not type(denoiser) or not torch.equal(torch.stack(again.path(t)), torch.stack(denoiser.path(t))):
        raise ValueError(
            f"the nodes build {_describe(again)}, but the denoiser to save is {_describe(denoiser)} with other settings"
        )
    parameters = denoiser.network.named_parameters(remove_duplicate=False)
    kinds = {name: dtype for name, weight in parameters if dtype and weight.is_floating_point()}
    _write_all(directory, config, state, card, kinds)


def save_converted(directory: str | Path, converted: Converted, where: str = "the file") -> None:
    """Writes what another project's checkpoint became, as `save` does; the weights may be views of a mapped file.

    Args:
        where: what an error says first.

    Raises:
        ValueError: weights that are missing or of another shape than the network's, by name, before anything is
            written; or data that is not plain.
    """
    config = {key: converted.nodes[key] for key in NODES}
    config |= {"shape": [int(n) for n in converted.shape], "num_classes": int(converted.num_classes)}
    _check_state(_build(config, "the converted checkpoint", trusted=()).network, converted.state, where)
    _write_all(Path(directory), config, converted.state, converted.card, {})


def _write_all(
    directory: Path,
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    card: Mapping[str, Any],
    kinds: Mapping[str, torch.dtype],
) -> None:
    try:
        json.dumps(config)
        text = _render(yaml.safe_dump(dict(card), sort_keys=False, width=120), card)
    except (TypeError, yaml.YAMLError) as error:
        raise ValueError(f"nodes and card must be plain data (dict, list, str, number, bool, None): {error}") from error
    directory.mkdir(parents=True, exist_ok=True)
    config["sha256"] = write_weights(directory / WEIGHTS, state, kinds)
    config["config_sha256"] = _config_hash(config)
    _write(directory / CARD, text)
    _write(directory / CONFIG, yaml.safe_dump(config, sort_keys=False, width=120))


def load_parts(directory: Path, sha256: str | None, trusted: Collection[str]) -> Parts:
    """What a checkpoint directory holds; see `checkpoint.load`."""
    if not (directory / CONFIG).is_file() and (directory / "model" / CONFIG).is_file():
        directory = directory / "model"
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"no checkpoint in {directory}: {name} is missing; give a directory that `steadyflow train` wrote"
            )
    config = _read_config(directory / CONFIG)
    file = directory / WEIGHTS
    found = sha256_of(file)
    for expected, source in ((config["sha256"], CONFIG), (sha256, "the caller")):
        if expected is not None and found != expected:
            raise ValueError(
                f"{file} is truncated or edited: {source} expects sha256 {shown(expected)}, found {found} "
                f"({file.stat().st_size} bytes); fetch or save it again"
            )
    try:
        check_sizes(config["shape"], config["num_classes"])
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from error
    denoiser = assembled(config, read_weights(file), str(directory / CONFIG), trusted, str(file))
    return denoiser, denoiser.path, tuple(config["shape"]), config["num_classes"], found, read_card(directory / CARD)


def assembled(
    nodes: Mapping[str, Any],
    state: Mapping[str, Tensor],
    where: str,
    trusted: Collection[str] = (),
    weights: str = "the file",
) -> Model:
    """The denoiser that nodes describe, in eval mode, with these weights themselves: none is copied that is float32.

    The network is built without memory of its own (on the meta device), compared with the weights by key and shape,
    and then takes them. Half-precision weights become float32; a state with float64 weights makes a float64 network.

    Raises:
        ValueError: nodes that build nothing, or weights of other keys or shapes.
    """
    model = _build(nodes, where, trusted)
    _check_state(model.network, state, weights)
    double = any(state[name].dtype == torch.float64 for name, _ in model.network.named_parameters())
    dtype = torch.float64 if double else torch.float32
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    if _has_further_tensors(model.network):  # buffers outside the state dict are made by building it for real
        model = _build(nodes, where, trusted, meta=False)
        model.to(dtype)
    model.network.load_state_dict(state, assign=True)
    return model.eval()


def _has_further_tensors(network: nn.Module) -> bool:
    """Whether a network without memory has tensors that its state dict does not hold."""
    held = {id(value) for value in network.state_dict(keep_vars=True).values()}
    for module in network.modules():
        own = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        if any(isinstance(value, Tensor) and value.is_meta and id(value) not in held for value in own):
            return True
    return False


def _build(config: Mapping[str, Any], where: str, trusted: Collection[str] | None, meta: bool = True) -> Model:
    own = str(config["network"]["_target_"] if isinstance(config["network"], dict) else "").startswith("steadyflow.")
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and nobody should notice
        with _WithoutMemory() if meta and own else nullcontext():  # a stranger's class may compute with tensors
            network = build(config["network"], f"{where}: network", trusted, (nn.Module,))
        path = build(config["path"], f"{where}: path", trusted, (GaussianPath, LinearDiffusion))
        kinds = get_args(Model)
        denoiser = build(config["denoiser"], f"{where}: denoiser", trusted, kinds, network=network, path=path)
    return cast(Model, denoiser)


class _WithoutMemory(TorchFunctionMode):
    """Tensors are made on the meta device, and left as they are by whoever would fill them.

    Filling them there would do nothing, after seconds of imports. Raises ValueError where somebody makes CALLS of them.
    """

    calls = 0

    def __enter__(self) -> Self:
        self.device = torch.device("meta")
        self.device.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.device.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls > CALLS:  # a file's "num_res_blocks: 1000000000" would build until the memory ends
            raise ValueError("a network of more than 10000 layers")
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        fills = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        filled = args[0] if args else kwargs.get("tensor")
        return filled if fills and isinstance(filled, Tensor) and filled.is_meta else func(*args, **kwargs)


def _read_config(file: Path) -> dict[str, Any]:
    """config.yaml, its entries complete and as they were saved."""
    config = read_yaml(file.read_text(errors="replace"), file)
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a mapping with {', '.join(ENTRIES)}")
    unknown = [str(key) for key in config if key not in ENTRIES]
    if missing := [key for key in ENTRIES if key not in config]:
        raise ValueError(
            f"{file} lacks {missing[0]!r}" + (f", and has {shown(repr(unknown[0]))} instead" if unknown else "")
        )
    if unknown:
        raise ValueError(f"{file} has the unknown entry {shown(repr(unknown[0]))}{nearest(unknown[0], ENTRIES)}")
    try:
        found = _config_hash(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} must hold plain data (dict, list, str, number, bool, None): {error}") from error
    if found != config["config_sha256"]:
        raise ValueError(
            f"{file} is truncated or edited: its config_sha256 is {shown(config['config_sha256'])}, found {found}; if "
            "the edit is yours, put the hash found in its place"
        )
    return config


def _config_hash(config: Mapping[str, Any]) -> str:
    """sha256 of all entries but itself, in canonical JSON."""
    entries = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def _check_state(network: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """That a state dict has the network's keys, shapes and kinds of numbers."""
    wanted = network.state_dict()
    missing, unexpected = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing:
        raise ValueError(f"{where}: {len(missing)} weights are missing, first {missing[0]}{nearest(missing[0], state)}")
    if unexpected:
        first = unexpected[0]
        near = nearest(first, wanted)
        raise ValueError(f"{where}: {len(unexpected)} weights are unexpected, first {shown(first)}{near}")
    for key, value in wanted.items():
        kind = state[key].dtype if isinstance(state[key], Tensor) else type(state[key]).__name__
        if isinstance(kind, str) or kind.is_floating_point != value.is_floating_point():
            raise ValueError(f"{where}: weight {key} is of {kind}, the network of config.yaml has {value.dtype}")
        if state[key].shape != value.shape:
            found, expected = shown(tuple(state[key].shape)), tuple(value.shape)
            raise ValueError(f"{where}: weight {key} has shape {found}, the network of config.yaml has {expected}")


def _describe(denoiser: Model) -> str:
    return f"{type(denoiser).__name__} of {type(denoiser.network).__name__} on {type(denoiser.path).__name__}"


def _write(file: Path, text: str) -> None:
    with whole_file(file) as temporary:
        temporary.write_text(text)


def _render(front: str, card: Mapping[str, Any]) -> str:
    """The model card: front matter, then the same for the eye, the config left to the front matter."""
    lines = [f"---\n{front}---\n\n# Model card\n"]
    lines += [f"- {key}: {value}" for key, value in card.items() if not isinstance(value, Mapping)]
    for key, value in card.items():
        if isinstance(value, Mapping) and key != "config":
            lines += [f"\n## {key}\n\n| | |\n|---|---|"]
            lines += [f"| {k} | {f'{v:.5g}' if isinstance(v, float) else v} |" for k, v in value.items()]
    return "\n".join(lines) + "\n"


def read_card(file: Path) -> dict[str, Any]:
    """The front matter of card.md; empty where there is none, since a card is only read by people."""
    text = file.read_text(errors="replace") if file.is_file() else ""
    front = re.match(r"---\n(.*?)^---$", text, re.DOTALL | re.MULTILINE)
    card = read_yaml(front[1], f"{file}: its front matter") if front else None
    return card if isinstance(card, dict) else {}
