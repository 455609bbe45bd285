"""diffusers' own UNet2DModel, for checkpoints of it that our U-Net cannot be."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn


class DiffusersUNet(nn.Module):
    """diffusers.UNet2DModel called as networks are here: network(x (B, C, H, W), t (B,), label (B,) or None).

    Args:
        config: its config.json. t is what its time embedding takes: the index of the scheduler.

    Raises:
        ValueError: diffusers is not installed, or does not know the config.
    """

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        try:
            from diffusers import UNet2DModel
        except ImportError as error:
            raise ValueError(
                "this network runs by diffusers, which is not installed: pip install 'steadyflow[diffusers]'"
            ) from error
        self.network = UNet2DModel.from_config(dict(config))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return cast(Tensor, self.network(x, t, class_labels=label).sample)
