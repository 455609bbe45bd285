"""EDM, EDM2, score_sde, rectified flow, CLD-SGM and GET: files as their authors write them give the outputs that the
original code gave, which scripts/parity_scores.py recorded in originals.json with the same weights."""

import argparse
import json
import math
import os
import pickle
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steadyflow.checkpoints.checkpoint import load
from steadyflow.checkpoints.files import save_converted
from steadyflow.checkpoints.formats import convert
from steadyflow.checkpoints.nodes import build
from steadyflow.denoisers import VelocityNoise
from steadyflow.grids import Karras
from steadyflow.networks.get import sinusoids
from steadyflow.noise import NoiseSource
from steadyflow.samplers import Heun

ORIGINALS = json.loads((Path(__file__).parent / "originals.json").read_text())


def weight(key: str, shape: list[int]) -> Tensor:
    """As in scripts/parity_scores.py."""
    draw = np.random.RandomState(zlib.crc32(key.encode()) % 2**32).standard_normal(shape)
    if len(shape) > 1:
        return torch.from_numpy(draw / math.sqrt(math.prod(shape[1:])))
    one = not shape or ("norm" in key.lower() and key.endswith("weight"))
    return torch.as_tensor(0.2 * draw + float(one))


def weights(name: str) -> dict[str, Tensor]:
    known = ORIGINALS[name]
    state = {k: weight(k, shape) for k, shape in known["weights"].items() if k not in ("sigmas", "pos_embed", "u")}
    if known["format"] == "rectified_flow":
        state = {k: 999 * v if v.shape[0] == 3 else v for k, v in state.items()}
    if known["format"] == "get":
        _, tokens, width = known["weights"]["pos_embed"]
        state["pos_embed"] = sinusoids(math.isqrt(tokens), width)[None]
    return state


class Persistent:
    """Pickles as EDM's persistent classes do: source code, class name and state."""

    def __init__(self, name: str, state: dict[str, Any], source: str):
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": name, "state": state}

    def __reduce__(self) -> tuple:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def network_pickle(file: Path, known: dict[str, Any], state: dict[str, Tensor], source: str = "", **more: Any) -> None:
    """What EDM's training writes: {"ema": preconditioning(network)}, each module in its persistent dress."""
    outer, inner = ("Precond", "unet") if known["format"] == "edm2" else (known["preconditioning"], "model")
    given = {"img_channels": 3, "label_dim": 0} | known["network"]
    settings = {k: v for k, v in given.items() if k not in ("model_type", "img_channels")}
    channels = {"img_channels": 3} if inner == "unet" else {"in_channels": 3, "out_channels": 3}
    if outer == "iDDPMPrecond":
        channels["out_channels"] = 6
    root: dict[str, Any] = {"_modules": {}}
    for key, value in state.items():
        if not key.startswith(f"{inner}."):
            continue
        at = root
        *parts, leaf = key.split(".")
        for part in parts:
            at = at["_modules"].setdefault(part, {"_modules": {}, "_parameters": {}, "_buffers": {}})
        at["_buffers" if leaf in ("freqs", "phases") else "_parameters"][leaf] = value

    def dressed(name: str, node: dict[str, Any], arguments: dict[str, Any]) -> Persistent:
        children = {k: dressed("Linear", v, {}) for k, v in node["_modules"].items()}
        return Persistent(name, node | {"_modules": children, "_init_args": (), "_init_kwargs": arguments}, source)

    model = dressed(known["network"].get("model_type", "UNet"), root["_modules"][inner], settings | channels)
    defaults = {"sigma_data": 0.5, "beta_d": 19.9, "beta_min": 0.1, "M": 1000, "C_2": 0.008}
    if outer == "VEPrecond":
        defaults |= {"sigma_min": 0.02, "sigma_max": 100}
    net = Persistent(outer, {"_modules": {inner: model}, "_init_kwargs": given} | defaults | more, source)
    file.write_bytes(pickle.dumps({"ema": net, "loss_fn": None, "dataset_kwargs": {"path": "x"}}))


def save(name: str, file: Path) -> None:
    known, state = ORIGINALS[name], weights(name)
    if known["format"] in ("edm", "edm2"):
        network_pickle(file, known, state)
    elif known["format"] == "get":
        torch.save({"args": argparse.Namespace(lr=1e-4), "model": {}, "ema": state, "opt": {}}, file)
    else:  # stale weights in the model, the averages in a list, without the Fourier frequencies
        fixed = "all_modules.0.W"
        stale = {f"module.{k}": v if k == fixed else 0 * v for k, v in state.items()}
        average = [v for k, v in state.items() if k != fixed]
        ema = {"decay": 0.999, "num_updates": 1, "shadow_params": average}
        torch.save({"optimizer": {}, "model": stale, "ema": ema, "step": 1}, file)


@pytest.mark.usefixtures("persistence")
@pytest.mark.parametrize("name", [name for name in ORIGINALS if name != "edm_cifar10"])
def test_outputs_are_the_originals(name: str, tmp_path: Path) -> None:
    known, file = ORIGINALS[name], tmp_path / "file"
    save(name, file)
    made = convert(file, known["format"], known["arguments"])
    network = build(made.nodes["network"], "network").double().eval()
    network.load_state_dict(made.state)
    path = build(made.nodes["path"], "path")
    model = build(made.nodes["denoiser"], "denoiser", network=network, path=path)
    shape = (2 * made.shape[0], *made.shape[1:]) if isinstance(model, VelocityNoise) else made.shape
    x = torch.from_numpy(np.random.RandomState(0).standard_normal((2, *shape)))
    condition = {"label": torch.tensor([1, made.num_classes - 1])} if made.num_classes else {}
    times = (1.0,) if known["format"] == "get" else (0.01, 0.1, 0.5)
    for t, expected in zip(times, known["outputs"], strict=True):
        at = torch.tensor(t, dtype=torch.float64)
        with torch.inference_mode():
            if isinstance(model, VelocityNoise):
                out = -path.apply(torch.linalg.inv(path.root(at)).mT, model(x, at)).chunk(2, 1)[1]
            else:
                out = model(x, *path(at), **condition)
        np.testing.assert_allclose(out.flatten()[:: out.numel() // 7].numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("persistence")
def test_edms_cifar10_network_is_read_without_running_its_code_and_samples(tmp_path: Path) -> None:
    """55.7 million parameters; the embedded source would leave a mark, as reading the file by pickle shows."""
    known, mark, file = ORIGINALS["edm_cifar10"], tmp_path / "executed", tmp_path / "edm.pkl"
    torch.manual_seed(0)
    state = {k: 0.02 * torch.randn(shape) for k, shape in known["weights"].items()}
    network_pickle(file, known, state, f"import pathlib; pathlib.Path({str(mark)!r}).touch()")
    made = convert(file, "edm", {})
    network = build(made.nodes["network"], "network").eval()
    network.load_state_dict(made.state)
    assert sum(p.numel() for p in network.parameters()) == 55_732_739
    path = build(made.nodes["path"], "path")
    model = build(made.nodes["denoiser"], "denoiser", network=network, path=path)
    with torch.inference_mode():
        images = Heun(path, Karras(), steps=2)(model, NoiseSource(seed=0, index=range(2), shape=made.shape))
    assert images.shape == (2, 3, 32, 32)
    assert images.isfinite().all()
    assert images.std() > 0.01
    assert not mark.exists()
    pickle.loads(file.read_bytes())
    assert mark.exists()


class Hostile:
    def __reduce__(self) -> tuple:
        return os.system, ("true",)


@pytest.mark.usefixtures("persistence")
def test_a_tampered_pickle_is_refused_by_the_name_of_what_it_asks_for(tmp_path: Path) -> None:
    known = ORIGINALS["edm_vp"]
    network_pickle(tmp_path / "file", known, weights("edm_vp"), extra=Hostile())
    with pytest.raises(ValueError, match=r"refused: the pickle asks for posix\.system, which could run code"):
        convert(tmp_path / "file", "edm", {})


@pytest.mark.usefixtures("persistence")
def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    known = ORIGINALS["edm_vp"]
    network_pickle(file, known | {"preconditioning": "OtherPrecond"}, weights("edm_vp"))
    with pytest.raises(ValueError, match=r"preconditionings are EDMPrecond.*this one is OtherPrecond"):
        convert(file, "edm", {})
    with pytest.raises(
        ValueError, match="EDM2 networks are Precond of UNet, this one is OtherPrecond; it looks like format=edm"
    ):
        convert(file, "edm2", {})
    endless = known | {"network": known["network"] | {"num_blocks": 10**9}}
    network_pickle(file, endless, weights("edm_vp"))
    with pytest.raises(ValueError, match=r"2 levels of 1000000000 blocks, in \d+ weights"):
        convert(file, "edm", {})
    network_pickle(file, known, weights("edm_vp"))
    with pytest.raises(ValueError, match="with a network 'net', found a dict of ema, loss_fn, dataset_kwargs"):
        convert(file, "edm", {"weights": "net"})
    save("score_sde_vp", file)
    right = ORIGINALS["score_sde_vp"]["arguments"]
    with pytest.raises(
        ValueError, match=r"no weight all_modules\.7\.NIN_0\.W, which attention in down\.1\.1\.attention needs"
    ):
        convert(file, "score_sde", right | {"num_res_blocks": 2})
    with pytest.raises(ValueError, match="sde must be vp, subvp or ve, got edm"):
        convert(file, "score_sde", right | {"sde": "edm"})
    torch.save({"model": {"all_modules.0.weight": torch.zeros(1)}, "ema": {"shadow_params": []}}, file)
    with pytest.raises(ValueError, match="moving average has 0 weights, the model 1"):
        convert(file, "score_sde", right)


def test_a_langevin_checkpoint_is_saved_and_loaded_as_ours(tmp_path: Path) -> None:
    save("cld_sgm", tmp_path / "file")
    made = convert(tmp_path / "file", "cld_sgm", ORIGINALS["cld_sgm"]["arguments"])
    save_converted(tmp_path / "ours", made)
    found = load(tmp_path / "ours")
    assert isinstance(found.model, VelocityNoise)
    u, t = torch.randn(2, 6, 16, 16), torch.tensor([0.1, 0.9], dtype=torch.float64)
    with torch.inference_mode():
        noise = found.model(u, t)
    assert noise.shape == u.shape
    assert noise.std() == pytest.approx(1, abs=0.9)
