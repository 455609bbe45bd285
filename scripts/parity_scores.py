"""Outputs of NCSN++, DDPM++, EDM's ADM, EDM2 and GET against the original code: one row a published architecture.

    python scripts/parity_scores.py ORIGINALS [--only NAME ...] [--record FILE]

ORIGINALS is a folder with the original repositories, each under its own name (git clone): edm, edm2, score_sde_pytorch,
RectifiedFlow, CLD-SGM, get (which needs torchdeq). A row builds the original network with random weights, saves it as
its authors do (EDM: a pickle with their source inside), reads that file with this project's format, and compares
denoised images at three times of our path: max |ours - theirs| / max |theirs|, in float32 and in float64. For the
latter the original is imported with every float32 in its source replaced by float64. Custom CUDA operators are not
built, their fallbacks run; of timm, which GET imports, the two classes it uses are stood in for. CLD-SGM's
numerical_eps is 0, not the 1e-9 of its configs, which moves its score by 5e-5 at t = 1e-3, 1e-7 at 0.01 and 5e-9 from
0.1 on.

--record writes what the tests compare with: small architectures, their weights' shapes and outputs.
"""

import argparse
import json
import math
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from original_networks import edm_network, get_network, save, score_network
from torch import Tensor

from steadyflow.checkpoints.files import Model
from steadyflow.checkpoints.formats import convert
from steadyflow.checkpoints.nodes import build

TIMES = (0.01, 0.1, 0.5)  # a VE network of 1000 steps: times of its own indices, which the original rounds to


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A random weight that depends on its name alone, of a scale that keeps activations near 1."""
    draw = np.random.RandomState(zlib.crc32(key.encode()) % 2**32).standard_normal(shape)
    if len(shape) > 1:
        return draw / math.sqrt(math.prod(shape[1:]))
    return 0.2 * draw + (1.0 if ("norm" in key.lower() and key.endswith("weight")) or not shape else 0.0)


NCSN = {
    "embedding_type": "fourier",
    "channel_mult_noise": 2,
    "encoder_type": "residual",
    "resample_filter": [1, 3, 3, 1],
}
CIFAR = {"img_resolution": 32, "model_type": "SongUNet", "model_channels": 128, "augment_dim": 9}
CIFAR |= {"num_blocks": 4, "attn_resolutions": [16]}
SMALL = {"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8], "img_resolution": 16}
ADM = {"img_resolution": 64, "label_dim": 1000, "model_type": "DhariwalUNet", "model_channels": 192}


MAKERS = {"edm": edm_network, "edm2": edm_network, "get": get_network}
FOLDERS = {
    "edm": "edm",
    "edm2": "edm2",
    "score_sde": "score_sde_pytorch",
    "rectified_flow": "RectifiedFlow/ImageGeneration",
    "cld_sgm": "CLD-SGM",
    "get": "get",
}


def edm(name: str, preconditioning: str, **network: Any) -> dict[str, Any]:
    return {"format": "edm", "name": name, "preconditioning": preconditioning, "network": network, "arguments": {}}


def score(name: str, network: dict[str, Any], arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"format": "score_sde", "name": name, "network": network, "arguments": arguments} | more


PLUS = {"fir": True, "progressive_input": "residual"}
PYRAMID = {"fir": True, "progressive": "output_skip", "progressive_input": "input_skip", "embedding_type": "fourier"}
PYRAMID |= {"scale_by_sigma": True, "ch_mult": (1, 1, 2, 2, 2, 2, 2), "num_res_blocks": 2}
NCSNPP = {"fir": True, "input_pyramid": "residual"}
VE = {"embedding_type": "fourier", "scale_by_sigma": True}
FLOW = {"format": "rectified_flow", "network": PYRAMID, "size": 256, "sde": "rectified_flow"}
FLOW_CIFAR = {"image_size": 32, "channel_mult": (1, 2, 2, 2), "num_res_blocks": 4, "fourier": False, "fir": False}
FLOW_CIFAR |= {"input_pyramid": None, "output_pyramid": False, "divide_by_time": False}
WIDE = {"channel_mult": [2, 2, 2]}
PUBLISHED = [
    edm("DDPM++ CIFAR-10", "EDMPrecond", **CIFAR, **WIDE),
    edm("DDPM++ CIFAR-10 by class", "EDMPrecond", **CIFAR, **WIDE, label_dim=10),
    edm("NCSN++ CIFAR-10", "EDMPrecond", **CIFAR, **WIDE, **NCSN),
    edm("DDPM++ FFHQ, AFHQv2 64", "EDMPrecond", **CIFAR | {"channel_mult": [1, 2, 2, 2], "img_resolution": 64}),
    edm("NCSN++ FFHQ, AFHQv2 64", "EDMPrecond", **CIFAR | {"channel_mult": [1, 2, 2, 2], "img_resolution": 64}, **NCSN),
    edm("ADM ImageNet 64", "EDMPrecond", **ADM),
    edm("DDPM++ CIFAR-10, VP", "VPPrecond", **CIFAR),
    edm("NCSN++ CIFAR-10, VE", "VEPrecond", **CIFAR, **NCSN),
    edm("ADM ImageNet 64, iDDPM", "iDDPMPrecond", **ADM),
    {"format": "edm2", "name": "S ImageNet 64", "arguments": {}}
    | {"network": {"img_resolution": 64, "label_dim": 1000, "model_channels": 192}},
    {"format": "edm2", "name": "XS ImageNet 512 (latents)", "arguments": {}}
    | {"network": {"img_resolution": 64, "img_channels": 4, "label_dim": 1000, "model_channels": 128}},
    score("DDPM++ VP", {}, {"sde": "vp"}),
    score("DDPM++ deep VP", {"num_res_blocks": 8}, {"sde": "vp", "num_res_blocks": 8}),
    score("NCSN++ VP", PLUS, {"sde": "vp"} | NCSNPP),
    score("DDPM++ VP, 1000 steps", {}, {"sde": "vp", "continuous": False}),
    score("DDPM++ sub-VP", {}, {"sde": "subvp"}),
    score("NCSN++ VE", VE | PLUS, {"sde": "ve", "fourier": True} | NCSNPP, centered=False),
    score("NCSN++ VE, 1000 steps", PLUS | {"scale_by_sigma": True}, {"sde": "ve", "continuous": False} | NCSNPP)
    | {"centered": False, "times": (9 / 999, 99 / 999, 499 / 999)},
    FLOW | {"name": "NCSN++ AFHQ-cat, CelebA-HQ 256", "arguments": {}},
    FLOW | {"name": "NCSN++ LSUN 256", "arguments": {"centered": False}, "centered": False},
    FLOW | {"name": "DDPM++ CIFAR-10", "network": {}, "size": 32, "arguments": FLOW_CIFAR},
    {"format": "cld_sgm", "name": "NCSN++ CIFAR-10", "network": {}, "arguments": {}},
] + [
    {"format": "get", "name": name, "network": {"model": name, "cond": cond}, "arguments": {}}
    for name, cond in {"GET-T/2": False, "GET-M/2": False, "GET-S/2": False, "GET-B/2": True, "GET-B/2+": False}.items()
]

LITTLE = {"nf": 16, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,)}
OURS = {"model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [8]}
OURS |= {"image_size": 16}
SONG = {"model_type": "SongUNet", "augment_dim": 9} | SMALL | {"model_channels": 16}
LEVEL = SMALL | {"model_channels": 64, "channel_mult": [1, 1]}
ADM_SMALL = LEVEL | {"model_type": "DhariwalUNet"}
FLOW_LITTLE = FLOW | {"network": PYRAMID | LITTLE, "size": 16}
RECORDED = {
    "edm_ddpmpp": edm("", "EDMPrecond", **SONG, label_dim=4),
    "edm_cifar10": PUBLISHED[0],
    "edm_vp": edm("", "VPPrecond", **SONG),
    "edm_ve": edm("", "VEPrecond", **SONG, **NCSN),
    "edm_adm": edm("", "EDMPrecond", **ADM_SMALL, label_dim=4),
    "edm_iddpm": edm("", "iDDPMPrecond", **ADM_SMALL),
    "edm2": {"format": "edm2", "arguments": {}, "network": LEVEL | {"label_dim": 4}},
    "score_sde_vp": score("", LITTLE, OURS | {"sde": "vp"}, size=16),
    "score_sde_vp_steps": score("", LITTLE, OURS | {"sde": "vp", "continuous": False}, size=16),
    "score_sde_subvp": score("", LITTLE, OURS | {"sde": "subvp"}, size=16),
    "score_sde_ve": score(
        "", LITTLE | VE | PLUS, OURS | NCSNPP | {"sde": "ve", "fourier": True}, size=16, centered=False
    ),
    "rectified_flow": FLOW_LITTLE | {"arguments": OURS},
    "rectified_flow_uncentered": FLOW_LITTLE | {"arguments": OURS | {"centered": False}, "centered": False},
    "cld_sgm": {"format": "cld_sgm", "arguments": OURS, "size": 16}
    | {"network": {"n_channels": 16, "ch_mult": "1,2", "n_resblocks": 1, "attn_resolutions": "8", "image_size": 16}},
    "get": {"format": "get", "arguments": {}}
    | {"network": {"input_size": 8, "hidden_size": 64, "depth": 1, "deq_depth": 2, "num_heads": 1, "cond": True}},
}


def states(row: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Inputs of a row: two states, and two labels where it has classes."""
    shape = (2 * shape[0], *shape[1:]) if row["format"] == "cld_sgm" else shape
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((2, *shape))).to(dtype)
    classes = row["network"].get("label_dim", 10 if row["network"].get("cond") else 0)
    return x, torch.tensor([1, classes - 1]) if classes else None


def outputs(model: Model, x: Tensor, t: float, label: Tensor | None) -> Tensor:
    """Of ours: the denoised state; of CLD the score of the velocity."""
    condition = {} if label is None else {"label": label}
    at = torch.tensor(t, dtype=torch.float64)
    if hasattr(model.path, "root"):
        noise = model(x, at, **condition)
        return -model.path.apply(torch.linalg.inv(model.path.root(at)).mT, noise).chunk(2, 1)[1]
    return model(x, *model.path(at), **condition)


def compare(row: dict[str, Any], originals: Path, double: bool) -> tuple[Model, list[Tensor], list[Tensor], dict]:
    """Our model, the original's outputs and ours, and the original's weights by name."""
    dtype = torch.float64 if double else torch.float32
    torch.set_default_dtype(dtype)
    folder = originals / FOLDERS[row["format"]]
    net, original = MAKERS.get(row["format"], score_network)(folder, double, row)
    weights = net.state_dict()
    skipped = ("resample_filter", "sigmas", "pos_embed")
    with torch.no_grad():
        for key, value in weights.items():
            if not key.endswith(skipped) and key != "u":
                value.copy_(torch.from_numpy(np.asarray(weight(key, tuple(value.shape)))))
            if row["format"] == "rectified_flow" and value.shape[0] == 3:
                value.mul_(999)  # output convolutions, whose output is divided by up to 999
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "original"
        save(net, row, folder, file)
        converted = convert(file, row["format"], row["arguments"])
        network = build(converted.nodes["network"], "network").eval()
        network.load_state_dict(converted.state)
    path = build(converted.nodes["path"], "path")
    model = build(converted.nodes["denoiser"], "denoiser", network=network, path=path).eval()
    x, label = states(row, converted.shape, dtype)
    theirs, ours = [], []
    for t in (1.0,) if row["format"] == "get" else row.get("times", TIMES):
        at = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = path(at)
        with torch.no_grad():
            theirs.append(original(x, alpha, sigma, t, label))
            ours.append(outputs(model, x, t, label))
    return model, theirs, ours, {k: list(v.shape) for k, v in weights.items() if not k.endswith("resample_filter")}


def record(originals: Path, file: Path) -> None:
    """Weights' shapes and outputs of the small architectures, in float64."""
    found = {}
    for name, row in RECORDED.items():
        _, theirs, ours, shapes = compare(row, originals, double=True)
        worst = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(theirs, ours, strict=True))
        print(f"{name}: {worst:.1e}")
        keep = [out.flatten()[:: out.numel() // 7].tolist() for out in theirs]
        known = {k: row[k] for k in ("format", "arguments", "network", "preconditioning") if k in row}
        found[name] = known | {"weights": shapes, "outputs": keep}
    file.write_text(json.dumps(found, separators=(",", ":")).replace('"edm', '\n"edm') + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("originals", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="rows whose format or name contains one of these")
    parser.add_argument("--record", type=Path, help="write the tests' file in place of the table")
    arguments = parser.parse_args()
    sys.dont_write_bytecode = True
    if arguments.record is not None:
        record(arguments.originals.resolve(), arguments.record)
        return
    print("| format | architecture | parameters | float32 | float64 |\n|---|---|---|---|---|", flush=True)
    for row in PUBLISHED:
        title = f"{row['format']} | {row['name']}"
        if arguments.only and not any(part in title for part in arguments.only):
            continue
        if not (arguments.originals / FOLDERS[row["format"]]).is_dir():
            print(f"| {title} | no {arguments.originals / FOLDERS[row['format']]} | | |", flush=True)
            continue
        differences = []
        for double in (False, True):
            model, theirs, ours, _ = compare(row, arguments.originals.resolve(), double)
            pairs = zip(theirs, ours, strict=True)
            differences.append(max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs))
        size = sum(p.numel() for p in model.network.parameters())
        print(f"| {title} | {size:,} | {' | '.join(f'{d:.1e}' for d in differences)} |", flush=True)


if __name__ == "__main__":
    main()
