"""DDPM: the U-Nets of Ho et al. 2020 in the pytorch_diffusion conversion (CIFAR-10, LSUN) and of the DDIM code
(CelebA 64, CelebA-HQ), and diffusers' UNet2DModel where it is that network.

The structure is read off the weights; the resolution is an argument.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steadyflow.checkpoints.formats import Converted, multiples
from steadyflow.checkpoints.nodes import nearest, shown
from steadyflow.checkpoints.pickles import read_state

# ours -> theirs
BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "condition": "temb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "nin_shortcut",
}
ATTENTION = {"norm": "norm", "q": "q", "k": "k", "v": "v", "out": "proj_out"}
OUTSIDE = {
    "conditioning.first": "temb.dense.0",
    "conditioning.second": "temb.dense.1",
    "stem": "conv_in",
    "norm": "norm_out",
    "head": "conv_out",
}


def read(
    file: str | Path,
    image_size: int,
    ema: bool = True,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    steps: int = 1000,
) -> Converted:
    """An eps-prediction of the discrete linear schedule, index i standing at t = (i + 1) / steps.

    Args:
        file: a state dict (pytorch_diffusion's ema_diffusion_*_model, where the file is the EMA already), or a
            training state of the DDIM code: [model, optimizer, epoch, step, EMA weights].
        image_size: it was trained at.
        ema: of a training state, the averaged weights.
        beta_start, beta_end, steps: of the schedule.

    Raises:
        FileNotFoundError, ValueError: as `read_state`; another kind of network; no EMA weights in a training state.
    """
    state = _plain_state(read_state(file), file, ema)
    levels = 1 + max(int(m[1]) for k in state if (m := re.match(r"down\.(\d+)\.", k)))
    blocks = 1 + max(int(m[1]) for k in state if (m := re.match(r"down\.0\.block\.(\d+)\.", k)))
    base, in_channels = state["conv_in.weight"].shape[:2]
    widths = [state[f"down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    network = {
        "_target_": "steadyflow.networks.UNet",
        "in_channels": in_channels,
        "image_size": image_size,
        "model_channels": base,
        "channel_mult": multiples(widths, base),
        "num_res_blocks": blocks,
        "attention_resolutions": [image_size // 2**k for k in range(levels) if f"down.{k}.attn.0.q.weight" in state],
        "conv_resample": levels == 1 or "down.0.downsample.conv.weight" in state,
        "asymmetric_padding": True,
        "time_scale": 1.0,
        "norm_groups": 32,
        "norm_eps": 1e-6,
    }
    path: dict[str, Any] = {"_target_": "steadyflow.paths.DiscreteVariancePreserving"}
    path |= {"beta_start": beta_start, "beta_end": beta_end, "steps": steps}
    return Converted(
        nodes={
            "network": network,
            "path": path,
            "denoiser": {"_target_": "steadyflow.denoisers.EpsDenoiser", "clock": [float(steps), -1.0]},
        },
        state=rename(state, levels, blocks),
        shape=(in_channels, image_size, image_size),
        card={"format": "ddpm", "prediction": "eps", "schedule": f"linear, {steps} steps"},
    )


def _plain_state(found: Any, file: str | Path, ema: bool) -> dict[str, Tensor]:
    if isinstance(found, list | tuple) and found and isinstance(found[0], Mapping):
        if ema and (len(found) < 5 or not isinstance(found[-1], Mapping)):
            raise ValueError(f"{file} is a training state without EMA weights: load it with ema=false")
        found = found[-1] if ema else found[0]
    tensors = {k.removeprefix("module."): v for k, v in found.items()} if isinstance(found, Mapping) else {}
    for key in ("temb.dense.0.weight", "conv_in.weight", "down.0.block.0.conv1.weight", "mid.attn_1.q.weight"):
        if not isinstance(tensors.get(key), Tensor):
            raise ValueError(f"{file} is no DDPM U-Net: it has no weight {key}{nearest(key, tensors)}")
    return tensors


def rename(state: Mapping[str, Tensor], levels: int, blocks: int) -> dict[str, Tensor]:
    """Their weights by our names; weights that the architecture does not have keep theirs.

    Raises:
        ValueError: more blocks than weights.
    """
    if not isinstance(blocks, int) or levels * blocks > len(state):
        raise ValueError(f"{levels} levels of {shown(blocks)} blocks, in {len(state)} weights")
    stages = {}  # ours -> theirs, the residual block, the attention or the convolution of each stage
    for level in range(levels):
        for i in range(blocks):
            stages[f"down.{level * (blocks + 1) + i}"] = (f"down.{level}.block.{i}", f"down.{level}.attn.{i}")
        stages[f"down.{level * (blocks + 1) + blocks}"] = (f"down.{level}.downsample", "")
        up = (levels - 1 - level) * (blocks + 2)
        for i in range(blocks + 1):
            stages[f"up.{up + i}"] = (f"up.{level}.block.{i}", f"up.{level}.attn.{i}")
        stages[f"up.{up + blocks + 1}"] = (f"up.{level}.upsample", "")
    stages |= {"middle.0": ("mid.block_1", "mid.attn_1"), "middle.1": ("mid.block_2", "")}
    layers = {theirs: ours for ours, theirs in OUTSIDE.items()}
    for stage, (block, attention) in stages.items():
        layers[f"{block}.conv"] = f"{stage}.block.conv"
        layers |= {f"{block}.{theirs}": f"{stage}.block.{ours}" for ours, theirs in BLOCK.items()}
        layers |= {f"{attention}.{theirs}": f"{stage}.attention.{ours}" for ours, theirs in ATTENTION.items()}
    renamed = {}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        renamed[f"{layers.get(name, name)}.{kind}"] = value
    for q in [key for key in renamed if re.search(r"\.attention\.q\.(weight|bias)$", key)]:
        parts = [renamed.pop(q.replace(".q.", f".{part}.")) for part in "qkv"]
        renamed[q.replace(".q.", ".qkv.")] = torch.cat([part.flatten(1) if part.ndim > 1 else part for part in parts])
    return {k: v.flatten(1) if k.endswith("attention.out.weight") else v for k, v in renamed.items()}
