"""The variational bound on the likelihood of data under the chain that DDPM samples by."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.special import log_ndtr

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath, combine
from steadyflow.samplers.ddpm import DDPM
from steadyflow.samplers.sampler import Progress


class VariationalBound:
    """log p(x_0) >= -L, one x_t drawn a step:

        L = KL(q(x_1) || N(0, sigma_1^2 I)) + sum_k KL(q(x_s | x_t, x_0) || p(x_s | x_t)) - log p(x_0 | x_t, s = 0)

    for p(x_s | x_t) = N(keep x_t + pull D, std^2 I), a step t -> s of `DDPM`, and q the same with x_0 in the place of D
    and `small` of std, so that

        KL = sum over the entries of  [small^2 / std^2 - 1 - log(small^2 / std^2) + pull^2 (x_0 - D)^2 / std^2] / 2

    The last step says how probable the 8-bit image is: N(D, std^2) between x_0 - 1/255 and x_0 + 1/255, open at the
    ends -1 and 1; of vectors, their density. Its std is the `small` of the step before; `learned` lies between that and
    its `large`.

    With an exact D, all steps short and little noise before the last it is close to the likelihood of images; the
    density of vectors keeps the last step's gap. A grid whose last step is long beside the one before, as `LogSNR`'s
    and `Karras`', makes a poor bound.
    Source: Ho et al. 2020, Eq. 5 and Section 3.3; Nichol & Dhariwal 2021, Eq. 4-7 and 15.

    Args:
        path, grid, steps, variance: as of `DDPM`. All steps of a discrete chain are the grid `Indices` of as many.
        clip: D of images to [-1, 1], as they are, which the published numbers do.

    Raises:
        ValueError: as `DDPM`; fewer than 2 steps, or a last one that ends with noise; clip is no bool.
    """

    dequantised = False

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        variance: str = "large",
        clip: bool = True,
    ):
        self.chain = DDPM(path, grid, steps, variance)
        end = float(path(self.chain.times[-1])[1])
        if self.chain.steps < 2 or end > 0:
            raise ValueError(f"the bound needs 2 or more steps down to sigma = 0, got {self.chain.steps} to {end:.3g}")
        if not isinstance(clip, bool):
            raise ValueError(f"clip must be true or false, got {clip!r}")
        self.clip = clip

    def protocol(self, dimensions: int) -> dict[str, object]:
        """What a number of it depends on."""
        return {"bound": "variational", "steps": self.chain.steps, "variance": self.chain.variance, "clip": self.clip}

    @torch.no_grad()
    def __call__(
        self, denoiser: nn.Module, x0: Tensor, noise: NoiseSource, progress: Progress | None = None, **condition: Tensor
    ) -> Tensor:
        """-L in nats, (B,) float64, of data x0 (B, *S).

        Args:
            denoiser: a Denoiser.
            noise: of shape S; step k is drawn in the k-th step.
            progress: called with the fraction done.
            condition: passed on to the denoiser.
        """
        path, times = self.chain.path, self.chain.times
        x0 = x0.double()
        alpha, sigma = path(times[0])
        total = -0.5 * (alpha / sigma) ** 2 * _sum(x0**2)  # of q(x_1), whose variance is that of the prior
        rows = list(zip(*self.chain.coefficients(times[:-1], times[1:]), strict=True))
        for k, (a_t, s_t, _, pull, small, large) in enumerate(rows):
            x = combine(a_t, x0, s_t, noise(k + 1).double())
            last = k == len(rows) - 1
            if last:  # DDPM adds no noise there, but the decoder has some
                small = rows[k - 1][4]
                large = s_t if self.chain.variance == "learned" else small
            mean, log_std = self._step(denoiser, x.to(noise.dtype), (a_t, s_t, small, large), condition)
            if last:
                total += _decoder(x0, mean, log_std)
            else:
                log_ratio = math.log(small) - log_std
                error = (pull * (x0 - mean)) ** 2 * torch.exp(-2 * log_std)
                total -= 0.5 * _sum(torch.expm1(2 * log_ratio) - 2 * log_ratio + error)
            if progress is not None:
                progress((k + 1) / len(rows))
        return total

    def _step(
        self, denoiser: nn.Module, x: Tensor, at: tuple[Tensor, ...], condition: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """D and log std of a step, float64."""
        a_t, s_t, small, large = at
        if self.chain.variance == "learned":
            mean, v = cast(Denoiser, denoiser).with_variance(x, a_t, s_t, **condition)
            log_std = math.log(small) + (math.log(large) - math.log(small)) * v.double()
        else:
            mean = denoiser(x, a_t, s_t, **condition)
            log_std = torch.full_like(
                mean, math.log(small if self.chain.variance == "small" else large), dtype=torch.float64
            )
        mean = mean.double()
        return mean.clamp(-1, 1) if self.clip and mean.ndim == 4 else mean, log_std


def _decoder(x0: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log p(x_0 | mean, std) (B,): of images (B, C, H, W) the mass of each of 256 levels; of vectors, density."""
    scale = torch.exp(-log_std)
    if x0.ndim != 4:
        z = (x0 - mean) * scale
        return -_sum(0.5 * z**2 + log_std + 0.5 * math.log(2 * math.pi))
    above, below = (x0 - mean + 1 / 255) * scale, (x0 - mean - 1 / 255) * scale
    above, below = torch.where(x0 > 0.999, torch.inf, above), torch.where(x0 < -0.999, -torch.inf, below)
    flip = above + below > 0  # the same mass on the left, where both tails are small and their difference is exact
    high, low = log_ndtr(torch.where(flip, -below, above)), log_ndtr(torch.where(flip, -above, below))
    return _sum(high + torch.log1p(-torch.exp(low - high)))


def _sum(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)
