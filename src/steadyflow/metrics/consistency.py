"""How well restored images explain what was measured."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steadyflow.data.images import from_uint8
from steadyflow.metrics.metric import PerImageMetric
from steadyflow.restorers import Measurement


class Consistency(PerImageMetric):
    """|A x - y| / |y| of each restored image x with its measurement y: its mean and standard deviation over images.

    x is the image as it is written, 8 bits a channel in [-1, 1]: rounding alone gives about 0.002 where A keeps pixels
    and less where it averages them. With noise the true image has about sigma_y sqrt(M) / |y| of M numbers.

    Args:
        measure: the measurements of the images of numbers (B,), on a device, in a dtype.
    """

    keys = ("consistency", "consistency_std")
    needs = ("index", "images")

    def __init__(self, measure: Callable[[Tensor, torch.device, torch.dtype], Measurement]):
        super().__init__()
        self.measure = measure

    def update(self, index: Tensor, images: Tensor) -> None:
        if len(index) == 0:
            return self.store(index, images.new_zeros(0, dtype=torch.float64))
        measured = self.measure(index, images.device, torch.float32)
        y, again = measured.y.double().flatten(1), measured.operator(from_uint8(images)).double().flatten(1)
        return self.store(index, (again - y).norm(dim=1) / y.norm(dim=1))

    def protocol(self) -> dict[str, Any]:
        return {"images": "8 bits a channel"}
