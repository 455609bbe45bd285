"""Tables of public checkpoints, one batch end to end: each architecture at a low resolution, with random weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from steadyflow import cli, networks
from steadyflow.checkpoints import save
from steadyflow.checkpoints.nodes import build
from steadyflow.tables.cells import read

CONFIGS = Path(__file__).parents[1] / "configs"
UNET: dict[str, Any] = {
    "_target_": "steadyflow.networks.UNet",
    "image_size": 32,
    "model_channels": 32,
    "norm_groups": 32,
}
UNET |= {"channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [16], "time_scale": 1.0}
ADM = UNET | {"head_channels": 16, "learned_sigma": True, "scale_shift_norm": True, "resblock_updown": True}
DDPM = UNET | {"asymmetric_padding": True, "norm_eps": 1e-6}
NCSN: dict[str, Any] = {"_target_": "steadyflow.networks.NCSNpp", "image_size": 32, "model_channels": 32}
NCSN |= {"channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [16]}
DISCRETE = {"_target_": "steadyflow.paths.DiscreteVariancePreserving"}
EPS = {"_target_": "steadyflow.denoisers.EpsDenoiser"}
INDEX = EPS | {"clock": [1000.0, -1.0]}
VELOCITY = {"_target_": "steadyflow.denoisers.VelocityDenoiser"}
EDM = {"_target_": "steadyflow.denoisers.EDMDenoiser"}
NODES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # by format: network, path, denoiser
    "adm": (ADM | {"time_endpoint": False}, DISCRETE, INDEX),
    "ddpm": (DDPM, DISCRETE, INDEX),
    "score_sde": (NCSN, {"_target_": "steadyflow.paths.VariancePreserving"}, EPS),
    "edm": (NCSN | {"time_scale": 1.0}, {"_target_": "steadyflow.paths.EDM"}, EDM),
    "rectified_flow": (
        NCSN | {"fourier": True, "fir": True, "input_pyramid": "skip", "output_pyramid": True, "divide_by_time": True}
        | {"time_scale": -999.0, "time_shift": 999.0, "time_min": 0.999, "log_time": True},
        {"_target_": "steadyflow.paths.ConditionalOT"},
        VELOCITY,
    ),
}  # fmt: skip
CELLS = [  # table, checkpoint, and what makes the cell small
    ("deq_ddim_3_1", "ddpm_cifar10", "sampler.steps=3"),
    ("deis_6_2", "score_sde_cifar10_vp", "sampler.nfe=3"),
    ("get_4_3", "edm_cifar10_cond", "sampler.steps=3"),
    ("c_pigdm_1", "adm_imagenet256_uncond", "sampler.steps=3"),
    ("c_pigdm_2", "rectified_flow_afhq_cat256", "sampler.steps=3"),
    ("inversion_3_4", "ddim_celeba64", "sampler.steps=3 naive_epochs=2 epochs=2"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def stand_in(name: str, folder: Path) -> None:
    """A network of the checkpoint's format with random weights, where the checkpoint would lie."""
    about = yaml.safe_load((CONFIGS / "checkpoint" / f"{name}.yaml").read_text())
    network, path, denoiser = NODES[about["format"]]
    if not hasattr(networks, network["_target_"].rpartition(".")[2]):
        pytest.skip(f"no network {network['_target_']} in this version")
    classes = about["card"]["classes"]
    nodes = {"network": network | {"num_classes": classes}, "path": path, "denoiser": denoiser}
    torch.manual_seed(0)
    made = build(network | {"num_classes": classes}, "test")
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.05)
    model = build(denoiser, "test", network=made, path=build(path, "test"))
    save(folder / name, model, nodes, (3, 32, 32), classes, {})


@pytest.mark.parametrize(("table", "checkpoint", "small"), CELLS)
def test_a_table_s_first_cell_runs(table: str, checkpoint: str, small: str, images: Path, tmp_path: Path) -> None:
    whole = read(table, yaml.safe_load((CONFIGS / "table" / f"{table}.yaml").read_text()), "full")
    cell = next(cell for cell in whole.cells if cell.overrides.get("checkpoint") == checkpoint)
    stand_in(checkpoint, tmp_path / "checkpoints")
    words = {k: v for k, v in cell.overrides.items() if not k.startswith(("dataset.", "sampler.grid."))}
    count = "num_samples" if whole.job == "sample" else "num_images"
    words |= {"dataset": "image_folder", "dataset.path": str(images), "dataset.cache_dir": f"{tmp_path}/cache"}
    words |= {"dataset.held_out": "2"}
    words |= {count: "2", "batch_size": "2", "callbacks": "none"} | dict(w.split("=") for w in small.split())
    words |= {"data_dir": f"{tmp_path}/data", "hydra.run.dir": f"{tmp_path}/run"}
    if whole.job == "invert":
        words.pop("callbacks")
    assert cli.main([whole.job, *(f"{k}={v}" for k, v in words.items())]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["nfe"] > 0
    assert (tmp_path / "run" / "grid.png").exists()
