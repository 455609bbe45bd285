"""Inversion by gradient descent on x_T: the loop that the naive method and the equilibrium ones share."""

import math
import time
from abc import abstractmethod

import torch
from torch import Tensor

from steadyflow.denoisers import Denoiser
from steadyflow.inversion.chain import Chain, squared_distance
from steadyflow.inversion.ddim_inversion import DDIMInversion
from steadyflow.inversion.inverter import Inversion, Inverter
from steadyflow.noise import NoiseSource
from steadyflow.samplers import OneStepSampler, Sampler
from steadyflow.samplers.sampler import Progress, noise_start

STARTS, CLOCKS = ("noise", "ddim_inversion"), {"wall": time.perf_counter, "process": time.process_time}


class Descent(Inverter):
    """Adam on x_T with some gradient g of L = |x_0(x_T) - x*|^2, each image by itself:

        m = 0.9 m + 0.1 g,  v = 0.999 v + 0.001 g^2
        x_T = x_T - lr (m / (1 - 0.9^k)) / (sqrt(v / (1 - 0.999^k)) + 1e-8)        at epoch k = 1, 2, ...

    An image leaves the batch once its loss has reached the threshold, so a batch of N ends as N batches of one do. The
    result is the x_T of the least loss; its image is the sequential sampler's. Where the method only estimates the loss
    (`exact` is False), an image that is there to the end gets the better of two, by the loss of the sequential sampler:
    the x_T of the least estimate, and the last one.
    Source: Pokle 2025, Algorithms 1-3; Kingma & Ba 2015, Algorithm 1.

    Args:
        lr: of Adam.
        epochs: gradients at most.
        threshold: an image at or below this loss is finished.
        budget: seconds an image may take, None for no limit. Every image of a batch gets its share of the time, so n
            images together get n times the budget. What is found after the time does not count. With a budget the
            result depends on the machine.
        clock: wall (time that passes) or process (processor time of this process, for a busy machine).
        start: noise (sigma(t_0) z_0), or ddim_inversion: begin where DDIM's reversed steps end.

    Raises:
        ValueError: an option out of range; a sampler that is no one-step sampler.
        FloatingPointError: a loss that is not finite, with the epoch.
    """

    exact = True  # whether the loss that `gradient` returns is that of the sequential sampler

    def __init__(
        self,
        lr: float = 0.01,
        epochs: int = 400,
        threshold: float = 0.5,
        budget: float | None = None,
        clock: str = "wall",
        start: str = "noise",
    ):
        if not (isinstance(epochs, int) and epochs >= 1):
            raise ValueError(f"epochs must be a positive integer, got {epochs}")
        if not (lr > 0 and math.isfinite(lr)):
            raise ValueError(f"lr must be positive, got {lr}")
        if not threshold >= 0:
            raise ValueError(f"threshold must be at least 0, got {threshold}")
        if budget is not None and not budget > 0:
            raise ValueError(f"budget must be positive (seconds for an image) or null, got {budget}")
        if clock not in CLOCKS:
            raise ValueError(f"clock must be {' or '.join(CLOCKS)}, got {clock!r}")
        if start not in STARTS:
            raise ValueError(f"start must be {' or '.join(STARTS)}, got {start!r}")
        self.lr, self.epochs, self.threshold, self.start = float(lr), epochs, float(threshold), start
        self.budget, self.clock = math.inf if budget is None else float(budget), clock

    @abstractmethod
    def gradient(
        self, chain: Chain, x: Tensor, target: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(loss (B,), gradient (B, *S), memory): L at x (B, *S), and the direction to descend along.

        `memory`, leading with B, is what the method wants back at the next epoch; None at the first.
        """

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
        if not isinstance(sampler, OneStepSampler):
            raise ValueError(f"inversion needs a one-step sampler, got {type(sampler).__name__}; set sampler=ddim")
        now = CLOCKS[self.clock]
        chain = Chain(denoiser, sampler, sampler.noises(noise), condition)
        count, begun = len(target), now()
        x = self._start(denoiser, sampler, target, noise, condition)
        share = (now() - begun) / count  # seconds so far of each image that is still there
        here, aim = torch.arange(count), target  # the images still there: their places in the batch, their targets
        best, epochs = x.clone(), torch.zeros(count, dtype=torch.int64)
        least, seconds = torch.full((count,), math.inf, dtype=torch.float64), torch.full((count,), share).double()
        curve: list[Tensor] = []
        times: list[Tensor] = []
        m, v, memory = torch.zeros_like(x), torch.zeros_like(x), None
        for epoch in range(1, self.epochs + 1):
            begun = now()
            loss, g, memory = self.gradient(chain, x, aim, memory)
            found = loss.double().cpu()  # waits for the device
            share += (now() - begun) / len(here)
            if share > self.budget and epoch > 1:
                break
            if not found.isfinite().all():
                raise FloatingPointError(f"the loss is not finite at epoch {epoch} of {self.epochs}; take a smaller lr")
            row = torch.full((2, count), math.nan, dtype=torch.float64)
            row[0, here], row[1, here] = found, share
            curve.append(row[0])
            times.append(row[1])
            epochs[here], seconds[here] = epoch, share
            better = found < least[here]
            least[here[better]] = found[better]
            best[here[better].to(x.device)] = x[better.to(x.device)]
            if progress is not None:
                progress(max(epoch / self.epochs, min(share / self.budget, 1.0)))
            keep = (found > self.threshold).nonzero()[:, 0]
            if len(keep) == 0:
                break
            begun = now()
            if len(keep) < len(here):
                here, on = here[keep], keep.to(x.device)
                x, g, m, v, aim = x[on], g[on], m[on], v[on], aim[on]
                memory, chain = None if memory is None else memory[on], chain.rows(on)
            m, v = m.lerp(g, 0.1), v.lerp(g * g, 0.001)
            x = x - self.lr * (m / (1 - 0.9**epoch)) / ((v / (1 - 0.999**epoch)).sqrt() + 1e-8)
            share += (now() - begun) / len(here)
        if not self.exact and len(keep):
            begun, on = now(), here.to(x.device)
            loss, last = (squared_distance(chain.states(v)[:, -1], aim) for v in (best[on], x))
            best[on[last < loss]] = x[last < loss]
            seconds[here] += (now() - begun) / len(here)
        return Inversion(best, epochs, seconds, torch.stack(curve), torch.stack(times))

    def image(
        self, denoiser: Denoiser, sampler: Sampler, latent: Tensor, noise: NoiseSource, **condition: Tensor
    ) -> Tensor:
        return sampler(denoiser, noise, start=latent, progress=None, **condition)

    def _start(
        self, denoiser: Denoiser, sampler: OneStepSampler, target: Tensor, noise: NoiseSource, condition: dict
    ) -> Tensor:
        if self.start == "noise":
            return noise_start(sampler.path, sampler.times[0], noise).to(target)
        return DDIMInversion()(denoiser, sampler, target, noise, **condition).latent
