"""diffusers' pixel-space pipelines: UNet2DModel with the config of its DDPM-like scheduler.

A network that our U-Net can be runs as ours, and needs no diffusers; any other UNet2DModel runs as diffusers' own.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steadyflow.checkpoints.formats import Converted, ddpm, multiples
from steadyflow.checkpoints.pickles import read_state

CONFIG, WEIGHTS = "config.json", ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
DEFAULTS: dict[str, Any] = {  # of UNet2DModel, where config.json leaves them out
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
}
FIXED: dict[str, Any] = {  # what our U-Net has one of
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "act_fn": "silu",
    "add_attention": True,
    "class_embed_type": None,
}
NAMES = (  # theirs -> pytorch_diffusion's
    (r"^time_embedding\.linear_([12])", lambda m: f"temb.dense.{int(m[1]) - 1}"),
    (r"^class_embedding", r"conditioning.table"),
    (r"^conv_norm_out", r"norm_out"),
    (r"^down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"^down_blocks\.(\d+)\.attentions\.(\d+)", r"down.\1.attn.\2"),
    (r"^down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"^mid_block\.attentions\.0", r"mid.attn_1"),
    (r"\.time_emb_proj", r".temb_proj"),
    (r"\.conv_shortcut", r".nin_shortcut"),
    (r"\.group_norm", r".norm"),
    (r"\.(?:to_q|query)\b", r".q"),
    (r"\.(?:to_k|key)\b", r".k"),
    (r"\.(?:to_v|value)\b", r".v"),
    (r"\.(?:to_out\.0|proj_attn)\b", r".proj_out"),
)
UP = {"resnets": "block", "attentions": "attn", "upsamplers": "upsample"}
PREDICTIONS = {"epsilon": "EpsDenoiser", "sample": "X0Denoiser", "v_prediction": "VDenoiser"}


def read(file: str | Path, image_size: int | None = None) -> Converted:
    """A UNet2DModel on the schedule it was trained with, index i of T standing at t = (i + 1) / T.

    Args:
        file: the pipeline's folder, or its unet folder, or the weights in one of them.
        image_size: of a config without sample_size.

    Raises:
        FileNotFoundError: no folder, config or weights there.
        ValueError: as `read_state`; a config of another model or schedule; no image_size.
    """
    folder, weights = _find(Path(file))
    config = DEFAULTS | _json(folder / CONFIG)
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(f"{folder / CONFIG} is of {config['_class_name']}; this format reads UNet2DModel")
    size = image_size or config.get("sample_size")
    if not isinstance(size, int):
        raise ValueError(f"{folder / CONFIG} has no sample_size; give image_size")
    schedule, path, denoiser = _schedule(folder)
    state: Mapping[str, Tensor] = read_state(weights)
    ours = _is_ours(config)
    network = _network(config, size) if ours else _their_network(config)
    return Converted(
        nodes={"network": network, "path": path, "denoiser": denoiser},
        state=rename(state, config) if ours else {f"network.{k}": v for k, v in state.items()},
        shape=(config["in_channels"], size, size),
        num_classes=config["num_class_embeds"] or 0,
        card={"format": "diffusers", "schedule": schedule},
    )


def rename(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """UNet2DModel's weights by our U-Net's names."""
    levels, renamed = len(config["block_out_channels"]), {}
    for key, value in state.items():
        key = re.sub(
            r"^up_blocks\.(\d+)\.(resnets|attentions|upsamplers)(\.\d+)",
            lambda m: f"up.{levels - 1 - int(m[1])}." + UP[m[2]] + ("" if m[2] == "upsamplers" else m[3]),
            key,
        )
        for pattern, name in NAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = value
    renamed = ddpm.rename(renamed, levels, config["layers_per_block"])
    if config["flip_sin_to_cos"]:
        first = renamed["conditioning.first.weight"]
        renamed["conditioning.first.weight"] = first.roll(first.shape[1] // 2, 1)
    return renamed


def _find(file: Path) -> tuple[Path, Path]:
    """The folder of the network's config, and its weights."""
    folder = file if file.is_dir() else file.parent
    if (folder / "unet").is_dir():
        folder = folder / "unet"
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"no {folder / CONFIG}: diffusers' weights are read beside their config")
    weights = [file] if file.is_file() else [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not weights:
        raise FileNotFoundError(f"no weights in {folder}: expected {' or '.join(WEIGHTS)}")
    return folder, weights[0]


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a mapping")
    return found


def _schedule(folder: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """What to call the schedule; the nodes of path and denoiser. Without a scheduler's config: DDPM's defaults."""
    places = [folder / "scheduler_config.json", folder.parent / "scheduler" / "scheduler_config.json"]
    file = next((place for place in places if place.is_file()), None)
    config = {"beta_schedule": "linear"} if file is None else _json(file)
    if "beta_schedule" not in config:
        raise ValueError(
            f"{file} is of {config.get('_class_name', 'no scheduler')}, which without a beta_schedule is no chain of "
            "DDPM's; this format reads networks of such chains"
        )
    steps, kind = int(config.get("num_train_timesteps", 1000)), config["beta_schedule"]
    prediction = config.get("prediction_type", "epsilon")
    changed = [key for key in ("trained_betas", "rescale_betas_zero_snr") if config.get(key)]
    if kind not in ("linear", "squaredcos_cap_v2") or changed or prediction not in PREDICTIONS:
        raise ValueError(
            f"{file}: this format knows beta_schedule linear and squaredcos_cap_v2 as they are, and "
            f"prediction_type {', '.join(PREDICTIONS)}; found {' with '.join([kind, *changed])}, and {prediction}"
        )
    path: dict[str, Any] = {"_target_": "steadyflow.paths.Cosine", "s": 0.008}
    if kind == "linear":
        path = {"_target_": "steadyflow.paths.DiscreteVariancePreserving", "steps": steps}
        path |= {"beta_start": config.get("beta_start", 1e-4), "beta_end": config.get("beta_end", 0.02)}
    target = f"steadyflow.denoisers.{PREDICTIONS[prediction]}"
    return f"{kind}, {steps} steps", path, {"_target_": target, "clock": [float(steps), -1.0]}


def _is_ours(config: Mapping[str, Any]) -> bool:
    """Whether our U-Net can be this network."""
    down, up = config["down_block_types"], config["up_block_types"]
    attends = [kind == "AttnDownBlock2D" for kind in down]
    default = config["resnet_time_scale_shift"] == "default"  # else the middle attention has no norm unless told so
    middle_groups = config["attn_norm_num_groups"] or (config["norm_num_groups"] if default else None)
    return (
        all(config[key] == value for key, value in FIXED.items())
        and set(down) <= {"DownBlock2D", "AttnDownBlock2D"}
        and list(up) == ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)]
        and config["freq_shift"] in (0, 1)
        and config["downsample_padding"] in (0, 1)
        and (default or config["resnet_time_scale_shift"] == "scale_shift")
        and middle_groups == config["norm_num_groups"]
        and config["out_channels"] in (config["in_channels"], 2 * config["in_channels"])
    )


def _network(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    widths = config["block_out_channels"]
    attends = [kind == "AttnDownBlock2D" for kind in config["down_block_types"]]
    return {
        "_target_": "steadyflow.networks.UNet",
        "in_channels": config["in_channels"],
        "image_size": size,
        "model_channels": widths[0],
        "channel_mult": multiples(widths, widths[0]),
        "num_res_blocks": config["layers_per_block"],
        "attention_resolutions": [size // 2**k for k, attention in enumerate(attends) if attention],
        "head_channels": config["attention_head_dim"],  # null: one head
        "num_classes": config["num_class_embeds"] or 0,
        "null_label": False,
        "learned_sigma": config["out_channels"] != config["in_channels"],
        "scale_shift_norm": config["resnet_time_scale_shift"] == "scale_shift",
        "asymmetric_padding": config["downsample_padding"] == 0,
        "time_scale": 1.0,
        "time_endpoint": config["freq_shift"] == 1,
        "norm_groups": config["norm_num_groups"],
        "norm_eps": config["norm_eps"],
    }


def _their_network(config: Mapping[str, Any]) -> dict[str, Any]:
    plain = {k: v for k, v in config.items() if not k.startswith("_")}
    return {"_target_": "steadyflow.networks.DiffusersUNet", "config": plain}
