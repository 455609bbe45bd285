"""diffusers' own UNet2DModel, for checkpoints of it that our U-Net cannot be."""

import logging
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

log = logging.getLogger(__name__)


class DiffusersUNet(nn.Module):
    """diffusers.UNet2DModel called as networks are here: network(x (B, C, H, W), t (B,), label (B,) or None).

    Args:
        config: its config.json. t is what its time embedding takes: the index of the scheduler. A learned embedding has
            rows for whole indices alone: the nearest is taken, and that is logged once.

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
        self.null_label = config.get("num_class_embeds") is None  # whether it runs without a class
        self.has_table, self.told = config.get("time_embedding_type") == "learned", False

    @property
    def checkpoint_activations(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return cast(bool, self.network.is_gradient_checkpointing)

    @checkpoint_activations.setter
    def checkpoint_activations(self, on: bool) -> None:
        (self.network.enable_gradient_checkpointing if on else self.network.disable_gradient_checkpointing)()

    def _nearest(self, t: Tensor) -> Tensor:
        index = t.round().long()
        if not self.told and bool(((index - t).abs() > 1e-3).any()):  # nearer is rounding
            log.warning(
                "this network's time embedding is a table: times between its indices are rounded to the nearest"
            )
            self.told = True
        return index

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        t = self._nearest(t) if self.has_table else t
        return cast(Tensor, self.network(x, t, class_labels=label).sample)
