"""The noisy classifiers of guided-diffusion (Dhariwal & Nichol 2021): no denoiser, but a guide of one."""

import re
from pathlib import Path
from typing import Any

from steadyflow.checkpoints.formats import Converted, multiples
from steadyflow.checkpoints.formats.adm import rename, schedule_node
from steadyflow.checkpoints.nodes import nearest
from steadyflow.checkpoints.pickles import read_state

POOL = {"out.2.positional_embedding": "pool.position", "out.2.qkv_proj": "pool.qkv", "out.2.c_proj": "pool.out"}


def read(
    file: str | Path, image_size: int, head_channels: int = 64, schedule: str = "linear", steps: int = 1000
) -> Converted:
    """A classifier with attention pooling, its index i of `steps` standing at t = (i + 1) / steps.

    Args:
        file: the state dict, as 256x256_classifier.pt.
        image_size: it was trained at.
        head_channels: of its attention.
        schedule, steps: of the noise it was trained on; see `adm.read`.

    Raises:
        FileNotFoundError, ValueError: as `read_state`; another kind of network; an unknown schedule.
    """
    state = read_state(file)
    state = {k.removeprefix("module."): v for k, v in state.items()} if isinstance(state, dict) else {}
    for key in ("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.positional_embedding"):
        if key not in state:
            raise ValueError(f"{file} is no classifier of guided-diffusion: it has no {key}{nearest(key, state)}")
    position = state["out.2.positional_embedding"]  # of the mean and of the positions of the last level, a square
    levels = 1 + (image_size // round((position.shape[1] - 1) ** 0.5)).bit_length() - 1
    last = max(int(m[1]) for k in state if (m := re.match(r"input_blocks\.(\d+)\.", k)))
    blocks = (last + 1) // levels - 1
    first = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]
    widths = [state[f"{name}.0.out_layers.3.weight"].shape[0] for name in first]
    base, in_channels = state["time_embed.0.weight"].shape[1], state["input_blocks.0.0.weight"].shape[1]
    network: dict[str, Any] = {
        "_target_": "steadyflow.networks.NoisyClassifier",
        "in_channels": in_channels,
        "image_size": image_size,
        "model_channels": base,
        "channel_mult": multiples(widths, base),
        "num_res_blocks": blocks,
        "attention_resolutions": [image_size // 2**k for k, n in enumerate(first) if f"{n}.1.qkv.weight" in state],
        "num_classes": state["out.2.c_proj.weight"].shape[0],
        "head_channels": head_channels,
        "scale_shift_norm": state[f"{first[0]}.0.emb_layers.1.weight"].shape[0] == 2 * widths[0],
        "resblock_updown": levels == 1 or f"input_blocks.{blocks + 1}.0.in_layers.0.weight" in state,
    }
    renamed = rename({k: v for k, v in state.items() if not k.startswith("out.2.")}, network, new_attention_order=False)
    for theirs, ours in POOL.items():
        for key in (k for k in state if k == theirs or k.startswith(f"{theirs}.")):
            value = state[key]
            renamed[key.replace(theirs, ours)] = (
                value.T if key == theirs else value.flatten(1) if value.ndim == 3 else value
            )
    clock = [float(steps), -1.0]
    return Converted(
        nodes={
            "network": network,
            "path": schedule_node(schedule, steps),
            "denoiser": {"_target_": "steadyflow.denoisers.NetworkClassifier", "clock": clock},
        },
        state=renamed,
        shape=(in_channels, image_size, image_size),
        num_classes=network["num_classes"],
        card={"format": "adm_classifier", "prediction": "class", "schedule": f"{schedule}, {steps} steps"},
    )
