"""Tables of public checkpoints, one batch end to end: each architecture at a low resolution, with random weights.

One cell a format and job (of likelihoods one in all); STAND_INS=all in the environment: of every table, a cell of each
of its public checkpoints.
"""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from steadyflow import cli
from steadyflow.checkpoints import save
from steadyflow.checkpoints.nodes import build
from steadyflow.jobs.table import config_options, obstacle
from steadyflow.tables.cells import Cell, Table, read

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
    "cld_sgm": (
        NCSN | {"in_channels": 6, "out_channels": 3, "fourier": True, "fir": True, "input_pyramid": "residual"}
        | {"time_scale": 1.0, "time_min": 1e-5, "log_time": True},
        {"_target_": "steadyflow.diffusions.CLD"},
        {"_target_": "steadyflow.denoisers.VelocityNoise"},
    ),
    "get": (
        {"_target_": "steadyflow.networks.GET", "width": 64, "depth": 1, "equilibrium_depth": 1},
        {"_target_": "steadyflow.paths.ConditionalOT"},
        {"_target_": "steadyflow.denoisers.X0Denoiser"},
    ),
}  # fmt: skip
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def public() -> dict[str, dict[str, Any]]:
    """The configs of public checkpoints, by name."""
    files = [(file.stem, file.read_text()) for file in (CONFIGS / "checkpoint").glob("*.yaml")]
    return {name: yaml.load(text, LOADER) for name, text in files if "checkpoints.public" in text}


PUBLIC = public()


def cells() -> Iterator[tuple[Table, Cell]]:
    """The first cell of each table and public checkpoint whose methods are all there; or of each format and job."""
    options, seen = config_options([CONFIGS]), set()
    for file in sorted((CONFIGS / "table").glob("*.yaml")):
        text = file.read_text()
        if file.stem == "all" or not any(f"checkpoint={name}" in text for name in PUBLIC):
            continue
        table = read(file.stem, yaml.load(text, LOADER), "full")
        for cell in table.cells:
            name = cell.overrides.get("checkpoint", "")
            if name not in PUBLIC:
                continue
            found = obstacle(cell, options, Path("/nowhere"))
            format = cell.overrides.get("metrics", PUBLIC[name]["format"])
            key = (table.name, name) if os.environ.get("STAND_INS") == "all" else (format, cell.job)
            if (found is None or found.state == "missing") and key not in seen:
                seen.add(key)
                yield table, cell


CELLS = [pytest.param(*pair, id=f"{pair[0].name}-{pair[1].overrides['checkpoint']}") for pair in cells()]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def stand_in(name: str, folder: Path) -> None:
    """A network of the checkpoint's format with random weights, where the checkpoint would lie."""
    about = PUBLIC[name]
    network, path, denoiser = NODES[about["format"]]
    classes = about["card"]["classes"]
    nodes = {"network": network | {"num_classes": classes}, "path": path, "denoiser": denoiser}
    torch.manual_seed(0)
    made = build(network | {"num_classes": classes}, "test")
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.05)
    model = build(denoiser, "test", network=made, path=build(path, "test"))
    save(folder / name, model, nodes, (3, 32, 32), classes, {})


@pytest.mark.parametrize(("table", "cell"), CELLS)
def test_a_cell_of_a_public_checkpoint_runs(table: Table, cell: Cell, images: Path, tmp_path: Path) -> None:
    stand_in(cell.overrides["checkpoint"], tmp_path / "checkpoints")
    words = {
        k: v for k, v in cell.overrides.items() if not k.startswith(("dataset.", "sampler.grid.", "likelihood.grid."))
    }
    words |= {key: "3" for key in ("sampler.steps", "sampler.nfe") if key in words}
    words |= {"dataset": "image_folder", "dataset.path": str(images), "dataset.cache_dir": f"{tmp_path}/cache"}
    words |= {"dataset.held_out": "2", "batch_size": "2"}
    words |= {"num_samples" if cell.job == "sample" else "num_images": "2"}
    words |= {"data_dir": f"{tmp_path}/data", "hydra.run.dir": f"{tmp_path}/run"}
    more: dict[str, dict[str, str]] = {"invert": {"naive_epochs": "2", "epochs": "2"}}
    of_evaluate = {"nll": {"likelihood.rtol": "1", "likelihood.atol": "1"}, "elbo": {"likelihood.steps": "3"}}
    more["evaluate"] = of_evaluate.get(cell.overrides.get("metrics", ""), {})
    words |= more.get(cell.job, {"callbacks": "none"})
    assert cli.main([cell.job, *(f"{k}={v}" for k, v in words.items())]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    if cell.job == "evaluate":
        assert math.isfinite(metrics["nll"])
    else:
        assert metrics["nfe"] > 0
        assert (tmp_path / "run" / "grid.png").exists()
