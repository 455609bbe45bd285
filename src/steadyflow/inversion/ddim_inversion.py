"""DDIM run backwards."""

import time

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.inversion.inverter import Inversion, Inverter, deterministic_ddim, direct
from steadyflow.noise import NoiseSource
from steadyflow.paths import combine
from steadyflow.samplers import Sampler
from steadyflow.samplers.sampler import Progress


class DDIMInversion(Inverter):
    """Deterministic DDIM by reversed steps, from the image to the noise:

        x_t = (alpha_t / alpha_s) x_s + (sigma_t - sigma_s alpha_t / alpha_s) eps,   eps = (x - alpha D) / sigma

    DDIM's step from t to s takes eps at (x_t, t), which is not known yet; it is taken at (x_s, s), or at (alpha_t /
    alpha_s x_s, t) where sigma_s = 0. So x_T is found to first order: the error halves with twice the steps. Each
    `correction` takes eps again, at (x_t, t) with the latest x_t; where that iteration contracts, its limit inverts
    DDIM exactly. One evaluation a step and correction, no gradient.
    Source: Song et al. 2021 (DDIM), Section 4.3.

    Args:
        corrections: >= 0, of each step.

    Raises:
        ValueError: corrections < 0; a sampler other than deterministic DDIM.
    """

    def __init__(self, corrections: int = 0):
        if not (isinstance(corrections, int) and corrections >= 0):
            raise ValueError(f"corrections must be a whole number >= 0, got {corrections}")
        self.corrections = corrections

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        target: Tensor,
        noise: NoiseSource,
        *,
        progress: Progress | None = None,
        **condition: Tensor,
    ) -> Inversion:
        ddim = deterministic_ddim(sampler, "ddim_inversion")
        begun = time.perf_counter()
        x, levels = target, list(zip(*ddim.path(ddim.times), strict=True))
        for k in reversed(range(ddim.steps)):
            (a_t, s_t), (a_s, s_s) = levels[k], levels[k + 1]
            grow = a_t / a_s
            guess = x if s_s > 0 else combine(grow, x, torch.zeros(()), x)
            at, calls = (levels[k + 1] if s_s > 0 else levels[k]), 1 + self.corrections
            for _ in range(calls):
                alpha, sigma = at
                eps = combine(1 / sigma, guess, -alpha / sigma, denoiser(guess, alpha, sigma, **condition))
                guess, at = combine(grow, x, s_t - s_s * grow, eps), levels[k]
            x = guess
            if progress is not None:
                progress(1 - k / ddim.steps)
        finite = x.flatten(1).isfinite().all(1).cpu()  # waits for the device
        seconds = time.perf_counter() - begun
        if not finite.all():
            raise FloatingPointError("the noise found is not finite; the network returned NaN or a correction diverged")
        return direct(x, seconds)

    def image(
        self, denoiser: Denoiser, sampler: Sampler, latent: Tensor, noise: NoiseSource, **condition: Tensor
    ) -> Tensor:
        return sampler(denoiser, noise, start=latent, progress=None, **condition)
