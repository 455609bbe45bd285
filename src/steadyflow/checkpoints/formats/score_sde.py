"""Training states of score_sde (Song et al. 2021): NCSN++ and DDPM++ on VP, sub-VP and VE diffusions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steadyflow.checkpoints.formats import Converted
from steadyflow.checkpoints.formats.edm import DENOISER, NETWORK, PATH, negated
from steadyflow.checkpoints.pickles import read_state

BLOCK = {
    "GroupNorm_0": "norm1",
    "Conv_0": "conv1",
    "Dense_0": "condition",
    "GroupNorm_1": "norm2",
    "Conv_1": "conv2",
    "Conv_2": "skip",
}
FIXED = ".W"  # the Fourier frequencies end so, and are no trained parameters: the moving average has none


def read(
    file: str | Path,
    sde: str = "vp",
    continuous: bool = True,
    beta_min: float = 0.1,
    beta_max: float = 20.0,
    sigma_min: float = 0.01,
    sigma_max: float = 50.0,
    channels: int = 3,
    model_channels: int = 128,
    channel_mult: Sequence[int] = (1, 2, 2, 2),
    num_res_blocks: int = 4,
    attention_resolutions: Sequence[int] = (16,),
    image_size: int = 32,
    dropout: float = 0.1,
    fourier: bool = False,
    fir: bool = False,
    input_pyramid: str | None = None,
    output_pyramid: bool = False,
    weights: str = "ema",
) -> Converted:
    """A training state {model, ema, optimizer, step} of the PyTorch code, or a bare state dict.

    VP and sub-VP networks return the noise eps, at 999 t (continuous) or at the index 1000 t - 1. VE networks return
    -eps / sigma, and see log sigma, or (not continuous) the index 999 (1 - t) counted from the largest sigma; their
    images lie in [0, 1], so in [-1, 1] every sigma doubles. In all cases the denoiser is EpsDenoiser, for VE with the
    sign and the division taken out of the last weights.

    Args:
        file: checkpoint_N.pth.
        sde: vp, subvp or ve.
        continuous: whether it was trained at all times, or at 1000 of them.
        beta_min, beta_max: of VP and sub-VP.
        sigma_min, sigma_max: of VE, in units of images in [0, 1], as in the original's configs.
        channels ... output_pyramid: of the network; see NCSNpp. The defaults are DDPM++ of CIFAR-10; NCSN++ has
            fir=True, input_pyramid=residual, and for continuous VE fourier=True; "deep" has num_res_blocks=8.
        weights: ema, the moving average, or model.

    Raises:
        ValueError: a file of another kind, or weights that do not fit; another sde.
    """
    if sde not in ("vp", "subvp", "ve"):
        raise ValueError(f"sde must be vp, subvp or ve, got {sde}")
    time: dict[str, float]
    path: dict[str, Any]
    if sde == "ve":
        path = {"_target_": f"{PATH}.VarianceExploding", "sigma_min": 2 * sigma_min, "sigma_max": 2 * sigma_max}
        time = {"time_scale": math.log(sigma_max / sigma_min), "time_shift": math.log(sigma_min)}
        if not continuous:
            time = {"time_scale": -999.0, "time_shift": 999.0}
    else:
        name = "VariancePreserving" if sde == "vp" else "SubVariancePreserving"
        path = {"_target_": f"{PATH}.{name}", "beta_min": beta_min, "beta_max": beta_max}
        time = {"time_scale": 999.0}
        if not continuous and sde == "vp":
            betas = {"beta_start": beta_min / 1000, "beta_end": beta_max / 1000}
            path = {"_target_": f"{PATH}.DiscreteVariancePreserving"} | betas
            time = {"time_scale": 1000.0, "time_shift": -1.0, "time_min": 0.0}
    sizes = (channels, model_channels, channel_mult, num_res_blocks, attention_resolutions, image_size, dropout)
    network = network_node(*sizes, fourier, fir, input_pyramid, output_pyramid)
    state, step = network_state(file, network, weights)
    if sde == "ve":
        state = negated(state)
    return Converted(
        nodes={"network": network | time, "path": path, "denoiser": {"_target_": f"{DENOISER}.EpsDenoiser"}},
        state=state,
        shape=(channels, image_size, image_size),
        card={"format": "score_sde", "sde": sde, "continuous": continuous, "weights": weights, "steps": step},
    )


def network_node(
    channels: int,
    model_channels: int,
    channel_mult: Sequence[int],
    num_res_blocks: int,
    attention_resolutions: Sequence[int],
    image_size: int,
    dropout: float,
    fourier: bool,
    fir: bool,
    input_pyramid: str | None,
    output_pyramid: bool,
) -> dict[str, Any]:
    """The network, but for its own time: arguments of NCSNpp."""
    return {
        "_target_": f"{NETWORK}.NCSNpp",
        "in_channels": channels,
        "model_channels": model_channels,
        "channel_mult": list(channel_mult),
        "num_res_blocks": num_res_blocks,
        "attention_resolutions": list(attention_resolutions),
        "image_size": image_size,
        "dropout": dropout,
        "fourier": fourier,
        "fir": fir,
        "input_pyramid": input_pyramid,
        "output_pyramid": output_pyramid,
    }


def network_state(file: str | Path, network: Mapping[str, Any], weights: str) -> tuple[dict[str, Tensor], int | None]:
    """The weights of a training state under the names of NCSNpp(**network), and the training step."""
    found = read_state(file)
    if not isinstance(found, Mapping):
        raise ValueError(f"{file}: expected a training state of score_sde, found a {type(found).__name__}")
    if "model" not in found:
        return _rename(_tensors(found, file), network, file), None
    model, step = _tensors(found["model"], file), found.get("step")
    if weights not in ("ema", "model"):
        raise ValueError(f"weights must be ema or model, got {weights}")
    if weights == "ema":
        average = found["ema"]["shadow_params"]
        trained = [key for key in model if not (key.endswith(FIXED) and "NIN" not in key)]
        if len(average) != len(trained):
            raise ValueError(f"{file}: the moving average has {len(average)} weights, the model {len(trained)}")
        for key, value in zip(trained, average, strict=True):
            if value.shape != model[key].shape:
                have, want = tuple(value.shape), tuple(model[key].shape)
                raise ValueError(f"{file}: the moving average of {key} has shape {have}, the model's is {want}")
            model[key] = value
    return _rename(model, network, file), step


def _tensors(found: Mapping[str, Any], file: str | Path) -> dict[str, Tensor]:
    """The weights, in the order of construction, without the prefix of DataParallel and the buffer of noise levels."""
    state = {k.removeprefix("module."): v for k, v in found.items() if isinstance(v, Tensor)}
    if not any(key.startswith("all_modules.") for key in state):
        raise ValueError(f"{file}: expected weights all_modules.0... of score_sde, found {next(iter(state), 'none')}")
    return {key: value for key, value in state.items() if key != "sigmas"}


def _rename(tensors: Mapping[str, Tensor], network: Mapping[str, Any], file: str | Path) -> dict[str, Tensor]:
    ours = dict(enumerate(_order(network)))
    state, seen = {}, set()
    for key, value in tensors.items():
        _, index, *part = key.split(".")
        if int(index) not in ours:
            raise ValueError(f"{file}: weight {key} is one too many: the network described has {len(ours)} modules")
        seen.add(int(index))
        place = ours[int(index)]
        if place == "conditioning.features":
            state[f"{place}.frequencies"] = value
        elif part[0].startswith("NIN") or place.endswith("attention"):
            continue  # below
        elif part[0] in BLOCK and place.startswith(("down", "middle", "up")):
            state[f"{place}.{BLOCK[part[0]]}.{part[1]}"] = value
        else:
            state[f"{place}.{part[-1]}"] = value
    for number, place in ours.items():
        if place.endswith("attention"):
            state |= _attention(tensors, f"all_modules.{number}", place, file)
    if len(seen) != len(ours):
        absent = min(set(ours) - seen)
        raise ValueError(f"{file}: all_modules.{absent}, {ours[absent]} of the network described, is missing")
    return state


def _attention(tensors: Mapping[str, Tensor], key: str, place: str, file: str | Path) -> dict[str, Tensor]:
    """Four matrices (in, out) as one of q, k, v and one of the output, (out, in)."""
    try:
        matrices = [tensors[f"{key}.NIN_{i}.W"].T for i in range(4)]
        biases = [tensors[f"{key}.NIN_{i}.b"] for i in range(4)]
        norm = {f"{place}.norm.{k}": tensors[f"{key}.GroupNorm_0.{k}"] for k in ("weight", "bias")}
    except KeyError as error:
        raise ValueError(f"{file}: no weight {error.args[0]}, which attention in {place} needs") from error
    qkv = {f"{place}.qkv.weight": torch.cat(matrices[:3]), f"{place}.qkv.bias": torch.cat(biases[:3])}
    return norm | qkv | {f"{place}.out.weight": matrices[3], f"{place}.out.bias": biases[3]}


def _order(network: Mapping[str, Any]) -> Iterator[str]:
    """The places of our network in the order in which the original lists its modules."""
    levels, blocks = len(network["channel_mult"]), network["num_res_blocks"]
    attends = [network["image_size"] >> level in network["attention_resolutions"] for level in range(levels)]
    if network["fourier"]:
        yield "conditioning.features"
    yield from ("conditioning.first", "conditioning.second", "stem")
    for level in range(levels):
        if level:
            yield f"down.{level}.0"
            if network["input_pyramid"]:
                yield f"pyramid.{level - 1}"
        for i in range(blocks):
            yield f"down.{level}.{i + (level > 0)}"
            if attends[level]:
                yield f"down.{level}.{i + (level > 0)}.attention"
    yield from ("middle.0", "middle.0.attention", "middle.1")
    for up in range(levels):
        if up:
            yield f"up.{up}.0"
        for i in range(blocks + 1):
            yield f"up.{up}.{i + (up > 0)}"
        if attends[levels - 1 - up]:
            yield f"up.{up}.{blocks + (up > 0)}.attention"
        if network["output_pyramid"] or up == levels - 1:
            head = f"heads.{up if network['output_pyramid'] else 0}"
            yield from (f"{head}.norm", f"{head}.conv")
