"""EDICT: DDIM with coupled states, exactly reversible."""

import time

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.inversion.inverter import Inversion, Inverter, deterministic_ddim, direct
from steadyflow.noise import NoiseSource
from steadyflow.samplers import DDIM, Sampler
from steadyflow.samplers.sampler import Progress


class EDICT(Inverter):
    """Two states x, y that take DDIM's steps with each other's eps, and are drawn together:

        x' = a x + b eps(y, t),            y' = a y + b eps(x', t)
        x_s = p x' + (1 - p) y',           y_s = p y' + (1 - p) x_s
        a = alpha_s / alpha_t,  b = sigma_s - sigma_t a,  eps(x, t) = (x - alpha_t D(x)) / sigma_t

    Every line can be solved for the state it changes, so the step has an exact inverse, of the same two evaluations:

        y' = (y_s - (1 - p) x_s) / p,      x' = (x_s - (1 - p) y') / p
        y = (y' - b eps(x', t)) / a,       x = (x' - b eps(y, t)) / a

    The image inverts from x = y = x_0 to a pair (x_T, y_T), which comes back to the image to rounding, whatever the
    network is. The two change roles at every step. The pair is the latent: this is another sampler than DDIM, and x_T
    alone makes another image. Rounding grows by up to 1 / p^2 a step, so the states are float64.
    Source: Wallace et al. 2023 (EDICT), Eq. 9-16 and Section 4.

    Args:
        p: mixing weight, 0 < p <= 1; 1 draws nothing together.

    Raises:
        ValueError: p out of range; a sampler other than deterministic DDIM; a path that starts without signal.
    """

    def __init__(self, p: float = 0.93):
        if not 0 < p <= 1:
            raise ValueError(f"need 0 < p <= 1, got {p}")
        self.p = float(p)

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
        ddim = deterministic_ddim(sampler, "edict")
        begun = time.perf_counter()
        latent = self._to_noise(denoiser, ddim, target.double(), progress, condition)
        finite = latent.isfinite().all().cpu()  # waits for the device
        seconds = time.perf_counter() - begun
        if not finite:
            raise FloatingPointError("the pair found is not finite; the network returned NaN or p is too small")
        return direct(latent, seconds)

    def _to_noise(
        self, denoiser: Denoiser, ddim: DDIM, image: Tensor, progress: Progress | None, condition: dict[str, Tensor]
    ) -> Tensor:
        x = y = image
        for k in reversed(range(ddim.steps)):
            (alpha, sigma), a, b = self._step(ddim, k)
            x, y = (x, y) if k % 2 == 0 else (y, x)
            y = (y - (1 - self.p) * x) / self.p
            x = (x - (1 - self.p) * y) / self.p
            y = (y - b * (x - alpha * denoiser(x, alpha, sigma, **condition)) / sigma) / a
            x = (x - b * (y - alpha * denoiser(y, alpha, sigma, **condition)) / sigma) / a
            x, y = (x, y) if k % 2 == 0 else (y, x)
            if progress is not None:
                progress(1 - k / ddim.steps)
        return torch.stack([x, y], 1)

    @torch.no_grad()
    def image(
        self, denoiser: Denoiser, sampler: Sampler, latent: Tensor, noise: NoiseSource, **condition: Tensor
    ) -> Tensor:
        ddim = deterministic_ddim(sampler, "edict")
        x, y = latent.double().unbind(1)
        for k in range(ddim.steps):
            (alpha, sigma), a, b = self._step(ddim, k)
            x, y = (x, y) if k % 2 == 0 else (y, x)
            x = a * x + b * (y - alpha * denoiser(y, alpha, sigma, **condition)) / sigma
            y = a * y + b * (x - alpha * denoiser(x, alpha, sigma, **condition)) / sigma
            x = self.p * x + (1 - self.p) * y
            y = self.p * y + (1 - self.p) * x
            x, y = (x, y) if k % 2 == 0 else (y, x)
        return x

    def _step(self, ddim: DDIM, k: int) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """((alpha_t, sigma_t), a, b) of the k-th step."""
        (a_t, s_t), (a_s, s_s) = ddim.path(ddim.times[k]), ddim.path(ddim.times[k + 1])
        if a_t == 0:
            raise ValueError("edict divides by alpha, which is 0 where this grid starts; set sampler/grid=log_snr")
        return (a_t, s_t), a_s / a_t, s_s - s_t * a_s / a_t
