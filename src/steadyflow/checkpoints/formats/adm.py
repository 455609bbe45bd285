"""ADM, the U-Nets of guided-diffusion (Dhariwal & Nichol 2021) and improved-diffusion, and fine-tunes of them.

The structure is read off the weights: widths, blocks, attention, scale-shift norm, learned sigma, classes. What the
weights do not show is an argument.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steadyflow.checkpoints.formats import Converted, multiples
from steadyflow.checkpoints.nodes import nearest
from steadyflow.checkpoints.pickles import read_state

LAYERS = {  # theirs within a residual block, an attention block, a change of resolution -> ours
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "condition",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "skip",
    "norm": "norm",
    "qkv": "qkv",
    "proj_out": "out",
    "op": "conv",
    "conv": "conv",
}
OUTSIDE = {
    "time_embed.0": "conditioning.first",
    "time_embed.2": "conditioning.second",
    "label_emb": "conditioning.table",
    "input_blocks.0.0": "stem",
    "middle_block.0": "middle.0.block",
    "middle_block.1": "middle.0.attention",
    "middle_block.2": "middle.1.block",
    "out.0": "norm",
    "out.2": "head",
}


def read(
    file: str | Path,
    image_size: int,
    num_heads: int = 1,
    head_channels: int | None = None,
    new_attention_order: bool = False,
    schedule: str = "linear",
    steps: int = 1000,
    rescale_timesteps: bool = False,
    prediction: str = "eps",
) -> Converted:
    """A diffusion model of guided-diffusion, its index i of `steps` standing at t = (i + 1) / steps.

    Args:
        file: the state dict, as 256x256_diffusion.pt.
        image_size: it was trained at.
        num_heads, head_channels: of its attention, one of them; `num_heads`, `num_head_channels` of the original.
        new_attention_order: as the original's flag `use_new_attention_order`.
        schedule: linear, or cosine, which is this project's cosine path but for the last index, where the original
            clips beta at 0.999.
        steps, rescale_timesteps: the original's flags `diffusion_steps` and `rescale_timesteps`.
        prediction: eps, or x0 for the original's `predict_xstart`.

    A network with classes has no null label: it cannot be sampled without a class.

    Raises:
        FileNotFoundError, ValueError: as `read_state`; another kind of network; an unknown schedule or prediction.
    """
    if prediction not in ("eps", "x0"):
        raise ValueError(f"prediction is eps or x0, got {prediction}")
    state = plain_state(read_state(file), file)
    network = structure(state, image_size, file) | {"num_heads": num_heads, "head_channels": head_channels}
    path = schedule_node(schedule, steps)
    unit = 1000 / steps if rescale_timesteps else 1.0  # of the network's time, per index
    target = "EpsDenoiser" if prediction == "eps" else "X0Denoiser"
    denoiser = {"_target_": f"steadyflow.denoisers.{target}", "clock": [unit * steps, -unit]}
    return Converted(
        nodes={"network": network, "path": path, "denoiser": denoiser},
        state=rename(state, network, new_attention_order),
        shape=(network["in_channels"], image_size, image_size),
        num_classes=network["num_classes"],
        card={"format": "adm", "prediction": prediction, "schedule": f"{schedule}, {steps} steps"},
    )


def schedule_node(schedule: str, steps: int) -> dict[str, Any]:
    """The path of a schedule.

    Raises:
        ValueError: neither linear nor cosine.
    """
    if schedule == "linear":
        path: dict[str, Any] = {"_target_": "steadyflow.paths.DiscreteVariancePreserving"}
        return path | {"beta_start": 0.1 / steps, "beta_end": 20 / steps, "steps": steps}
    if schedule == "cosine":
        return {"_target_": "steadyflow.paths.Cosine", "s": 0.008}
    raise ValueError(f"schedule is linear or cosine, got {schedule}")


def plain_state(found: Any, file: str | Path) -> dict[str, Tensor]:
    """The state dict of a U-Net of this family, without prefixes of DataParallel.

    Raises:
        ValueError: it is none; names the first key that is missing.
    """
    if isinstance(found, Mapping):
        for key in ("state_dict", "model"):
            found = found[key] if isinstance(found.get(key), Mapping) else found
    tensors = {k.removeprefix("module."): v for k, v in found.items()} if isinstance(found, Mapping) else {}
    for key in ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight", "out.2.weight"):
        if not isinstance(tensors.get(key), Tensor):
            raise ValueError(f"{file} is no U-Net of guided-diffusion: it has no weight {key}{nearest(key, tensors)}")
    return tensors


def structure(
    state: Mapping[str, Tensor], image_size: int, file: str | Path, null_label: bool = False
) -> dict[str, Any]:
    """The options of our UNet that show in the weights of theirs, as its node.

    Raises:
        ValueError: weights of another structure: the numbers of blocks do not come out.
    """
    inner = {int(m[1]) for k in state if (m := re.match(r"input_blocks\.(\d+)\.", k))}
    outer = {int(m[1]) for k in state if (m := re.match(r"output_blocks\.(\d+)\.", k))}
    members = {
        (int(m[1]), m[2]) for k in state if (m := re.match(r"output_blocks\.(\d+)\.([12])\.(in_layers|conv)", k))
    }
    gaps = max(inner) + 1 - len(inner)  # changes of resolution without weights
    levels = 1 + (len(members) or gaps)
    blocks = len(outer) // levels - 1
    if len(outer) != levels * (blocks + 1) or max(inner) != levels * (blocks + 1) - 1:
        raise ValueError(
            f"{file} is no U-Net of guided-diffusion: {max(inner) + 1} blocks down and {len(outer)} up make no "
            f"{levels} levels"
        )
    first = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]
    widths = [state[f"{name}.0.out_layers.3.weight"].shape[0] for name in first]
    base = state["time_embed.0.weight"].shape[1]
    in_channels = state["input_blocks.0.0.weight"].shape[1]
    rows = state["label_emb.weight"].shape[0] if "label_emb.weight" in state else 0
    return {
        "_target_": "steadyflow.networks.UNet",
        "in_channels": in_channels,
        "image_size": image_size,
        "model_channels": base,
        "channel_mult": multiples(widths, base),
        "num_res_blocks": blocks,
        "attention_resolutions": [image_size // 2**k for k, n in enumerate(first) if f"{n}.1.qkv.weight" in state],
        "num_classes": rows - (1 if rows and null_label else 0),
        "null_label": null_label,
        "learned_sigma": state["out.2.weight"].shape[0] == 2 * in_channels,
        "scale_shift_norm": state[f"{first[0]}.0.emb_layers.1.weight"].shape[0] == 2 * widths[0],
        "resblock_updown": any(f"output_blocks.{n}.{m}.in_layers.0.weight" in state for n, m in members),
        "conv_resample": not gaps,
        "time_scale": 1.0,
        "time_endpoint": False,
        "norm_groups": 32,
    }


def rename(state: Mapping[str, Tensor], network: Mapping[str, Any], new_attention_order: bool) -> dict[str, Tensor]:
    """Their weights by our names, the layouts ours: attention as matrices in the order (q, k, v) x heads, time features
    sines first. Weights that the architecture does not have keep their names, to be named in the error of who loads.
    """
    blocks, renamed = network["num_res_blocks"], {}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        ours = f"{_place(name, state, blocks)}.{kind}"
        if ours.endswith("qkv." + kind) or ".attention.out." in ours:
            value = value.flatten(1) if kind == "weight" else value
        if ".attention.qkv." in ours and not new_attention_order:
            per_head = network["head_channels"]
            heads = value.shape[0] // 3 // per_head if per_head else network["num_heads"]
            value = value.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        if ours == "conditioning.first.weight":
            value = value.roll(value.shape[1] // 2, 1)  # cosines first -> sines first
        renamed[ours] = value
    return renamed


def _place(name: str, state: Mapping[str, Tensor], blocks: int) -> str:
    """Our name of a layer."""
    for theirs, ours in OUTSIDE.items():
        if name == theirs:
            return ours
        if name.startswith(f"{theirs}."):
            layer = name.removeprefix(f"{theirs}.")
            return f"{ours}.{LAYERS.get(layer, layer)}"
    match = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d)\.(.+)", name)
    if match is None:
        return name
    way, n, layer = match[1], int(match[2]), LAYERS.get(match[4], match[4])
    attention = f"{name.removesuffix(match[4])}qkv.weight" in state
    if way == "input":
        return f"down.{n - 1}.{'attention' if attention else 'block'}.{layer}"
    stage = n + n // (blocks + 1)  # ours counts the changes of resolution
    if match[3] == "0" or attention:
        return f"up.{stage}.{'attention' if attention else 'block'}.{layer}"
    return f"up.{stage + 1}.block.{layer}"
