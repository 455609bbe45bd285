"""The original networks of `parity_scores.py`, built from their repositories and saved as their authors do."""

import argparse
import importlib
import importlib.util
import pickle
import sys
from collections.abc import Callable
from importlib.machinery import FileFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

MODEL = {
    **{"name": "ncsnpp", "sigma_min": 0.01, "sigma_max": 50, "num_scales": 1000, "beta_min": 0.1, "beta_max": 20.0},
    **{"dropout": 0.1, "nf": 128, "ch_mult": (1, 2, 2, 2), "num_res_blocks": 4, "attn_resolutions": (16,)},
    **{"resamp_with_conv": True, "conditional": True, "fir": False, "fir_kernel": [1, 3, 3, 1], "skip_rescale": True},
    **{"resblock_type": "biggan", "progressive": "none", "progressive_input": "none", "progressive_combine": "sum"},
    **{"init_scale": 0.0, "embedding_type": "positional", "fourier_scale": 16, "scale_by_sigma": False},
    **{"nonlinearity": "swish", "normalization": "GroupNorm"},
}
CLD = {
    **{"sde": "cld", "n_channels": 128, "ch_mult": "1,2,2,2", "n_resblocks": 8, "attn_resolutions": "16"},
    **{"resamp_with_conv": True, "use_fir": True, "fir_kernel": "1,3,3,1", "skip_rescale": True, "init_scale": 0.0},
    **{"resblock_type": "biggan", "progressive": "none", "progressive_input": "residual", "progressive_combine": "sum"},
    **{"fourier_scale": 16, "embedding_type": "fourier", "image_size": 32, "image_channels": 3, "dropout": 0.1},
    **{"nonlinearity": "swish", "normalization": "GroupNorm", "mixed_score": True, "device": "cpu", "is_image": True},
    **{"m_inv": 4.0, "gamma": 0.04, "numerical_eps": 0.0, "cld_objective": "hsm"},
}


class Settings(dict):
    """A config read by attribute, and by key."""

    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


class InDouble(SourceFileLoader):
    """Imports a module with float64 where its source says float32."""

    def source_to_code(self, data: bytes, path: str, **_: Any) -> Any:  # type: ignore[override]
        return super().source_to_code(data.replace(b"float32", b"float64").replace(b".float()", b".double()"), path)

    def path_stats(self, path: str) -> Any:
        raise OSError("no cached bytecode")


def imported(folder: Path, name: str, double: bool) -> ModuleType:
    """A module of a repository, freshly imported."""
    roots = {file.stem for file in folder.iterdir()}
    for module in [m for m in sys.modules if m.split(".")[0] in roots]:
        del sys.modules[module]
    hook = FileFinder.path_hook((InDouble if double else SourceFileLoader, [".py"]))
    sys.path.insert(0, str(folder))
    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.clear()
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0), sys.path_hooks.remove(hook)
        sys.path_importer_cache.clear()


def edm_network(folder: Path, double: bool, row: dict[str, Any]) -> tuple[nn.Module, Callable]:
    name = "training.networks" + ("_edm2" if row["format"] == "edm2" else "")
    module = imported(folder, name, double)
    kind = row.get("preconditioning", "Precond")
    net = getattr(module, kind)(**{"img_channels": 3, "label_dim": 0} | row["network"]).eval()

    def denoise(x: Tensor, alpha: Tensor, sigma: Tensor, t: float, label: Tensor | None) -> Tensor:
        one_hot = None if label is None else nn.functional.one_hot(label, net.label_dim)
        return net(x / alpha.to(x.dtype), (sigma / alpha).expand(len(x)).to(x.dtype), one_hot)

    return net, denoise


def score_network(folder: Path, double: bool, row: dict[str, Any]) -> tuple[nn.Module, Callable]:
    import torch.utils.cpp_extension

    torch.utils.cpp_extension.load = lambda *_, **__: None  # the operators fall back to PyTorch on the CPU
    if row["format"] == "cld_sgm":
        return _cld_network(folder, double, row)
    networks = imported(folder, "models.ncsnpp", double)
    arguments = row["arguments"]
    size = row.get("size", 32)
    config = Settings(
        model=Settings(MODEL | row["network"]),
        data=Settings(image_size=size, num_channels=3, centered=row.get("centered", True)),
        training=Settings(continuous=arguments.get("continuous", True), sde=row.get("sde", "")),
    )
    net = networks.NCSNpp(config).eval()
    if row["format"] == "rectified_flow":

        def flow(x: Tensor, alpha: Tensor, sigma: Tensor, t: float, label: None) -> Tensor:
            y, u = (x if row.get("centered", True) else (x + alpha.to(x.dtype)) / 2), 1 - t
            y = y + t * net(y, torch.full((len(x),), u) * 999)
            return y if row.get("centered", True) else 2 * y - 1

        return net, flow
    sdes, utils = sys.modules["models.utils"].sde_lib, sys.modules["models.utils"]
    kind, continuous = arguments.get("sde", "vp"), arguments.get("continuous", True)
    sde = sdes.VESDE(0.01, 50) if kind == "ve" else (sdes.VPSDE if kind == "vp" else sdes.subVPSDE)(0.1, 20.0)
    score = utils.get_score_fn(sde, net, continuous=continuous)

    def denoise(x: Tensor, alpha: Tensor, sigma: Tensor, t: float, label: None) -> Tensor:
        alpha, sigma = alpha.to(x.dtype), sigma.to(x.dtype)
        at = torch.full((len(x),), t if continuous or kind == "ve" else (1000 * t - 1) / 999)
        if kind != "ve":
            return (x + sigma**2 * score(x, at)) / alpha
        y = (x + 1) / 2
        return 2 * (y + (sigma / 2) ** 2 * score(y, at)) - 1

    return net, denoise


def _cld_network(folder: Path, double: bool, row: dict[str, Any]) -> tuple[nn.Module, Callable]:
    config = Settings(CLD | row["network"])
    net = imported(folder, "models.ncsnpp", double).NCSNpp(config).eval()
    utils = sys.modules["models.utils"]
    sde = _beside(folder, "sde_lib", double).CLD(config, lambda t: 4 + 0 * t, lambda t: 4 * t)
    score = utils.get_score_fn(config, sde, net)
    return net, lambda u, alpha, sigma, t, label: score(u, torch.full((len(u),), t, dtype=torch.float64))


def _beside(folder: Path, name: str, double: bool) -> ModuleType:
    """One more module of a repository whose others stay imported."""
    loader = (InDouble if double else SourceFileLoader)(name, str(folder / f"{name}.py"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))  # type: ignore[arg-type]
    sys.path.insert(0, str(folder))
    loader.exec_module(module)
    sys.path.pop(0)
    return module


def get_network(folder: Path, double: bool, row: dict[str, Any]) -> tuple[nn.Module, Callable]:
    from torchdeq import add_deq_args

    class PatchEmbed(nn.Module):
        def __init__(self, size: int, patch: int, channels: int, width: int, bias: bool):
            super().__init__()
            self.patch_size, self.num_patches = (patch, patch), (size // patch) ** 2
            self.proj = nn.Conv2d(channels, width, patch, patch, bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x).flatten(2).transpose(1, 2)

    class Mlp(nn.Module):
        def __init__(self, in_features: int, hidden_features: int, act_layer: Callable, drop: float):
            super().__init__()
            self.act = act_layer()
            self.fc1, self.fc2 = nn.Linear(in_features, hidden_features), nn.Linear(hidden_features, in_features)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(x)))

    timm = ModuleType("timm.models.vision_transformer")
    timm.PatchEmbed, timm.Mlp, timm.Attention = PatchEmbed, Mlp, None  # type: ignore[attr-defined]
    sys.modules |= {"timm": ModuleType("timm"), "timm.models": ModuleType("timm.models"), timm.__name__: timm}
    parser = argparse.ArgumentParser()
    add_deq_args(parser)
    flags = parser.parse_args("--eval_f_max_iter 6 --f_max_iter 0 --grad 6 --sup_gap 1 --norm_type none".split())
    flags.mem = False
    module = imported(folder, "models.get", double)
    if "model" in row["network"]:
        net = module.GET_models[row["network"]["model"]](flags, cond=row["network"].get("cond", False))
    else:
        net = module.GET(flags, **row["network"])
    net = net.eval()
    with torch.no_grad():
        fixed = net.pos_embed.clone()  # positions are no weights

    def generate(x: Tensor, alpha: Tensor, sigma: Tensor, t: float, label: Tensor | None) -> Tensor:
        tokens, width = net.pos_embed.shape[1:]
        z = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(x.dtype)
        kept, torch.randn_like = torch.randn_like, lambda h: z.expand(h.shape).contiguous()
        try:
            return net(x, label)
        finally:
            torch.randn_like = kept

    net.fixed = {"pos_embed": fixed}
    return net, generate


def save(net: nn.Module, row: dict[str, Any], folder: Path, file: Path) -> None:
    """As the authors do."""
    if row["format"] in ("edm", "edm2"):
        with file.open("wb") as stream:
            pickle.dump({"ema": net, "loss_fn": None, "dataset_kwargs": {"path": "x"}}, stream)
        return
    state = {key: value.clone() for key, value in net.state_dict().items()}
    if row["format"] == "get":
        torch.save({"args": argparse.Namespace(lr=1e-4), "model": {}, "ema": state, "opt": {}}, file)
        return
    module = _beside(folder, "models/ema", False)
    average = module.ExponentialMovingAverage(nn.DataParallel(net).parameters(), decay=0.999).state_dict()
    stale = {f"module.{k}": v if k == "sigmas" or k.endswith("0.W") else 0 * v for k, v in state.items()}
    torch.save({"optimizer": {}, "model": stale, "ema": average, "step": 1}, file)
