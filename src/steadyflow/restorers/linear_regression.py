"""Restoration without a denoiser: the linear regression of images on their measurements."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.noise import NoiseSource
from steadyflow.restorers.restorer import Measurement, Operator, Restorer
from steadyflow.samplers.sampler import Progress

Images = Sequence[tuple[Tensor, int]]
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # tried, in units of the mean square of an entry of A x
HELD_OUT = 5  # every fifth image chooses among them


class LinearRegression(Restorer):
    """x = m + W (y - A m),   W = X^T Z (Z^T Z + N (sigma_y^2 + delta) I)^-1

    the ridge regression of the N images, rows of X without their mean m, on their measurements Z = X A^T: the best
    affine restoration of the images it is fitted on, in the mean square, with delta = 0. The ridge delta is the one
    that restores every fifth image best from the others, with noise. It asks no denoiser: 0 evaluations, and the floor
    that a method of this project has to beat. It averages over what it does not know, so it wins in PSNR and blurs.

    Args:
        images: of the training split, items (x (C, H, W), label), as a dataset or what makes one.
        limit: how many of them, the first, are fitted.

    Raises:
        ValueError: fewer than 10 images; images or an operator of another size than the measurement's.
    """

    def __init__(self, images: Images | Callable[[], Images], limit: int = 10000):
        self.images, self.limit = images, int(limit)
        self._of: tuple[Operator, float] | None = None
        self._fit: tuple[Tensor, Tensor] | None = None

    def fit(self, measurement: Measurement) -> tuple[Tensor, Tensor]:
        """(m (1, *S), W^T (entries of y, pixels)), float64, of the operator and sigma_y of a measurement; once each."""
        operator, noise2 = measurement.operator, measurement.sigma_y**2
        if self._fit is not None and self._of is not None and self._of[0] is operator and self._of[1] == noise2:
            return self._fit
        images = self.images() if callable(self.images) else self.images
        n = min(len(images), self.limit)
        if n < 2 * HELD_OUT:
            raise ValueError(f"a regression needs at least {2 * HELD_OUT} images, got {n}")
        x = torch.stack([images[i][0] for i in range(n)])
        if x.shape[1:] != measurement.back.shape[1:]:
            raise ValueError(f"fitted on images {tuple(x.shape[1:])}, for images {tuple(measurement.back.shape[1:])}")
        mean = x.double().mean(0, keepdim=True)
        z = (operator(x) - operator(mean.to(x.dtype))).double().flatten(1)
        x = (x.double() - mean).flatten(1)
        held = torch.arange(n) % HELD_OUT == 0
        scale = z.square().mean().item() or 1.0

        def solve(z: Tensor, x: Tensor, delta: float) -> Tensor:
            inner = z.mT @ z / len(z)
            inner.diagonal().add_(noise2 + delta)
            return torch.linalg.solve(inner, z.mT @ x / len(x))

        def error(delta: float) -> float:  # E |x - W (z + sigma_y n)|^2 over the images held out
            w = solve(z[~held], x[~held], delta)
            return ((z[held] @ w - x[held]).square().sum(1).mean() + noise2 * w.square().sum()).item()

        best = min((r * scale for r in RIDGES), key=error)
        self._of, self._fit = (operator, noise2), (mean, solve(z, x, best))
        return self._fit

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        measurement: Measurement,
        noise: NoiseSource,
        *,
        progress: Progress | None = None,
        **condition: Tensor,
    ) -> Tensor:
        y = measurement.y
        mean, weights = (v.to(y.device) for v in self.fit(measurement))
        rest = (y - measurement.operator(mean.to(y.dtype))).double().flatten(1)
        return (mean + (rest @ weights).reshape(len(y), *mean.shape[1:])).to(y.dtype)
