"""Outputs of public architectures against the original code: one row an architecture, random weights everywhere.

    python scripts/parity.py ORIGINALS [--only NAME ...] [--float64]

ORIGINALS is a folder with the original repositories, each under its own name (git clone): guided-diffusion,
improved-diffusion, consistency_models, pytorch_diffusion, ddim, flow_matching. A row builds the original network, fills
it with random weights, saves it as its authors do, reads that file with this project's format, and compares outputs:
max |ours - theirs| / max |theirs|, over the batch. Large networks are compared on images as small as they take. A row
whose repository is absent says so. For flash_attn, which consistency_models needs, torch's own attention stands in.

--float64 repeats the comparison in double precision. The originals compute the sinusoidal features of the time, and
some their norms, in single precision always: for this, they are given the features in double, and `.float()` is undone.
"""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from steadyflow.checkpoints.formats import Converted, adm, adm_classifier, consistency, ddpm, flow_matching
from steadyflow.checkpoints.nodes import build

Call = Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]


@dataclass
class Row:
    """One architecture.

    Attributes:
        format, name: of the row.
        folder: the original's, below ORIGINALS; on sys.path while the row is made.
        original: () -> the original network, from modules imported inside.
        read: file -> Converted.
        saved: the original network -> what its authors' file holds.
        call: (original network, x, t, label) -> output that ours should give; t as our network takes it.
        size: height of the images compared.
        times: of the network, the three of the batch.
        labels: whether a network with classes is asked for some; a classifier gives its logits.
        double_time: modules and functions of theirs that compute in single precision; replaced for --float64.
    """

    format: str
    name: str
    folder: str
    original: Callable[[], nn.Module]
    read: Callable[[Path], Converted]
    size: int
    saved: Callable[[nn.Module], Any] = nn.Module.state_dict
    call: Call = lambda net, x, t, label: net(x, t) if label is None else net(x, t, label)
    times: tuple[float, ...] = (0.0, 423.0, 999.0)
    labels: bool = True
    double_time: dict[str, Callable[..., Tensor]] = field(default_factory=dict)


def sinusoids(cosine_first: bool, endpoint: bool) -> Callable[[Tensor, int], Tensor]:
    """The originals' features of the time, in double precision."""

    def features(t: Tensor, dim: int) -> Tensor:
        half = dim // 2
        k = torch.arange(half, dtype=torch.float64) / (half - 1 if endpoint else half)
        angle = t.double()[:, None] * 10000.0**-k
        return torch.cat([angle.cos(), angle.sin()] if cosine_first else [angle.sin(), angle.cos()], 1)

    return features


# ---------------------------------------------------------------------------- guided-diffusion (ADM)

ADM_TIME = {"guided_diffusion.unet:timestep_embedding": sinusoids(True, False)}
IMAGENET = {"learn_sigma": True, "use_scale_shift_norm": True, "resblock_updown": True}
ADM = {  # the flags of the authors' README, and what our format is told
    "ImageNet 64": (
        {**IMAGENET, "image_size": 64, "num_channels": 192, "num_res_blocks": 3, "class_cond": True}
        | {"num_head_channels": 64, "use_new_attention_order": True},
        {"head_channels": 64, "new_attention_order": True, "schedule": "cosine"},
    ),
    "ImageNet 128": (
        {**IMAGENET, "image_size": 128, "num_channels": 256, "num_res_blocks": 2, "class_cond": True, "num_heads": 4},
        {"num_heads": 4},
    ),
    "ImageNet 256": (
        {**IMAGENET, "image_size": 256, "num_channels": 256, "num_res_blocks": 2, "class_cond": True}
        | {"num_head_channels": 64},
        {"head_channels": 64},
    ),
    "ImageNet 256 unconditional, LSUN": (
        {**IMAGENET, "image_size": 256, "num_channels": 256, "num_res_blocks": 2, "num_head_channels": 64},
        {"head_channels": 64},
    ),
    "ImageNet 512": (
        {**IMAGENET, "image_size": 512, "num_channels": 256, "num_res_blocks": 2, "class_cond": True}
        | {"num_head_channels": 64},
        {"head_channels": 64},
    ),
    "FFHQ 256 (fine-tune)": (
        {**IMAGENET, "image_size": 256, "num_channels": 128, "num_res_blocks": 1, "num_head_channels": 64}
        | {"attention_resolutions": "16"},
        {"head_channels": 64},
    ),
}


def adm_rows() -> Iterator[Row]:
    for name, (flags, known) in ADM.items():

        def original(flags: dict = flags) -> nn.Module:
            from guided_diffusion.script_util import create_model

            return create_model(**{"attention_resolutions": "32,16,8", **flags})

        def read(file: Path, known: dict = known, size: int = flags["image_size"]) -> Converted:
            return adm.read(file, size, **known)

        size = 64 if flags["image_size"] == 512 else 32
        yield Row("adm", name, "guided-diffusion", original, read, size, double_time=ADM_TIME)


def improved_rows() -> Iterator[Row]:
    flags = {"image_size": 32, "num_channels": 128, "num_res_blocks": 3, "learn_sigma": True, "class_cond": False}
    flags |= {"use_checkpoint": False, "attention_resolutions": "16,8", "num_heads": 4, "num_heads_upsample": -1}

    def original() -> nn.Module:
        from improved_diffusion.script_util import create_model

        return create_model(**flags, use_scale_shift_norm=True, dropout=0.3)

    def read(file: Path) -> Converted:
        return adm.read(file, 32, num_heads=4, schedule="cosine", steps=4000, rescale_timesteps=True)

    time = {"improved_diffusion.unet:timestep_embedding": sinusoids(True, False)}
    yield Row("adm", "Improved DDPM CIFAR-10", "improved-diffusion", original, read, 32, double_time=time)


def classifier_rows() -> Iterator[Row]:
    for size, depth in ((64, 4), (256, 2)):

        def original(size: int = size, depth: int = depth) -> nn.Module:
            from guided_diffusion.script_util import classifier_defaults, create_classifier

            return create_classifier(**classifier_defaults() | {"image_size": size, "classifier_depth": depth})

        def read(file: Path, size: int = size) -> Converted:
            return adm_classifier.read(file, size)

        name = f"ImageNet {size} classifier"
        folder = "guided-diffusion"
        yield Row("adm_classifier", name, folder, original, read, size, labels=False, double_time=ADM_TIME)


class FlashAttention(nn.Module):
    """qkv (B, L, 3, heads, C) -> (B, L, heads, C), as flash_attn's."""

    def __init__(self, **_: Any):
        super().__init__()

    def forward(self, qkv: Tensor, **_: Any) -> tuple[Tensor, None]:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2), None


def consistency_rows() -> Iterator[Row]:
    known: dict[str, tuple[int, dict]] = {
        "ImageNet 64 (CD, CT, EDM)": (64, {"model_channels": 192, "num_res_blocks": 3, "channel_mult": (1, 2, 3, 4)}),
        "LSUN 256 (CD, CT, EDM)": (256, {"num_res_blocks": 2, "channel_mult": (1, 1, 2, 2, 4, 4)}),
    }
    for name, (size, flags) in known.items():

        def original(size: int = size, flags: dict = flags) -> nn.Module:
            stand_in = ModuleType("flash_attn.flash_attention")
            stand_in.FlashAttention = FlashAttention  # type: ignore[attr-defined]
            sys.modules |= {"flash_attn": ModuleType("flash_attn"), stand_in.__name__: stand_in}
            from cm.unet import UNetModel

            options = {"model_channels": 256, "num_classes": 1000 if size == 64 else None} | flags
            options |= {"use_scale_shift_norm": size == 64, "resblock_updown": True, "num_head_channels": 64}
            attends = tuple(size // height for height in (32, 16, 8))
            return UNetModel(size, 3, out_channels=3, attention_resolutions=attends, **options)

        def rescaled(network: nn.Module, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
            return network(x, 1000 * t) if label is None else network(x, 1000 * t, label)

        def read(file: Path, size: int = size) -> Converted:
            return consistency.read(file, size)

        time = {"cm.unet:timestep_embedding": sinusoids(True, False)}
        noises = (-1.55, 0.0, 1.09)  # log(rho) / 4 of 0.002, 1 and 80
        yield Row(
            "consistency", name, "consistency_models", original, read, 64, call=rescaled, times=noises, double_time=time
        )


# ---------------------------------------------------------------------------- pytorch_diffusion and DDIM (DDPM)

DDPM_TIME = sinusoids(False, True)
CIFAR10 = {"resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": (1, 2, 2, 2)}
CIFAR10 |= {"num_res_blocks": 2, "attn_resolutions": (16,), "dropout": 0.1}
LSUN = {**CIFAR10, "resolution": 256, "ch_mult": (1, 1, 2, 2, 4, 4), "dropout": 0.0}


def ddpm_rows() -> Iterator[Row]:
    for name, options, size in (("CIFAR-10", CIFAR10, 32), ("LSUN, CelebA-HQ 256", LSUN, 32)):

        def original(options: dict = options, size: int = size) -> nn.Module:
            from pytorch_diffusion.model import Model

            network = Model(**options)
            network.resolution = size  # which the forward pass asserts, and nothing else uses
            return network

        def read(file: Path, size: int = options["resolution"]) -> Converted:
            return ddpm.read(file, size)

        time = {"pytorch_diffusion.model:get_timestep_embedding": DDPM_TIME}
        yield Row("ddpm", name, "pytorch_diffusion", original, read, size, double_time=time)

    def celeba() -> nn.Module:
        from models.diffusion import Model
        from yaml import safe_load

        config = safe_load((Path(sys.path[0]) / "configs" / "celeba.yml").read_text())
        return Model(namespace(config))

    def training_state(network: nn.Module) -> list:
        stale = {f"module.{k}": torch.zeros_like(v) for k, v in network.state_dict().items()}
        return [stale, {}, 0, 0, network.state_dict()]  # model, optimizer, epoch, step, averages

    yield Row(
        "ddpm",
        "CelebA 64 (DDIM)",
        "ddim",
        celeba,
        lambda file: ddpm.read(file, 64),
        64,
        saved=training_state,
        double_time={"models.diffusion:get_timestep_embedding": DDPM_TIME},
    )


def namespace(config: Any) -> Any:
    return argparse.Namespace(**{k: namespace(v) for k, v in config.items()}) if isinstance(config, dict) else config


# ---------------------------------------------------------------------------- flow_matching


def flow_matching_rows() -> Iterator[Row]:
    known = {
        "imagenet": ("ImageNet 32, 64", 64, {"head_channels": 64}),
        "cifar10": ("CIFAR-10 (EMA)", 32, {"num_heads": 1}),
    }
    for key, (name, size, heads) in known.items():

        def original(key: str = key) -> nn.Module:
            from models.model_configs import instantiate_model

            return instantiate_model(key, is_discrete=False, use_ema=key == "cifar10")

        def saved(network: nn.Module) -> dict:
            return {"model": network.state_dict(), "epoch": 0}

        def velocity(network: nn.Module, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
            network.eval()  # puts the averages into the model
            network = getattr(network, "model", network)
            return -network(x, t, extra={} if label is None else {"label": label})

        def read(file: Path, size: int = size, heads: dict = heads) -> Converted:
            return flow_matching.read(file, size, **heads)

        time = {"models.unet:timestep_embedding": sinusoids(True, False)}
        folder = "flow_matching/examples/image"
        times = (0.0, 0.3, 1.0)
        yield Row("flow_matching", name, folder, original, read, size, saved, velocity, times, double_time=time)


# ---------------------------------------------------------------------------- the table

ROWS: list[Callable[[], Iterator[Row]]] = [
    *(adm_rows, improved_rows, classifier_rows, consistency_rows),
    *(ddpm_rows, flow_matching_rows),
]


def compare(row: Row, double: bool) -> tuple[int, list[float]]:
    """Parameters of ours, and the relative difference in each precision asked for."""
    theirs = randomised(row.original())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "original.pt"
        torch.save(row.saved(theirs), file)
        converted = row.read(file)
        with torch.device("meta"):
            ours = build(converted.nodes["network"], row.name)
        ours.load_state_dict({k: v.clone() for k, v in converted.state.items()}, assign=True)
    size = sum(p.numel() for p in ours.parameters())
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, converted.shape[0], row.size, row.size, generator=generator)
    t = torch.tensor(row.times)
    label = torch.arange(3) * (converted.num_classes // 3) if row.labels and converted.num_classes else None
    differences = []
    for dtype in (torch.float32, torch.float64) if double else (torch.float32,):
        ours.to(dtype).eval()
        theirs.to(dtype).eval()
        cast = torch.Tensor.float if dtype == torch.float32 else torch.Tensor.double
        if dtype == torch.float64:
            for place, function in row.double_time.items():
                module, _, name = place.partition(":")
                setattr(sys.modules[module], name, function)
            theirs.dtype = torch.float64  # which guided-diffusion casts the image to
        with torch.no_grad():
            got = ours(x.to(dtype), t.to(dtype), label)
            with patch.object(torch.Tensor, "float", cast):
                want = row.call(theirs, x.to(dtype), t.to(dtype), label)
        differences.append(float((got - want).abs().max() / want.abs().max()))
    return size, differences


def randomised(network: nn.Module) -> nn.Module:
    """Random weights everywhere, those that begin at zero included, at a scale that keeps activations near 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            fan = p[0].numel() if p.ndim > 1 else p.numel()
            p.normal_().mul_(fan**-0.5).add_(1.0 if p.ndim == 1 and p.std() == 0 else 0.0)
    return network


def imported(row: Row, originals: Path) -> dict[str, ModuleType]:
    """The modules loaded before; names such as `models` belong to several repositories."""
    sys.path.insert(0, str(originals / row.folder))
    importlib.invalidate_caches()
    return dict(sys.modules)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("originals", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="rows whose format or name contains one of these")
    parser.add_argument("--float64", action="store_true")
    arguments = parser.parse_args()
    columns = "float32" + (" | float64" if arguments.float64 else "")
    print(f"| format | architecture | parameters | {columns} |\n|{'---|' * (4 + arguments.float64)}", flush=True)
    for row in (row for rows in ROWS for row in rows()):
        if arguments.only and not any(part in f"{row.format} {row.name}" for part in arguments.only):
            continue
        if not (arguments.originals / row.folder).is_dir():
            print(f"| {row.format} | {row.name} | no {arguments.originals / row.folder} | |", flush=True)
            continue
        before = imported(row, arguments.originals)
        size, differences = compare(row, arguments.float64)
        sys.path.pop(0)
        for name in sys.modules.keys() - before.keys():
            if not name.startswith(("torch", "steadyflow", "numpy")):
                del sys.modules[name]
        print(f"| {row.format} | {row.name} | {size:,} | {' | '.join(f'{d:.1e}' for d in differences)} |", flush=True)


if __name__ == "__main__":
    main()
