"""Predictor-corrector sampling: a step of the reverse diffusion, and Langevin dynamics at each noise level."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.grids import Grid
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath, accumulate, combine
from steadyflow.samplers.ddpm import DDPM
from steadyflow.samplers.sampler import Progress, Sampler, Watch, noise_start, time_grid


class PredictorCorrector(Sampler):
    """At every time t of the grid n corrections, then the prediction t -> s; score = (alpha_t D - x) / sigma_t^2:

        correct   x <- x + h score + sqrt(2 h) z,   h = 2 b^2 (r |z| / |score|)^2,   b = alpha_t / alpha_s
        predict   reverse_diffusion   x_s = (2 - b) x_t + g^2 score + g z,   g^2 = sigma_t^2 - b^2 sigma_s^2
                  ancestral           the mean of q(x_s | x_t, x_0 = D) + g (sigma_s / sigma_t) z, as `DDPM`

    The transition of the path from s to t multiplies by b and adds noise of standard deviation g, so on VP b^2 is the
    chain's 1 - beta and g^2 its beta, and on VE b = 1. The last step is the denoiser, x = alpha_s D, without noise.

    The corrector is Langevin dynamics with a step of signal-to-noise ratio r: on a Gaussian of high dimension it leaves
    the variance 1 + r^2 times too large, so it errs in r as the predictor does in the steps. Its norms are of each
    sample, as published (their code takes the batch's mean), and mean something for images: on points of a few
    dimensions they vary, and the law is wider. Source: Song et al. 2021 (score SDE), Algorithms 2-5, Appendices E and
    G; their code corrects before it predicts, as here.

    Args:
        path, grid, steps: see OneStepSampler. n + 1 denoiser calls a step.
        predictor: reverse_diffusion or ancestral.
        corrector_steps: n; 0 is the predictor alone.
        snr: r > 0.
        denoise: whether the last step is the denoiser; else it is as the others, with its noise.

    Raises:
        ValueError: an option out of range; reverse_diffusion from a time without signal, where it has no drift.
    """

    def __init__(
        self,
        path: GaussianPath,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        predictor: str = "reverse_diffusion",
        corrector_steps: int = 1,
        snr: float = 0.16,
        denoise: bool = True,
    ):
        self.path, self.times = path, time_grid(path, grid, steps)
        if predictor not in ("reverse_diffusion", "ancestral"):
            raise ValueError(f"predictor must be reverse_diffusion or ancestral, got {predictor}")
        if not (corrector_steps >= 0 and snr > 0):
            raise ValueError(f"need corrector_steps >= 0 and snr > 0, got {corrector_steps} and {snr}")
        self.corrector_steps, self.snr = int(corrector_steps), float(snr)
        t, s = self.times[:-1], self.times[1:]
        (a_t, s_t), (a_s, s_s) = path(t), path(s)
        b = a_t / a_s
        if predictor == "ancestral":
            _, _, keep, pull, std, _ = DDPM(path, self.times).coefficients(t, s)
        elif path.ratio(t[0]) > 1e8:
            raise ValueError(
                f"{type(path).__name__} has no signal at t = {t[0]:.4g}, and the reverse diffusion no drift there; "
                "choose predictor=ancestral, or a grid that starts below (start=0.99)"
            )
        else:
            fresh = s_t**2 - (b * s_s) ** 2  # g^2
            keep, pull, std = 2 - b - fresh / s_t**2, a_t * fresh / s_t**2, torch.sqrt(fresh)
        if denoise:
            keep[-1], pull[-1], std[-1] = 0.0, a_s[-1], 0.0
        self.table = torch.stack([a_t, s_t, 2 * (b * self.snr) ** 2, keep, pull, std], 1)

    @property
    def nfe(self) -> int:
        """The denoiser calls of a sample."""
        return len(self.table) * (self.corrector_steps + 1)

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        noise: NoiseSource,
        *,
        start: Tensor | None = None,
        progress: Progress | None = None,
        **condition: Tensor,
    ) -> Tensor:
        x = noise_start(self.path, self.times[0], noise) if start is None else start
        draws = self.corrector_steps + 1
        watch = Watch(self.times, progress)
        for k, (alpha, sigma, size, keep, pull, std) in enumerate(row.unbind() for row in self.table):
            for j in range(1, draws):
                x = langevin(x, denoiser(x, alpha, sigma, **condition), noise(draws * k + j), alpha, sigma, size)
            x = combine(keep, x, pull, denoiser(x, alpha, sigma, **condition))
            if std > 0:
                x = accumulate(x, std, noise(draws * (k + 1)))
            watch(x)
        watch.check()
        return x


def langevin(x: Tensor, x0: Tensor, z: Tensor, alpha: Tensor, sigma: Tensor, size: Tensor) -> Tensor:
    """x + h score + sqrt(2 h) z, h = size (|z| / |score|)^2, with score = (alpha x_0 - x) / sigma^2 = -eps / sigma."""
    eps = combine(1 / sigma, x, -alpha / sigma, x0)
    d = size * (z.flatten(1).norm(dim=1) / eps.flatten(1).norm(dim=1)) ** 2  # h / sigma^2, (B,)
    return accumulate(combine(1 - d, x, alpha * d, x0), sigma * torch.sqrt(2 * d), z)
