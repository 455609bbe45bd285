"""gDDIM: DDIM for every linear diffusion, with multistep predictors and correctors, and stochastic."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steadyflow.diffusions import LinearDiffusion
from steadyflow.diffusions.linear import factor
from steadyflow.grids import Grid
from steadyflow.paths import GaussianPath
from steadyflow.quadrature import gauss_legendre
from steadyflow.samplers.linear import LinearSampler, Row

TOLERANCE = 1e-11  # of the coefficients that have no closed form, relative to the largest of a step


class GDDIM(LinearSampler):
    """du = F u dt + B eps dt with B = 1/2 G G^T R^-T, solved for a noise that is a polynomial in t:

        u_s = Psi(s, t) u_t + sum_{j < q} C_j eps_j,  C_j = int_t^s Psi(s, tau) B_tau l_j(tau) dtau

    l_j the Lagrange polynomials of the nodes t = t_n, t_(n-1), ..., t_(n-q+1). Order q = 1 freezes the noise, with
    C_0 = R_s - Psi(s, t) R_t: exact in one step where the data are one point (Prop. 7), and DDIM on a Gaussian path. A
    predictor of q nodes (degree q - 1) is of order q; its first q - 1 steps have fewer nodes, which can cost order.
    Source: Zhang et al. 2023 (gDDIM), Eq. 18-19 (thesis Eq. 7.18-7.19, whose q this is).

    corrector: the step once more with eps(u_s, s) as a further node: order q + 1, two calls a step (not to t = 0).

    k = "L" freezes or extrapolates the noise of the Cholesky factor in place of R_t's, as CLD's authors do:
    B -> 1/2 G G^T L^-T. It is not constant along the flow of one point; the thesis' comparison (Table 7.1).

    lambda > 0, q = 1: the exact solution of du = [F u + (1 + lambda^2) B eps] dt + lambda G dw, where the score, given
    eps_t, is taken at every (u, tau) as one Gaussian's (Prop. 8-9, thesis Eq. 7.20-7.23),

        u_s ~ N(Psi(s, t) u_t + [Psi^(s, t) - Psi(s, t)] R_t eps_t, P),  P = Sigma_s - Psi^ Sigma_t Psi^T,

    Psi^ the transition of F + (1 + lambda^2) / 2 G G^T Sigma^-1. lambda = 1 is ancestral sampling, from
    q(u_s | u_t, u_0); on VP the variance is stochastic DDIM's (Eq. 7.14, whose sigma_t is printed without its square).
    The step to t = 0 is the denoiser's.

    Coefficients without closed form: Gauss-Legendre in sqrt(t), panels doubled until two results agree to 1e-11.

    Args:
        path, grid, steps: see LinearSampler. One call a step.
        order: q, 1 to 6.
        corrector: see above.
        lambda_: lambda >= 0.
        k: "R" or "L".

    Raises:
        ValueError: an option out of range, or lambda_ > 0 with an order, a corrector or k = "L", which are of the flow.
    """

    def __init__(
        self,
        path: GaussianPath | LinearDiffusion,
        grid: Grid | Tensor | Sequence[float],
        steps: int | None = None,
        order: int = 1,
        corrector: bool = False,
        lambda_: float = 0.0,
        k: str = "R",
    ):
        super().__init__(path, grid, steps)
        if not (1 <= order <= 6 and lambda_ >= 0 and k in ("R", "L")):
            raise ValueError(f"need order 1..6, lambda_ >= 0 and k R or L, got {order}, {lambda_} and {k}")
        if lambda_ > 0 and (order > 1 or corrector or k == "L"):
            raise ValueError(f"lambda_ = {lambda_} needs order=1, corrector=false and k=R: those are of the flow")
        self.order, self.corrector, self.lambda_, self.k = order, corrector, float(lambda_), k

    def row(self, n: int) -> Row:
        d, t, s = self.diffusion, self.times[n], self.times[n + 1]
        if self.lambda_ > 0:
            return self.denoised(t, s) if s == 0 else self._stochastic(t, s)
        nodes = self.times[max(0, n - self.order + 1) : n + 1].flip(0)
        closed = len(nodes) == 1 and self.k == "R"
        row = self.denoised(t, s) if closed else Row(d.transition(s, t), self._pulls(nodes, t, s))
        if self.corrector and s > 0:
            row = row._replace(corrections=self._pulls(torch.cat([s[None], nodes]), t, s))
        return row

    def _stochastic(self, t: Tensor, s: Tensor) -> Row:
        d = self.diffusion
        keep, damped = d.transition(s, t), d.damped_transition(s, t, self.lambda_)
        covariance = d.covariance(s) - damped @ d.covariance(t) @ damped.mT
        return Row(keep, ((damped - keep) @ d.root(t),), factor(covariance))

    def _pulls(self, nodes: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        """The C_j of the nodes."""
        found, panels = self._quadrature(nodes, t, s, 2), 2
        while True:
            panels *= 2
            finer = self._quadrature(nodes, t, s, panels)
            if (finer - found).abs().max() <= TOLERANCE * finer.abs().max():
                break
            if panels > 512:
                raise FloatingPointError(f"the coefficients of the step {t:.4g} -> {s:.4g} do not converge")
            found = finer
        d = self.diffusion
        if self.k == "L":  # eps_L = O eps_R at each node
            return (finer @ torch.stack([d.rotation(node) for node in nodes])).unbind()
        i = int((nodes == t).nonzero())  # what a constant noise takes is known, so one point stays exact at every order
        finer[i] += d.root(s) - d.transition(s, t) @ d.root(t) - finer.sum(0)
        return finer.unbind()

    def _quadrature(self, nodes: Tensor, t: Tensor, s: Tensor, panels: int) -> Tensor:
        """int_t^s Psi(s, tau) B_tau [O_tau^T] l_j(tau) dtau, (q, *F, k, k), tau = v^2: B grows like 1 / v at t = 0.

        In equal panels of v, cut at the knots of the diffusion.
        """
        d = self.diffusion
        x, w, _ = gauss_legendre(16)
        knots = d.knots[(s < d.knots) & (d.knots < t)]
        edges = torch.cat([t.sqrt() + (s.sqrt() - t.sqrt()) * torch.linspace(0, 1, panels + 1).double(), knots.sqrt()])
        edges = edges.sort(descending=True).values
        width = edges.diff()[:, None]
        v = (edges[:-1, None] + width * x).flatten()
        tau = v * v
        kernel = d.transition(s, tau) @ d.rate(tau)
        if self.k == "L":
            kernel = kernel @ d.rotation(tau).mT
        weights = (width * w).flatten() * 2 * v
        basis = torch.stack(
            [
                torch.stack([(tau - other) / (node - other) for k, other in enumerate(nodes) if k != j]).prod(0)
                if len(nodes) > 1
                else torch.ones_like(tau)
                for j, node in enumerate(nodes)
            ]
        )
        return torch.tensordot(basis * weights, kernel, 1)
