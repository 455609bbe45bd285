"""The configs of the group `network`: each is the network that its first line says."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from steadyflow.networks.blocks import SelfAttention

CONFIGS = Path(__file__).parents[2] / "configs" / "network"
SIZES = {"unet_cifar10": 35_746_307, "unet_small": 9_593_539, "unet_digits": 1_194_372, "mlp": 264_834}
SIZES |= {"ddpmpp_cifar10": 61_804_419, "ncsnpp_cifar10": 62_693_251}


def test_each_config_is_listed_here() -> None:
    assert {p.stem for p in CONFIGS.glob("*.yaml")} >= set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_it_has_the_size_it_says(name: str) -> None:
    with torch.device("meta"):
        network = instantiate(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    size = sum(p.numel() for p in network.parameters())
    assert size == SIZES[name]
    said = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
    assert name == "mlp" or f"{size / 1e6:.1f}M parameters" in said


def test_two_digits_networks_fit_in_eight_megabytes_of_half_precision() -> None:
    assert 2 * 2 * SIZES["unet_digits"] <= 8e6


def test_the_digits_network_attends_at_eight_pixels_and_in_the_middle() -> None:
    network = instantiate(OmegaConf.load(CONFIGS / "unet_digits.yaml")).eval()
    seen: list[int] = []
    for module in network.modules():
        if isinstance(module, SelfAttention):
            module.register_forward_hook(lambda _m, a, _o: seen.append(a[0].shape[-1]))
    with torch.inference_mode():
        network(torch.zeros(1, 1, 32, 32), torch.zeros(1))
    assert seen == [8, 4, 8, 8]
