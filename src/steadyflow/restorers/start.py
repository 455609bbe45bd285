"""Where a restorer starts."""

from torch import Tensor
from torch.nn import functional as F

from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath, combine
from steadyflow.restorers.restorer import Measurement

INITS = ("noise", "y", "pinv", "nearest")
PURE_NOISE = 20.0  # sigma / alpha from which a state counts as noise


def starting_state(init: str, path: GaussianPath, t: Tensor, measurement: Measurement, noise: NoiseSource) -> Tensor:
    """x = alpha(t) y' + sigma(t) z_0 (B, *S), an approximate sample of p(x_t | y).

        noise     y' = 0, right only where sigma / alpha is large
        y         y' = y, a measurement of the image's shape
        pinv      y' = A^+ y
        nearest   y' = y with its pixels repeated to the size of the image

    A path can begin no earlier than the smallest signal-to-noise ratio its denoiser was trained at: beyond it (t = 1
    of conditional OT for a VP checkpoint) the denoiser is evaluated at that ratio. Source: Pokle et al. 2024, Eq. 10
    and Section 3.3 (thesis Eq. 5.18 and Section 5.3.3).

    Raises:
        ValueError: another init; a measurement that has not the shape it needs; noise where much signal remains.
    """
    alpha, sigma = path(t)
    z = noise(0)
    if init == "noise":
        if sigma < PURE_NOISE * alpha:
            raise ValueError(
                f"init=noise at t = {float(t):g}, where sigma / alpha = {float(sigma / alpha):.3g}, leaves out what "
                "signal remains; use init=pinv, or start at t = 1"
            )
        return sigma.item() * z
    if init == "pinv":
        image = measurement.back
    elif init == "y":
        image = measurement.y
    elif init == "nearest":
        image = F.interpolate(measurement.y, size=z.shape[2:], mode="nearest")
    else:
        raise ValueError(f"init is one of {', '.join(INITS)}, got '{init}'")
    if image.shape != z.shape:
        raise ValueError(f"init={init} gives {tuple(image.shape)} for images {tuple(z.shape)}; use init=pinv")
    return combine(alpha, image, sigma, z)
