"""Critically-damped Langevin diffusion."""

import math

import torch
from torch import Tensor

from steadyflow.diffusions.linear import LinearDiffusion, float64, inverse
from steadyflow.paths import Time
from steadyflow.quadrature import gauss_legendre

TINY = 1e-40  # t = 0 is read as this: every formula below has its limit there, and no underflow yet


class CLD(LinearDiffusion):
    """Data x and a velocity v beside it, noise on the velocity alone; u = (x, v), k = 2, and for each coordinate

        F = beta [[0, 1/M], [-1, -Gamma/M]],  G = diag(0, sqrt(2 Gamma beta)),  Gamma^2 = 4 M (critical damping)
        v_0 ~ N(0, gamma M), counted in Sigma_0 = diag(0, gamma M);  u_1 ~ N(0, diag(1, M)) nearly

    With b = beta (t - s), c = 2 b / Gamma:  Psi(t, s) = e^-c [[1 + c, 2 c / Gamma], [-b, 1 - c]].  Sigma_t is gamma M
    psi psi^T, psi the second column of Psi(t, 0), and the share Q of the noise since t = 0, with y = 4 beta t / Gamma

        Q_xx = 1 - e^-y (1 + y + y^2 / 2),  Q_xv = Gamma y^2 e^-y / 4,  Q_vv = M [1 - e^-y (1 - y + y^2 / 2)]

    (forms without cancellation at small t). R = L Rot(theta): the matrix ODE of R comes down to one quadrature,

        d theta / dt = -(beta / M) l_vv / l_xx = -(beta / M) sqrt(det Sigma) / Sigma_xx,  theta(1) = 0,

    by Gauss-Legendre in sqrt(t) on graded panels, exact to 1e-12.
    Source: Dockhorn et al. 2022, Eq. 5-7 and App. B; the sign of F_vx and of G as there, not as thesis Eq. 7.10 prints
    them, whose stationary law is another.

    Args:
        beta: the speed. mass: M. damping: Gamma. initial: gamma, the variance of v_0 in units of M.

    Raises:
        ValueError: parameters that are not positive, or not critical.
    """

    variables = 2

    def __init__(self, beta: float = 4.0, mass: float = 0.25, damping: float = 1.0, initial: float = 0.04):
        if not (min(beta, mass, damping, initial) > 0 and math.isclose(damping**2, 4 * mass, rel_tol=1e-12)):
            raise ValueError(
                "need beta, mass, damping, initial > 0 and damping^2 = 4 mass (critical damping), got "
                f"{beta}, {mass}, {damping}, {initial}; set mass={damping**2 / 4:g} for this damping"
            )
        self.beta, self.mass, self.damping, self.initial = float(beta), float(mass), float(damping), float(initial)
        # theta at the edges of panels in v = sqrt(t), summed from t = 1 down
        self._edges = torch.cat([torch.zeros(1), 2 ** torch.linspace(-20, 0, 81)]).double()
        panels = self._turn(self._edges[:-1], self._edges[1:])
        self._theta = torch.cat([panels.flip(0).cumsum(0).flip(0), torch.zeros(1).double()])

    def drift(self, t: Time) -> Tensor:
        rows = [[0.0, 1 / self.mass], [-1.0, -self.damping / self.mass]]
        return self.beta * self._constant(t, rows)

    def noise(self, t: Time) -> Tensor:
        return self._constant(t, [[0.0, 0.0], [0.0, math.sqrt(2 * self.damping * self.beta)]])

    def transition(self, t: Time, s: Time) -> Tensor:
        b = self.beta * (float64(t) - float64(s))
        c = 2 * b / self.damping
        return torch.exp(-c)[..., None, None] * _block(1 + c, 2 * c / self.damping, -b, 1 - c)

    def covariance(self, t: Time) -> Tensor:
        xx, xv, vv, _ = self._moments(float64(t))
        return _block(xx, xv, xv, vv)

    def cholesky(self, t: Time) -> Tensor:
        xx, xv, _, det = self._moments(float64(t).clamp(min=TINY))
        x = torch.sqrt(xx)
        return _block(x, torch.zeros_like(x), xv / x, torch.sqrt(det) / x)

    def rotation(self, t: Time) -> Tensor:
        theta = self.angle(t)
        cos, sin = torch.cos(theta), torch.sin(theta)
        return _block(cos, -sin, sin, cos)

    def rate(self, t: Time) -> Tensor:
        """(Gamma beta / l_vv) e_v n^T, n = O^T e_v: only v is pulled."""
        t = float64(t)
        pull = self.damping * self.beta / self.cholesky(t)[..., 1, 1]
        row = pull[..., None] * self.rotation(t)[..., 1, :]
        return torch.stack([torch.zeros_like(row), row], -2)

    def angle(self, t: Time) -> Tensor:
        """theta_t."""
        v = float64(t).sqrt()
        edges = self._edges.to(v.device)
        upper = torch.searchsorted(edges, v.contiguous()).clamp(1, len(edges) - 1)
        return self._theta.to(v.device)[upper] + self._turn(v, edges[upper])

    def damped_transition(self, t: Time, s: Time, lambda_: float) -> Tensor:
        """R_t Y R_s^-1, dY / dt = lambda^2 (Gamma beta / l_vv^2) n n^T Y, Y(s) = I, n = O^T e_v.

        By Gauss collocation with 8 stages (order 16) in log t, on panels of 1/4 at most: exact to 1e-11. Below 1e-18 s
        Y would move in its component along n alone, which R_t no longer sees.
        """
        end, start = torch.broadcast_tensors(float64(t), float64(s))
        first, last = (
            start.log(),
            end.clamp(min=1e-18 * start).log(),
        )
        panels = (4 * (first - last)).ceil().long().clamp(min=1)
        y = torch.empty(*end.shape, 2, 2, dtype=torch.float64, device=end.device)
        for count in panels.unique().tolist():
            rows = panels == count
            y[rows] = self._damping(first[rows], last[rows], count, lambda_)
        return self.root(t) @ y @ inverse(self.root(s))

    def _damping(self, first: Tensor, last: Tensor, panels: int, lambda_: float) -> Tensor:
        """Y at log t = last, from Y = I at log t = first; both (N,)."""
        nodes, outer, inner = (v.to(first.device) for v in gauss_legendre(8))
        width = ((last - first) / panels)[:, None, None]
        tau = torch.exp(first[:, None, None] + width * (torch.arange(panels, device=first.device)[:, None] + nodes))
        normal = self.rotation(tau)[..., 1, :]
        strength = width * lambda_**2 * self.damping * self.beta * tau / self.cholesky(tau)[..., 1, 1] ** 2
        m = strength[..., None, None] * normal[..., :, None] * normal[..., None, :]  # (N, P, 8, 2, 2)
        # stages K_i = M_i (I + sum_j a_ij K_j), one linear system a panel; Y_1 = I + sum_i b_i K_i
        system = torch.einsum("ij,npiab->npiajb", inner, m).flatten(-4, -3).flatten(-2, -1)
        system = torch.eye(16, dtype=torch.float64, device=m.device) - system
        stages = torch.linalg.solve(system, m.flatten(-3, -2)).unflatten(-2, (8, 2))
        steps = torch.eye(2, dtype=torch.float64, device=m.device) + torch.einsum("i,npiab->npab", outer, stages)
        y = steps[:, 0]
        for p in range(1, panels):
            y = steps[:, p] @ y
        return y

    def _moments(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sigma_xx, Sigma_xv, Sigma_vv and det Sigma."""
        y = 4 * self.beta * t / self.damping
        decay = torch.exp(-y)
        qxx = torch.special.gammainc(torch.full_like(y, 3.0), y)
        qxv = 0.25 * self.damping * y * y * decay
        qvv = self.mass * (-torch.expm1(-y) + decay * y * (1 - 0.5 * y))
        c, half = 0.5 * y, torch.exp(-0.5 * y)
        x, v = half * 2 * c / self.damping, half * (1 - c)  # psi
        start = self.initial * self.mass
        det = qxx * qvv - qxv**2 + start * (qvv * x * x - 2 * qxv * x * v + qxx * v * v)
        return qxx + start * x * x, qxv + start * x * v, qvv + start * v * v, det

    def _turn(self, low: Tensor, high: Tensor) -> Tensor:
        """theta(low^2) - theta(high^2): 20 Gauss nodes in v = sqrt(t)."""
        nodes, weights, _ = (v.to(low.device) for v in gauss_legendre(20))
        v = low[..., None] + (high - low)[..., None] * nodes
        xx, _, _, det = self._moments((v * v).clamp(min=TINY))
        rate = 2 * v * (self.beta / self.mass) * torch.sqrt(det) / xx
        return (high - low) * (rate * weights).sum(-1)

    def _constant(self, t: Time, rows: list[list[float]]) -> Tensor:
        t = float64(t)
        return torch.tensor(rows, dtype=torch.float64, device=t.device).expand(*t.shape, 2, 2)


def _block(xx: Tensor, xv: Tensor, vx: Tensor, vv: Tensor) -> Tensor:
    """[[xx, xv], [vx, vv]]."""
    return torch.stack([torch.stack([xx, xv], -1), torch.stack([vx, vv], -1)], -2)
