"""The U-Nets of consistency_models (Song et al. 2023): ADM's, with EDM's noise levels and preconditioning."""

from pathlib import Path

from steadyflow.checkpoints.formats import Converted
from steadyflow.checkpoints.formats.adm import plain_state, rename, structure
from steadyflow.checkpoints.pickles import read_state


def read(
    file: str | Path,
    image_size: int,
    head_channels: int = 64,
    distilled: bool = True,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
) -> Converted:
    """A consistency model, by distillation or training, or the EDM model that was distilled.

    The network's time is 1000 log(rho) / 4. Its attention keeps queries, keys and values apart, as guided-diffusion's
    new order does.

    Args:
        file: the state dict, as cd_imagenet64_lpips.pt.
        image_size: it was trained at.
        head_channels: of its attention.
        distilled: a consistency model; else EDM's.
        sigma_min, sigma_max: the original's flags.

    A network with classes has no null label: it cannot be sampled without a class.

    Raises:
        FileNotFoundError, ValueError: as `read_state`; another kind of network.
    """
    state = plain_state(read_state(file), file)
    network = structure(state, image_size, file) | {"head_channels": head_channels, "time_scale": 1000.0}
    denoiser = {"_target_": "steadyflow.denoisers.EDMDenoiser", "sigma_data": 0.5}
    if distilled:
        denoiser |= {"_target_": "steadyflow.denoisers.ConsistencyDenoiser", "sigma_min": sigma_min}
    return Converted(
        nodes={
            "network": network,
            "path": {"_target_": "steadyflow.paths.EDM", "sigma_max": sigma_max},
            "denoiser": denoiser,
        },
        state=rename(state, network, new_attention_order=True),
        shape=(network["in_channels"], image_size, image_size),
        num_classes=network["num_classes"],
        card={"format": "consistency", "prediction": "consistency function" if distilled else "EDM preconditioning"},
    )
