"""The likelihood of data under a model: the change of density along its probability flow."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from steadyflow.denoisers import Denoiser
from steadyflow.diffusions import LinearDiffusion
from steadyflow.diffusions.linear import inverse
from steadyflow.noise import NoiseSource
from steadyflow.paths import GaussianPath, expand
from steadyflow.samplers.linear import state_noise
from steadyflow.samplers.rk45 import dormand_prince, taken
from steadyflow.samplers.sampler import Progress


class Likelihood:
    """log p(x) = log N(u_1; 0, Sigma_1) + int_e^1 div f(u_t, t) dt + log det Psi(e, 0),  u_e = Psi(e, 0) x

    along the probability flow du/dt = f = A_t u + g(u, t) from t = e to 1: A u its linear part and g what the network
    adds, q D on a Gaussian path (where Psi(e, 0) = alpha(e)), B eps on a linear diffusion. So it is the density of what
    the flow makes of N(0, Sigma_1), as samplers draw it, read at t = e. div f = tr A + tr dg/du: the second exact, one
    backward pass an entry, for states of up to `exact` entries; of larger ones by random signs z (Hutchinson),
    E z^T (dg/du) z with one z along the whole flow, which is unbiased in log p.

    By Dormand-Prince in sqrt(t), each item with steps of its own. A diffusion with further variables, as CLD's velocity
    v_0 ~ N(0, C), gives a bound: with v_0 drawn, log p(x) >= E [log p(x, v_0) - log N(v_0; 0, C)].

    Source: Chen et al. 2018 (neural ODEs), Theorem 1; Song et al. 2021 (score SDE), Eq. 39-40; Dockhorn et al. 2022,
    App. B.4 (the bound).

    Args:
        path: the Gaussian path or linear diffusion.
        probes: how many z. exact: see above.
        end: e, with less noise than the data's own finest detail.
        rtol, atol: the tolerances, of the state and of log p.

    Raises:
        ValueError: end outside (0, 1); tolerances or probes that are not positive.
    """

    dequantised = True  # images are given noise of the width of a level, of which it is the density

    def __init__(
        self,
        path: GaussianPath | LinearDiffusion,
        probes: int = 1,
        exact: int = 16,
        end: float = 1e-5,
        rtol: float = 1e-5,
        atol: float = 1e-5,
    ):
        if not (0 < end < 1 and rtol > 0 and atol > 0 and probes >= 1):
            raise ValueError(f"need 0 < end < 1, rtol, atol > 0 and probes >= 1, got {end}, {rtol}, {atol}, {probes}")
        self.path, self.probes, self.exact, self.end = path, int(probes), int(exact), float(end)
        self.rtol, self.atol = float(rtol), float(atol)

    def protocol(self, dimensions: int) -> dict[str, object]:
        """What a number of it depends on."""
        trace = "exact" if dimensions <= self.exact else f"{self.probes} random signs"
        return {"trace": trace, "end": self.end, "rtol": self.rtol, "atol": self.atol}

    def __call__(
        self, model: nn.Module, x: Tensor, noise: NoiseSource, progress: Progress | None = None, **condition: Tensor
    ) -> Tensor:
        """log p(x) in nats, (B,) float64, of data x (B, *S).

        Args:
            model: a Denoiser, on a linear diffusion a NoiseModel.
            noise: of shape S, of the further variables (step 0) and of the probes (steps 1, 2, ...).
            progress: called with the fraction done.
            condition: passed on to the model.

        Raises:
            FloatingPointError: the model returned NaN.
        """
        flow = _on_path(self.path, model) if isinstance(self.path, GaussianPath) else _on_diffusion(self.path, model)
        y, log_p = flow.first(x.double(), self.end, noise)
        k = y.shape[1] // x.shape[1]
        shape, n = y.shape[1:], y[0].numel()
        signs = None
        if n > self.exact:
            signs = torch.stack([state_noise(k, noise, p + 1).double().sign() for p in range(self.probes)])

        def rate(state: Tensor, v: Tensor, rows: Tensor) -> Tensor:
            t, y, given = v * v, state[:, :-1].reshape(-1, *shape), taken(condition, rows)
            with torch.enable_grad():
                y = y.detach().requires_grad_()
                added = flow.added(y, t, **given)
                trace = _trace(added, y, None if signs is None else signs[:, rows.to(signs.device)])
            f = (flow.linear(y, t) + added).detach()
            divergence = flow.trace(t, n).to(trace.device) + trace
            return expand(2 * v, state) * torch.cat([f.flatten(1), divergence.unsqueeze(1)], 1)

        state = torch.cat([y.flatten(1), torch.zeros_like(log_p).unsqueeze(1)], 1)
        state = dormand_prince(rate, state, self.end**0.5, 1.0, self.rtol, self.atol, progress)
        return log_p + flow.last(state[:, :-1].reshape(-1, *shape)) + state[:, -1]


class _Flow(NamedTuple):
    """f = A_t y + g(y, t) and its two ends."""

    first: Callable[[Tensor, float, NoiseSource], tuple[Tensor, Tensor]]  # y_e; log det Psi(e, 0) - log N(v_0) (B,)
    linear: Callable[[Tensor, Tensor], Tensor]  # A_t y
    trace: Callable[[Tensor, int], Tensor]  # tr A_t (B,)
    added: Callable[..., Tensor]  # g
    last: Callable[[Tensor], Tensor]  # log N(y; 0, Sigma_1) (B,)


def _on_path(path: GaussianPath, denoiser: Denoiser | nn.Module) -> _Flow:
    """dx/dt = p x + q D."""

    def first(x: Tensor, end: float, noise: NoiseSource) -> tuple[Tensor, Tensor]:
        alpha = float(path(end)[0])
        return alpha * x, x.new_full((len(x),), x[0].numel() * math.log(alpha))

    def linear(x: Tensor, t: Tensor) -> Tensor:
        return expand(path.velocity(t)[0], x) * x

    def trace(t: Tensor, n: int) -> Tensor:
        return n * path.velocity(t)[0]

    def added(x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        return expand(path.velocity(t)[1], x) * denoiser(x, *path(t), **condition)

    def last(x: Tensor) -> Tensor:
        sigma = float(path(1.0)[1])
        return _normal(x / sigma) - x[0].numel() * math.log(sigma)

    return _Flow(first, linear, trace, added, last)


def _on_diffusion(d: LinearDiffusion, model: nn.Module) -> _Flow:
    """du/dt = F u + B eps, in the basis."""
    k = d.variables

    def first(x: Tensor, end: float, noise: NoiseSource) -> tuple[Tensor, Tensor]:
        u, drawn = d.lift(x), x.new_zeros(len(x))
        if k > 1:  # the covariance of v_0 is diagonal
            std = d.covariance(0.0).diagonal()[1:].sqrt().to(x.device)
            z = state_noise(k, noise, 0).double()[:, x.shape[1] :]
            u[:, x.shape[1] :] = (std.reshape(1, -1, *[1] * (x.ndim - 1)) * z.unflatten(1, (k - 1, -1))).flatten(1, 2)
            drawn = _normal(z) - x[0].numel() * std.log().sum()
        psi = d.transition(end, 0.0)
        return d.apply(psi, d.to_basis(u)), _log_det(psi, u) - drawn

    def linear(y: Tensor, t: Tensor) -> Tensor:
        return d.apply(d.drift(t), y)

    def trace(t: Tensor, n: int) -> Tensor:
        return n * d.drift(t).diagonal(dim1=-2, dim2=-1).flatten(1).mean(1)

    def added(y: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        return d.apply(d.rate(t), d.to_basis(model(d.from_basis(y), t, **condition)))

    def last(y: Tensor) -> Tensor:
        root = d.cholesky(1.0)
        return _normal(d.apply(inverse(root), y)) - _log_det(root, y)

    return _Flow(first, linear, trace, added, last)


def bits_per_dimension(log_p: Tensor, dimensions: int, levels: float = 1.0) -> Tensor:
    """-log2 P / D from log p in nats: of a density itself, or of integers, whose spacing in x is 1 / levels.

    For uniform dequantisation, x = (k + u) / levels and log P(k) >= E_u log p(x) - D log levels (Theis et al. 2016).
    """
    return (math.log(levels) - log_p / dimensions) / math.log(2)


def _normal(z: Tensor) -> Tensor:
    """log N(z; 0, I) of each item (B,)."""
    return -0.5 * (z.flatten(1).square().sum(1) + z[0].numel() * math.log(2 * math.pi))


def _log_det(block: Tensor, y: Tensor) -> Tensor:
    """log |det| of blocks (*F, k, k) on the whole state y (B, k C, *rest), ()."""
    k = block.shape[-1]
    return torch.linalg.det(block).abs().log().mean() * (y[0].numel() // k)


def _trace(g: Tensor, y: Tensor, signs: Tensor | None) -> Tensor:
    """tr (dg / dy) of each item (B,): by signs z (P, B, *S), or exactly where there are none."""
    if signs is not None:
        products = [(torch.autograd.grad(g, y, z, retain_graph=True)[0] * z).flatten(1).sum(1) for z in signs]
        return torch.stack(products).mean(0)
    flat = g.flatten(1)
    rows = [
        torch.autograd.grad(flat[:, i].sum(), y, retain_graph=True)[0].flatten(1)[:, i] for i in range(flat.shape[1])
    ]
    return torch.stack(rows).sum(0)
