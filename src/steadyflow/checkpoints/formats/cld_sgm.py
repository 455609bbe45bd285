"""Training states of CLD-SGM (Dockhorn et al. 2022): NCSN++ on critically-damped Langevin diffusion."""

from collections.abc import Sequence
from pathlib import Path

from steadyflow.checkpoints.formats import Converted
from steadyflow.checkpoints.formats.edm import DENOISER
from steadyflow.checkpoints.formats.score_sde import network_node, network_state

START = 1e-5  # the original's smallest time of training


def read(
    file: str | Path,
    beta: float = 4.0,
    m_inv: float = 4.0,
    gamma: float = 0.04,
    channels: int = 3,
    model_channels: int = 128,
    channel_mult: Sequence[int] = (1, 2, 2, 2),
    num_res_blocks: int = 8,
    attention_resolutions: Sequence[int] = (16,),
    image_size: int = 32,
    dropout: float = 0.1,
    weights: str = "ema",
) -> Converted:
    """A training state {model, ema, optimizer, step} of the original code, or a bare state dict.

    The network takes position and velocity, (B, 2C, H, W), and log t, and returns the noise of the velocity without
    the part that the mixed score adds: VelocityNoise on CLD.

    Args:
        file: checkpoint_N.pth.
        beta, m_inv, gamma: as in the original's configs; beta constant, M = 1 / m_inv, gamma the initial variance of
            the velocity over M (hybrid score matching).
        channels ... dropout: of the network, NCSN++ with FIR resampling, Fourier features and a residual input
            pyramid; see NCSNpp. The defaults are those of CIFAR-10.
        weights: ema, the moving average, or model.

    Raises:
        ValueError: a file of another kind, or weights that do not fit.
    """
    sizes = (2 * channels, model_channels, channel_mult, num_res_blocks, attention_resolutions, image_size, dropout)
    network = network_node(*sizes, fourier=True, fir=True, input_pyramid="residual", output_pyramid=False)
    network |= {"out_channels": channels}
    state, step = network_state(file, network, weights)
    network |= {"time_scale": 1.0, "time_min": START, "log_time": True}
    path = {"_target_": "steadyflow.diffusions.CLD", "beta": beta, "mass": 1 / m_inv}
    path |= {"damping": 2 / m_inv**0.5, "initial": gamma}
    return Converted(
        nodes={"network": network, "path": path, "denoiser": {"_target_": f"{DENOISER}.VelocityNoise"}},
        state=state,
        shape=(channels, image_size, image_size),
        card={"format": "cld_sgm", "weights": weights, "steps": step},
    )
