"""RED-diff: restoration by optimisation, the denoiser a regulariser."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath
from steadyflow.restorers.restorer import Measurement, Restorer
from steadyflow.samplers.sampler import Progress, Watch, time_grid

BETAS, EPS = (0.9, 0.99), 1e-8  # of Adam


class REDDiff(Restorer):
    """mu <- Adam(mu, g),   g = lambda (mu - D(alpha mu + sigma z)) - A^T (y - A mu)

    one step a time, t falling from noise to data; g is the gradient of |y - A mu|^2 / 2 + lambda rho (eps - z)^T mu
    with the bracket constant and rho = sigma / alpha, the source's weight linear in 1 / SNR, for rho (eps - z) is
    mu - D. Sums, not means, over samples: a batch of N equals N batches of one. As the source's code takes the means
    of the terms, over the entries of y and the pixels of x, lambda is its value times (entries of y) / (pixels of x),
    1/16 for super-resolution x4. Gives mu, a mode rather than a sample. One evaluation a step, no gradient of the
    network. Source: Mardani et al. 2024 (RED-diff), Algorithm 1.

    Args:
        path, grid, steps: the times; 1000 uniform ones in the source. One that is 0 is not used, so a grid of N steps
            that ends at 0 takes N.
        weight: lambda.
        lr: Adam's.
        init: mu at the start: y or pinv.
        means: whether lambda is of means, as published values are; entries of y that A leaves 0, as behind a mask, do
            not count. If not, lambda is that of the equation.

    Raises:
        ValueError: lambda < 0, lr <= 0, another init; an operator that is not linear.
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        weight: float = 0.25,
        lr: float = 0.1,
        init: str = "pinv",
        means: bool = True,
    ):
        if not (weight >= 0 and lr > 0):
            raise ValueError(f"need weight >= 0 and lr > 0, got {weight} and {lr}")
        if init not in ("y", "pinv"):
            raise ValueError(f"init is y or pinv, got '{init}'")
        self.path, self.times = path, time_grid(path, grid, steps)
        self.weight, self.lr, self.init, self.means = float(weight), float(lr), init, means

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
        operator, y = measurement.operator, measurement.y
        if not hasattr(operator, "adjoint"):
            raise ValueError(f"RED-diff here needs A^T, and {type(operator).__name__} is not linear")
        mu = (measurement.back if self.init == "pinv" else y).clone()
        weight = self.weight
        if self.means:
            probe = torch.rand(mu[:1].shape, generator=torch.Generator().manual_seed(0)).to(mu) + 1
            weight *= int((operator(probe) != 0).sum()) / probe.numel()
        first, second, watch = torch.zeros_like(mu), torch.zeros_like(mu), Watch(self.times, progress)
        for k, t in enumerate(self.times[:-1]):
            alpha, sigma = self.path(t)
            x0 = denoiser(alpha.item() * mu + sigma.item() * noise(k + 1), alpha, sigma, **condition)
            g = weight * (mu - x0) - operator.adjoint(y - operator(mu))
            first.lerp_(g, 1 - BETAS[0])
            second.lerp_(g * g, 1 - BETAS[1])
            scale = (1 - BETAS[1] ** (k + 1)) ** 0.5
            mu.addcdiv_(first, second.sqrt() / scale + EPS, value=-self.lr / (1 - BETAS[0] ** (k + 1)))
            watch(mu)
        watch.check()
        return mu
