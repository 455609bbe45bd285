"""Pickles of EDM2 (Karras et al. 2024): the magnitude-preserving U-Net."""

from pathlib import Path

from torch import Tensor

from steadyflow.checkpoints.formats import Converted
from steadyflow.checkpoints.formats.edm import DENOISER, NETWORK, PATH, level_names, network_record, settings_of
from steadyflow.networks.edm2 import HEAD_CHANNELS

BLOCK = {"conv_res0": "conv1", "conv_res1": "conv2", "emb_linear": "condition", "conv_skip": "skip"}
BLOCK |= {"attn_qkv": "qkv", "attn_proj": "out"}
TOP = {
    "out_gain": "gain",
    "emb_fourier.freqs": "features.frequencies",
    "emb_fourier.phases": "features.phases",
    "emb_noise.weight": "time.weight",
    "emb_label.weight": "labels.weight",
    "out_conv.weight": "head.weight",
}
FIXED = {  # what every published network has, and ours
    "resample_filter": [1, 1],
    "channels_per_head": HEAD_CHANNELS,
    "res_balance": 0.3,
    "attn_balance": 0.3,
    "clip_act": 256,
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "channel_mult_noise": None,
    "channel_mult_emb": None,
}


def read(file: str | Path, sigma_max: float = 80.0, weights: str = "ema") -> Converted:
    """A network pickle of EDM2; the source code inside is not run.

    ImageNet-512 networks work on latents (4, 64, 64) of an autoencoder that this project does not have: they sample,
    and what they sample has to be decoded elsewhere. The head that predicts the loss's uncertainty is left out.

    Args:
        file: the pickle.
        sigma_max: where sampling begins.
        weights: which network of the pickle, where it holds a dict of them.

    Raises:
        ValueError: a pickle of another kind, or a network that no published checkpoint has.
    """
    net = network_record(file, weights)
    model = net.state["_modules"].get("unet")
    if net.name != "Precond" or model is None or model.name != "UNet":
        raise ValueError(f"{file}: EDM2 networks are Precond of UNet, this one is {net.name}")
    own, outer = settings_of(model), settings_of(net)
    for key, value in FIXED.items():
        if own.get(key, value) != value:
            raise ValueError(f"{file}: {key}={own[key]}, where every published EDM2 network has {value}")
    size, mult, blocks = own["img_resolution"], own.get("channel_mult", [1, 2, 3, 4]), own.get("num_blocks", 3)
    network = {
        "_target_": f"{NETWORK}.EDM2UNet",
        "in_channels": own["img_channels"],
        "model_channels": own.get("model_channels", 192),
        "channel_mult": list(mult),
        "num_res_blocks": blocks,
        "attention_resolutions": list(own.get("attn_resolutions", [16, 8])),
        "image_size": size,
        "dropout": own.get("dropout", 0),
        "num_classes": own.get("label_dim", 0),
    }
    names = _names(size, len(mult), blocks)
    state = {}
    for key, value in model.tensors().items():
        if key in TOP:
            state[TOP[key]] = value
            continue
        block, _, rest = key.removeprefix("enc.").removeprefix("dec.").partition(".")
        place = names.get(f"{key[:3]}.{block}")
        if place is None:
            raise ValueError(f"{file}: weight {key} has no place in our network")
        part, _, kind = rest.partition(".")
        if part == "emb_gain":
            state[f"{place}.gain"] = value
        else:
            state[f"{place}.{BLOCK[part]}.{kind}" if kind else f"{place}.weight"] = _layout(part, value)
    return Converted(
        nodes={
            "network": network,
            "path": {"_target_": f"{PATH}.EDM", "sigma_max": sigma_max},
            "denoiser": {"_target_": f"{DENOISER}.EDMDenoiser", "sigma_data": outer["sigma_data"]},
        },
        state=state,
        shape=(own["img_channels"], size, size),
        num_classes=own.get("label_dim", 0),
        card={"format": "edm2", "architecture": "EDM2 U-Net", "preconditioning": "EDM", "label_dropout": 0},
    )


def _names(size: int, levels: int, blocks: int) -> dict[str, str]:
    """Their blocks by level -> our blocks in order."""
    down, up = level_names(size, levels, blocks)
    last = size >> levels - 1
    up = [f"dec.{last}x{last}_in{i}" for i in range(2)] + up
    places = {name: f"{way}.{i}" for way, names in (("down", down), ("up", up)) for i, name in enumerate(names)}
    return places | {f"enc.{size}x{size}_conv": "stem"}


def _layout(part: str, value: Tensor) -> Tensor:
    """q, k, v one after the other, where EDM2 has them side by side within each head."""
    return value.unflatten(0, (-1, HEAD_CHANNELS, 3)).movedim(2, 0).flatten(0, 2) if part == "attn_qkv" else value
