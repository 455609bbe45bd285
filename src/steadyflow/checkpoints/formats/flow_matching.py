"""The U-Nets of the image examples of Meta's flow_matching: ADM's, on the conditional-OT path, predicting velocity.

Their time runs from noise to data, and their velocity with it: v = x_0 - eps, at time 1 - t.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steadyflow.checkpoints.formats import Converted
from steadyflow.checkpoints.formats.adm import plain_state, rename, structure
from steadyflow.checkpoints.pickles import read_state


def read(
    file: str | Path,
    image_size: int,
    ema: bool = True,
    num_heads: int = 1,
    head_channels: int | None = None,
    new_attention_order: bool = True,
) -> Converted:
    """A velocity of conditional OT, with classes and the null label where it has classes.

    Args:
        file: a training state {"model": ...} of the examples, or a state dict.
        image_size: it was trained at.
        ema: of a model trained with --use_ema, the averaged weights.
        num_heads, head_channels: of its attention, one of them.
        new_attention_order: as the original's flag.

    Raises:
        FileNotFoundError, ValueError: as `read_state`; another kind of network.
    """
    state = plain_state(_averaged(read_state(file), ema), file)
    network = structure(state, image_size, file, null_label=True)
    network |= {"num_heads": num_heads, "head_channels": head_channels}
    renamed = rename(state, network, new_attention_order)
    for kind in ("weight", "bias"):  # the velocity of the path as it runs here: eps - x_0
        renamed[f"head.{kind}"] = -renamed[f"head.{kind}"]
    return Converted(
        nodes={
            "network": network,
            "path": {"_target_": "steadyflow.paths.ConditionalOT"},
            "denoiser": {"_target_": "steadyflow.denoisers.VelocityDenoiser", "clock": [-1.0, 1.0]},
        },
        state=renamed,
        shape=(network["in_channels"], image_size, image_size),
        num_classes=network["num_classes"],
        card={"format": "flow_matching", "prediction": "velocity", "schedule": "conditional OT"},
    )


def _averaged(found: Any, ema: bool) -> Any:
    """The network's weights of a training state; their EMA keeps the averages by number, in the network's order."""
    if isinstance(found, Mapping) and isinstance(found.get("model"), Mapping):
        found = found["model"]
    if not isinstance(found, Mapping) or "shadow_params.0" not in found:
        return found
    state = {k.removeprefix("model."): v for k, v in found.items() if k.startswith("model.")}
    shadows = {int(k.rpartition(".")[2]): v for k, v in found.items() if re.fullmatch(r"shadow_params\.\d+", k)}
    if not ema:
        return state
    averages: dict[str, Tensor] = dict(zip(state, (shadows[i] for i in sorted(shadows)), strict=True))
    return averages
