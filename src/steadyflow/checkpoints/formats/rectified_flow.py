"""Training states of rectified flow (Liu et al. 2023): score_sde's networks as velocities of a straight flow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steadyflow.checkpoints.formats import Converted
from steadyflow.checkpoints.formats.edm import DENOISER, NETWORK, PATH, negated
from steadyflow.checkpoints.formats.score_sde import network_node, network_state

START = 1e-3  # the original's time at which sampling begins and training too


def read(
    file: str | Path,
    centered: bool = True,
    channels: int = 3,
    model_channels: int = 128,
    channel_mult: Sequence[int] = (1, 1, 2, 2, 2, 2, 2),
    num_res_blocks: int = 2,
    attention_resolutions: Sequence[int] = (16,),
    image_size: int = 256,
    dropout: float = 0.0,
    fourier: bool = True,
    fir: bool = True,
    input_pyramid: str | None = "skip",
    output_pyramid: bool = True,
    divide_by_time: bool = True,
    weights: str = "ema",
) -> Converted:
    """A training state {model, ema, optimizer, step} of the original code, or a bare state dict.

    The original's time u runs from noise to data, u = 1 - t, and its network is v(x, u) = F(x, 999 u) (sinusoids), or
    F(x, log 999 u) / (999 u) (Fourier features; u at least 1e-3). The velocity in our time is -v: VelocityDenoiser on
    ConditionalOT, the sign in the last weights.

    Args:
        file: checkpoint_N.pth.
        centered: whether its images lie in [-1, 1] (AFHQ-cat, CelebA-HQ, CIFAR-10), or in [0, 1] (LSUN bedroom and
            church), which makes the noise twice as large in [-1, 1]; see UnitRange.
        channels ... output_pyramid: of the network; see NCSNpp. The defaults are those of 256 x 256 images; CIFAR-10
            has image_size=32, channel_mult=[1,2,2,2], num_res_blocks=4, fir=false, fourier=false, no pyramids,
            divide_by_time=false.
        divide_by_time: the original's scale_by_sigma.
        weights: ema, the moving average, or model.

    Raises:
        ValueError: a file of another kind, or weights that do not fit.
    """
    sizes = (channels, model_channels, channel_mult, num_res_blocks, attention_resolutions, image_size, dropout)
    network = network_node(*sizes, fourier, fir, input_pyramid, output_pyramid)
    state, step = network_state(file, network, weights)
    state = negated(state)
    network |= {"time_scale": -999.0, "time_shift": 999.0, "time_min": 999.0 * START}
    network |= {"log_time": fourier, "divide_by_time": divide_by_time}
    path: dict[str, Any] = {"_target_": f"{PATH}.ConditionalOT"}
    if not centered:  # 2 dy/dt
        state = {k: 2 * v if k.startswith("heads.") and ".conv." in k else v for k, v in state.items()}
        state = {f"network.{k}": v for k, v in state.items()}
        network, path = {"_target_": f"{NETWORK}.UnitRange", "network": network}, path | {"scale": 2.0}
    return Converted(
        nodes={"network": network, "path": path, "denoiser": {"_target_": f"{DENOISER}.VelocityDenoiser"}},
        state=state,
        shape=(channels, image_size, image_size),
        card={"format": "rectified_flow", "centered": centered, "weights": weights, "steps": step},
    )
