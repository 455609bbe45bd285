"""The configs of the group `checkpoint`, composed as a job composes them."""

from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from steadyflow.checkpoints import Checkpoint, save
from steadyflow.denoisers import GaussianMixture, VelocityDenoiser
from steadyflow.networks import MLP
from steadyflow.paths import ConditionalOT, VariancePreserving

CONFIGS = str(Path(__file__).parents[2] / "configs")


def chosen(*overrides: str) -> Checkpoint:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return instantiate(compose("sample", list(overrides)).checkpoint)


def test_analytic_is_exact_for_the_selected_dataset_on_the_selected_path() -> None:
    found = chosen("checkpoint=analytic", "dataset=gaussian_mixture", "dataset.count=10")
    assert isinstance(found.path, VariancePreserving)
    assert isinstance(found.denoiser, GaussianMixture)
    assert found.shape == (2,)
    found = chosen("checkpoint=analytic", "dataset=toy2d", "dataset.count=10", "path@checkpoint.path=ot")
    assert isinstance(found.path, ConditionalOT)
    assert "8gaussians" in found.name


def test_path_loads_what_was_saved(tmp_path: Path) -> None:
    nodes = {
        "network": {"_target_": "steadyflow.networks.MLP", "dim": 2, "width": 8},
        "path": {"_target_": "steadyflow.paths.ConditionalOT"},
        "denoiser": {"_target_": "steadyflow.denoisers.VelocityDenoiser"},
    }
    network = MLP(2, 8)
    save(tmp_path / "a=b", VelocityDenoiser(network, ConditionalOT()), nodes, (2,), 0, {})
    found = chosen("checkpoint=path", f"checkpoint.file='{tmp_path}/a=b'", "checkpoint.trusted=[mine]")
    assert torch.equal(found.denoiser.network.stem.weight, network.stem.weight)  # type: ignore[union-attr]


def test_the_embedded_ones_name_themselves() -> None:
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        for name in ("digits32", "digits32_ot"):
            assert compose("sample", [f"checkpoint={name}"]).checkpoint.name == name
