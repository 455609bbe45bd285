"""Checkpoints of GET (Geng et al. 2023): one-step generators with an equilibrium transformer."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from steadyflow.checkpoints.formats import Converted
from steadyflow.checkpoints.pickles import read_state

BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "qkv",
    "attn.proj": "out",
    "mlp.fc1": "first",
    "mlp.fc2": "second",
}
TOP = {
    "x_embedder.proj": "stem",
    "y_embedder.embedding_table": "table",
    "qkv_inj": "inject",
    "final_layer.norm_final": "norm",
    "final_layer.linear": "head",
}


def read(file: str | Path, iterations: int = 6, head_channels: int = 64, weights: str = "ema") -> Converted:
    """A training state {args, model, ema, opt} of the original code, or a bare state dict.

    The network's sizes are those of its weights. It maps noise to an image whatever the time: X0Denoiser on
    ConditionalOT, which at t = 1 is noise alone; a sampler of one step (sampler=one_step) uses nothing else.

    Args:
        file: checkpoint.
        iterations: of the fixed-point iteration; 6 in the original's evaluation.
        head_channels: channels per head, 64 in all five models.
        weights: ema, the moving average, or model.

    Raises:
        ValueError: a file of another kind.
    """
    found = read_state(file)
    if isinstance(found, Mapping) and weights in found:
        found = found[weights]
    if not isinstance(found, Mapping) or "qkv_inj.weight" not in found:
        raise ValueError(
            f"{file}: expected a checkpoint of GET with weights {weights!r}, found none with qkv_inj.weight"
        )
    state: dict[str, Tensor] = {}
    for key, value in found.items():
        module, _, kind = key.rpartition(".")
        if key == "pos_embed":
            state["positions"] = value[0]
        elif module in TOP:
            state[f"{TOP[module]}.{kind}"] = value
        elif key.startswith(("blocks.", "deq_blocks.")) and ".".join(module.split(".")[2:]) in BLOCK:
            stack, number, *part = module.split(".")
            place = "injection" if stack == "blocks" else "blocks"
            state[f"{place}.{number}.{BLOCK['.'.join(part)]}.{kind}"] = value
        else:
            raise ValueError(f"{file}: weight {key} has no place in our network")
    width, channels, patch, _ = state["stem.weight"].shape
    size = patch * round(len(state["positions"]) ** 0.5)
    depths = [
        len({key.split(".")[1] for key in state if key.startswith(f"{stack}.")}) for stack in ("injection", "blocks")
    ]
    classes = len(state["table.weight"]) if "table.weight" in state else 0
    network = {
        "_target_": "steadyflow.networks.GET",
        "in_channels": channels,
        "image_size": size,
        "patch_size": patch,
        "width": width,
        "depth": depths[0],
        "equilibrium_depth": depths[1],
        "expansion": len(state["injection.0.first.weight"]) / width,
        "equilibrium_expansion": len(state["blocks.0.first.weight"]) / width,
        "head_channels": head_channels,
        "num_classes": classes,
        "iterations": iterations,
    }
    return Converted(
        nodes={
            "network": network,
            "path": {"_target_": "steadyflow.paths.ConditionalOT"},
            "denoiser": {"_target_": "steadyflow.denoisers.X0Denoiser"},
        },
        state=state,
        shape=(channels, size, size),
        num_classes=classes,
        card={"format": "get", "architecture": "GET", "iterations": iterations, "weights": weights},
    )
