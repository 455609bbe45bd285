"""Pickles of EDM (Karras et al. 2022): DDPM++, NCSN++ and ADM, in VP, VE, iDDPM and EDM preconditioning."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steadyflow.checkpoints.formats import Converted
from steadyflow.checkpoints.machine import Record
from steadyflow.checkpoints.nodes import shown
from steadyflow.checkpoints.pickles import read_state

NETWORK, PATH, DENOISER = "steadyflow.networks", "steadyflow.paths", "steadyflow.denoisers"
BLOCK = {"norm0": "norm1", "conv0": "conv1", "affine": "condition", "norm1": "norm2", "conv1": "conv2", "skip": "skip"}
ATTENTION = {"norm2": "norm", "qkv": "qkv", "proj": "out"}
MAPPING = {"map_layer0": "conditioning.first", "map_layer1": "conditioning.second"}


def read(file: str | Path, sigma_max: float = 80.0, weights: str = "ema") -> Converted:
    """A network pickle of EDM; the source code inside is not run.

    Its preconditioning (Karras et al. 2022, Table 1; y = x / alpha, rho = sigma / alpha) becomes a denoiser of ours on
    the path that it came from:

        EDM    EDMDenoiser                 rho = sigma_max t
        VP     y - rho F(alpha y, 999 t)   EpsDenoiser on VariancePreserving
        VE     y + rho F(y, log(rho / 2))  EpsDenoiser on VarianceExploding: the last weights with the other sign
        iDDPM  y - rho F(alpha y, 1000 t - 1)   EpsDenoiser on Cosine; the original rounds 1000 t

    Augmentation labels are zero whenever one samples, so their weights are left out.

    Args:
        file: the pickle.
        sigma_max: of EDM preconditioning, where sampling begins.
        weights: which network of the pickle, where it holds a dict of them.

    Raises:
        ValueError: a pickle of another kind, or a network that no published checkpoint has.
    """
    net = network_record(file, weights)
    model = net.state["_modules"]["model"]
    if model.name not in ("SongUNet", "DhariwalUNet"):
        raise ValueError(f"{file}: EDM's networks are SongUNet and DhariwalUNet, this one is {model.name}")
    arguments, state = (_song if model.name == "SongUNet" else _dhariwal)(model, str(file))
    path, denoiser, time = _preconditioning(net, sigma_max, str(file))
    if arguments["_target_"].endswith(".UNet"):
        if "time_shift" in time:
            raise ValueError(f"{file}: VE preconditioning of ADM is not supported, and no published checkpoint has it")
        arguments |= {"time_endpoint": False}
    if net.name == "VEPrecond":
        state = negated(state)
    settings = settings_of(net)
    shape = (settings["img_channels"], settings["img_resolution"], settings["img_resolution"])
    card = {"format": "edm", "architecture": model.name, "preconditioning": net.name}
    return Converted(
        nodes={"network": arguments | time, "path": path, "denoiser": denoiser},
        state=state,
        shape=shape,
        num_classes=settings.get("label_dim", 0),
        card=card | {"label_dropout": settings_of(model).get("label_dropout", 0)},
    )


def network_record(file: str | Path, weights: str) -> Record:
    """The network of a pickle, which holds it alone or in a dict."""
    found = read_state(file)
    net = found.get(weights) if isinstance(found, Mapping) else found
    if not isinstance(net, Record) or "_modules" not in net.state:
        kind = f"a dict of {', '.join(map(str, found))}" if isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise ValueError(f"{file}: expected a network pickle of EDM with a network {weights!r}, found {kind}")
    return net


def settings_of(record: Record) -> dict[str, Any]:
    """The arguments a network was built with, and the attributes it kept of those left at their defaults.

    Raises:
        ValueError: more blocks than weights.
    """
    plain = {k: v for k, v in record.state.items() if not k.startswith("_")}
    settings = plain | dict(record.state["_init_kwargs"])
    levels, blocks, weights = len(settings.get("channel_mult", ())), settings.get("num_blocks", 1), record.tensors()
    if not isinstance(blocks, int) or levels * blocks > len(weights):
        raise ValueError(f"{levels} levels of {shown(blocks)} blocks, in {len(weights)} weights")
    return settings


def _preconditioning(net: Record, sigma_max: float, file: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Path, denoiser, and the network's arguments of time."""
    own = settings_of(net)
    eps = {"_target_": f"{DENOISER}.EpsDenoiser"}
    if net.name == "EDMPrecond":
        path = {"_target_": f"{PATH}.EDM", "sigma_max": sigma_max}
        denoiser = {"_target_": f"{DENOISER}.EDMDenoiser", "sigma_data": own["sigma_data"]}
        return path, denoiser, {"time_scale": 1.0}
    if net.name == "VPPrecond":
        low, high = own["beta_min"], own["beta_min"] + own["beta_d"]
        path = {"_target_": f"{PATH}.VariancePreserving", "beta_min": low, "beta_max": high}
        return path, eps, {"time_scale": own["M"] - 1.0}
    if net.name == "VEPrecond":
        low, high = own["sigma_min"], own["sigma_max"]
        path = {"_target_": f"{PATH}.VarianceExploding", "sigma_min": low, "sigma_max": high}
        return path, eps, {"time_scale": math.log(high / low), "time_shift": math.log(low / 2)}
    if net.name == "iDDPMPrecond":
        path = {"_target_": f"{PATH}.Cosine", "s": own["C_2"]}
        return path, eps | {"clock": [float(own["M"]), -1.0]}, {"time_scale": 1.0}
    known = "EDMPrecond, VPPrecond, VEPrecond and iDDPMPrecond"
    raise ValueError(f"{file}: EDM's preconditionings are {known}, this one is {net.name}")


def _song(model: Record, file: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of NCSNpp and its weights."""
    own = settings_of(model)
    fourier, fir = own.get("embedding_type") == "fourier", own.get("resample_filter", [1, 1]) == [1, 3, 3, 1]
    encoder, decoder = own.get("encoder_type", "standard"), own.get("decoder_type", "standard")
    mult, blocks, size = own.get("channel_mult", [1, 2, 2, 2]), own.get("num_blocks", 4), own["img_resolution"]
    if own.get("channel_mult_emb", 4) != 4 or own.get("channel_mult_noise", 1) != 1 + fourier:
        raise ValueError(f"{file}: no published SongUNet has its channel_mult_emb and channel_mult_noise")
    arguments = {
        "_target_": f"{NETWORK}.NCSNpp",
        "in_channels": own["in_channels"],
        "out_channels": own["out_channels"],
        "model_channels": own.get("model_channels", 128),
        "channel_mult": list(mult),
        "num_res_blocks": blocks,
        "attention_resolutions": list(own.get("attn_resolutions", [16])),
        "image_size": size,
        "dropout": own.get("dropout", 0.1),
        "num_classes": own.get("label_dim", 0),
        "fourier": fourier,
        "fir": fir,
        "input_pyramid": None if encoder == "standard" else encoder,
        "output_pyramid": decoder == "skip",
    }
    names, levels = dict(MAPPING), len(mult)
    for level in range(levels):
        at, up = f"{size >> level}x{size >> level}", levels - 1 - level
        names |= {f"enc.{at}_conv": "stem"} if level == 0 else {f"enc.{at}_down": f"down.{level}.0"}
        names |= {f"enc.{at}_aux_{kind}": f"pyramid.{level - 1}" for kind in ("skip", "residual")}
        names |= {f"enc.{at}_block{i}": f"down.{level}.{i + (level > 0)}" for i in range(blocks)}
        names |= {f"dec.{at}_in{i}": f"middle.{i}" for i in range(2)} if up == 0 else {f"dec.{at}_up": f"up.{up}.0"}
        names |= {f"dec.{at}_block{i}": f"up.{up}.{i + (up > 0)}" for i in range(blocks + 1)}
        head = f"heads.{up if decoder == 'skip' else 0}"
        names |= {f"dec.{at}_aux_norm": f"{head}.norm", f"dec.{at}_aux_conv": f"{head}.conv"}
    tensors = model.tensors()
    state = rename(tensors, names, file, left_out=("map_label.", "map_augment.", "map_noise."))
    if fourier:
        state["conditioning.features.frequencies"] = tensors["map_noise.freqs"]
    if "map_label.weight" in tensors:  # rows of a table in place of a product with a one-hot vector; no label: zeros
        weight, bias = tensors["map_label.weight"].double(), tensors["map_label.bias"].double()
        rows = torch.cat([weight.T * math.sqrt(weight.shape[1]), torch.zeros(1, len(weight))]) + bias
        state["conditioning.table.weight"] = rows.to(tensors["map_label.weight"].dtype)
    return arguments, state


def _dhariwal(model: Record, file: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments of UNet and its weights."""
    own = settings_of(model)
    mult, blocks, size = own.get("channel_mult", [1, 2, 3, 4]), own.get("num_blocks", 3), own["img_resolution"]
    if own.get("channel_mult_emb", 4) != 4:
        raise ValueError(f"{file}: no published DhariwalUNet has channel_mult_emb={own['channel_mult_emb']}")
    arguments = {
        "_target_": f"{NETWORK}.UNet",
        "in_channels": own["in_channels"],
        "model_channels": own.get("model_channels", 192),
        "channel_mult": list(mult),
        "num_res_blocks": blocks,
        "attention_resolutions": list(own.get("attn_resolutions", [32, 16, 8])),
        "image_size": size,
        "head_channels": 64,
        "dropout": own.get("dropout", 0.1),
        "num_classes": own.get("label_dim", 0),
        "learned_sigma": own["out_channels"] == 2 * own["in_channels"],
        "scale_shift_norm": True,
        "resblock_updown": True,
    }
    down, up = level_names(size, len(mult), blocks)
    names = MAPPING | {f"enc.{size}x{size}_conv": "stem", "out_norm": "norm", "out_conv": "head"}
    names |= {name: f"down.{i}" for i, name in enumerate(down)} | {name: f"up.{i}" for i, name in enumerate(up)}
    last = size >> len(mult) - 1
    names |= {f"dec.{last}x{last}_in{i}": f"middle.{i}" for i in range(2)}
    tensors = model.tensors()
    state = rename(tensors, names, file, head_channels=64, block="block.", left_out=("map_label.", "map_augment."))
    first = state["conditioning.first.weight"]
    state["conditioning.first.weight"] = first.roll(first.shape[1] // 2, 1)  # cosines first -> sines first
    if "map_label.weight" in tensors:
        rows = tensors["map_label.weight"].T
        state["conditioning.table.weight"] = torch.cat([rows, torch.zeros_like(rows[:1])])
    return arguments, state


def level_names(size: int, levels: int, blocks: int) -> tuple[list[str], list[str]]:
    """The blocks of the way down and of the way up (without the middle), as EDM names them, in order."""
    down, up = [], []
    for level in range(levels):
        at = f"{size >> level}x{size >> level}"
        down += [f"enc.{at}_down"] * (level > 0) + [f"enc.{at}_block{i}" for i in range(blocks)]
    for level in reversed(range(levels)):
        at = f"{size >> level}x{size >> level}"
        up += [f"dec.{at}_up"] * (level < levels - 1) + [f"dec.{at}_block{i}" for i in range(blocks + 1)]
    return down, up


def negated(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an NCSNpp whose output has the other sign."""
    return {k: -v if k.startswith("heads.") and ".conv." in k else v for k, v in state.items()}


def rename(
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
    file: str,
    head_channels: int | None = None,
    block: str = "",
    left_out: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Weights by our names; `names` is of whole blocks and of layers outside them, `block` stands before a block's."""
    state = {}
    for key, value in tensors.items():
        if key.startswith(left_out) or key.endswith("resample_filter"):
            continue
        layer, _, kind = key.rpartition(".")
        if layer in names:
            state[f"{names[layer]}.{kind}"] = value
            continue
        place, _, part = layer.rpartition(".")
        if place not in names or part not in BLOCK | ATTENTION:
            raise ValueError(f"{file}: weight {key} has no place in our network")
        name = f"{block}{BLOCK[part]}" if part in BLOCK else f"attention.{ATTENTION[part]}"
        state[f"{names[place]}.{name}.{kind}"] = _layout(part, value, head_channels)
    return state


def _layout(part: str, value: Tensor, head_channels: int | None) -> Tensor:
    """Attention's 1 x 1 convolutions as matrices; q, k, v one after the other, where EDM has them side by side."""
    if part not in ("qkv", "proj"):
        return value
    value = value.flatten(1) if value.ndim > 1 else value
    if part == "proj":
        return value
    return value.unflatten(0, (-1, head_channels or len(value) // 3, 3)).movedim(2, 0).flatten(0, 2)
