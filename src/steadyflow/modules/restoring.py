"""Restoration as sampling: the measurement of every image of a run, and a restorer of them in a sampler's place."""

import torch
from torch import Tensor
from torch.nn import functional as F

from steadyflow.data import ImageFiles, from_uint8, to_uint8
from steadyflow.denoisers import Denoiser
from steadyflow.linear import Inpainting, Operator
from steadyflow.modules.sampling import MEASUREMENT
from steadyflow.noise import NoiseSource
from steadyflow.restorers import Measurement, Restorer
from steadyflow.samplers.sampler import Progress, Sampler

LUMA = (0.299, 0.587, 0.114)


class Measurements:
    """What is known of image i, a function of (seed, i) alone:

        y_i = A x_i + sigma_y n_i,   n_i = Philox(key = (seed, i), counter's top word = MEASUREMENT)

    and with K = `samples` restorations of each image, of the numbers K i to K i + K - 1. Or, for pictures that are
    degraded already, the picture itself, of which the middle is taken where it is larger than A's measurements; colours
    become grey by their luma and grey three equal colours where A's are so. Pixels that a mask hides are 0.

    Args:
        images: x_i, or with `degraded` y_i; each `samples` times (`ImageFiles.repeated`).
        operator: A. One that is not linear has fewer methods, and serves the restorers that ask no more of it.
        sigma_y: standard deviation of the noise, in units of the [-1, 1] image.
        seed: of the run.
        degraded, samples: see above.

    Raises:
        ValueError: sigma_y < 0, or no number; degraded pictures that are too small, or an A whose measurements are no
            pictures.
    """

    def __init__(
        self,
        images: ImageFiles,
        operator: Operator,
        sigma_y: float,
        seed: int,
        degraded: bool = False,
        samples: int = 1,
    ):
        if not isinstance(sigma_y, int | float):
            raise ValueError(f"need a number sigma_y (task.sigma_y=0.05), got {sigma_y!r}")
        self.images, self.operator, self.sigma_y, self.seed = images, operator, float(sigma_y), int(seed)
        self.degraded, self.samples = degraded, int(samples)
        if degraded:
            (_, h, w), (_, height, width) = operator.measured_shape, images.shape
            if not self.pictures:
                raise ValueError(
                    f"{type(operator).__name__} measures {operator.measured_shape}, no picture; input takes pictures"
                )
            if height < h or width < w:
                raise ValueError(
                    f"input is {width}x{height} pixels, and this checkpoint and task take {w}x{h} or more; enlarge it, "
                    "or choose another checkpoint"
                )
        self(torch.from_numpy(images.index[:1]))  # raises what is wrong before any sampling

    @property
    def pictures(self) -> bool:
        """Whether a measurement is a picture: of the image's size, or smaller by one factor in both directions."""
        (c, h, w), (_, height, width) = self.operator.measured_shape, self.operator.shape
        return c in (1, 3) and height % h == width % w == 0 and height // h == width // w

    def __call__(
        self,
        index: Tensor,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Measurement:
        """The measurement of the images of these numbers (B,)."""
        shape = self.operator.measured_shape
        x = from_uint8(self.images.read(index)).to(device, dtype)
        if self.degraded:
            y = _with_channels(_middle(x, shape[1], shape[2]), shape[0])
        else:
            y = self.operator(x)
            if self.sigma_y > 0:
                noise = NoiseSource(self.seed, index // self.samples, shape, device, dtype, MEASUREMENT)
                y = y + self.sigma_y * noise(0)
        y = self.operator(y) if isinstance(self.operator, Inpainting) else y
        return Measurement(y, self.operator, self.sigma_y)

    def drawn(self, index: Tensor) -> Tensor:
        """Measurements as pictures of the image's size, uint8 (B, C, H, W): enlarged, or A^+ y where y is none."""
        channels, height, width = self.operator.shape
        y = self(index).y
        y = F.interpolate(y, (height, width), mode="nearest") if self.pictures else self.operator.pinv(y)
        return to_uint8(_with_channels(y, channels))


def _middle(x: Tensor, height: int, width: int) -> Tensor:
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]


def _with_channels(x: Tensor, channels: int) -> Tensor:
    """(B, 1 or 3, H, W) with 1 or 3 channels."""
    if x.shape[1] > channels:
        return (x * x.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
    return x.expand(-1, channels, -1, -1)


class Restoration(Sampler):
    """The sampler of p(x_0 | y_i), a restorer given the measurement of each image:

        x_i = restorer(denoiser, y_i, z_i, label_i)

    so that `Sampling` makes restorations as it makes samples. Its sample i is the restoration of image i.

    Args:
        restorer: the method.
        measurements: of all images of the run.
    """

    def __init__(self, restorer: Restorer, measurements: Measurements):
        self.restorer, self.measurements = restorer, measurements

    def __call__(
        self,
        denoiser: Denoiser,
        noise: NoiseSource,
        *,
        start: Tensor | None = None,
        progress: Progress | None = None,
        **condition: Tensor,
    ) -> Tensor:
        if start is not None:
            raise ValueError("a restorer starts from its measurement; it takes no start")
        measurement = self.measurements(torch.tensor(noise.index), noise.device, noise.dtype)
        return self.restorer(denoiser, measurement, noise, progress=progress, **condition)
