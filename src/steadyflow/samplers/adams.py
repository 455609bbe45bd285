"""The coefficients of exponential Adams methods: integrals of Lagrange polynomials, by Gauss-Legendre quadrature."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from steadyflow.paths import GaussianPath
from steadyflow.quadrature import gauss_legendre

Variable = Literal["t", "rho", "log_rho"]
NODES = (64, 96)  # of a smooth stretch: the second is used, the first tells its error


def adams_integrals(
    path: GaussianPath,
    times: Tensor,
    offsets: Sequence[int],
    variable: Variable,
    rate: Callable[[Tensor, Tensor], Tensor] | None = None,
    lower_final: bool = False,
) -> tuple[Tensor, Tensor]:
    """The integrals of the Lagrange basis over each step t_n -> t_{n+1} of a grid, against a measure m_n:

        W_nj = int_{rho_n}^{rho_{n+1}} L_nj(v(rho)) m_n'(rho) d rho,   L_nj = prod_{k != j} (v - v_k) / (v_j - v_k)

    in the variable v = t, rho or log rho, rho = sigma / alpha; the nodes of step n are t_n and, for each of the
    offsets o, t_{n-o}. A node before the grid, or at an infinite v, is left out, and the degree is lower by one. So it
    is 0 on the first step, and in log rho on a step to rho = 0. Only the nodes after the first are returned: L_n0 is
    what is missing to 1.

    In log rho, in which every path here is analytic in a strip of half width pi / 2 or more, 64 nodes are exact to
    rounding for steps of a factor e^10 in rho; a step to rho = 0 is integrated in rho. A path with knots, where a
    derivative jumps, is integrated from knot to knot.

    Args:
        path: the Gaussian path.
        times: t_0 > ... > t_N.
        offsets: of the nodes beside t_n: (1, 2) for degree 2; -1 is t_{n+1}, the node of a corrector.
        variable: v.
        rate: m_n'(rho) from rho (S, K) and n (S, 1); by default 1, that is m = rho.
        lower_final: leave out t_{n-o} in the last o steps, so that the last step has degree 0 and the one before 1.

    Returns:
        W (N, len(offsets)), 0 for nodes left out, and an estimate (N,) of the quadrature's absolute error in it.
    """
    rho, count = path.ratio(times), len(times) - 1
    v = {"t": times, "rho": rho, "log_rho": rho.log()}[variable]
    node = torch.arange(count).unsqueeze(1) - torch.tensor([0, *offsets])
    left = count - 1 - torch.arange(count).unsqueeze(1)
    valid = (
        (node >= 0)
        & (~torch.tensor(lower_final) | (torch.tensor([0, *offsets]) <= left))
        & v[node.clamp(min=0)].isfinite()
    )
    valid &= (
        valid[:, :1] & (v[1:].isfinite() if variable == "log_rho" else torch.ones(count, dtype=torch.bool))[:, None]
    )
    if not valid[:, 1:].any():
        return rho.new_zeros(count, len(offsets)), rho.new_zeros(count)
    steps, first, last = _stretches(path, times, rho, valid[:, 1:].any(1))
    values = v[node.clamp(min=0)]

    def integrate(nodes: int) -> Tensor:
        u, weight, _ = gauss_legendre(nodes)
        a, b = first.unsqueeze(1), last.unsqueeze(1)
        geometric = (b / a) ** u  # rho = a (b / a)^u, or a (1 - u) to rho = 0
        at = torch.where(b > 0, a * geometric, a * (1 - u))
        measure = torch.where(b > 0, at * (b / a).log(), -a) * weight
        if rate is not None:
            measure = measure * rate(at, steps.unsqueeze(1))
        x = {"t": path.time_at, "rho": lambda r: r, "log_rho": torch.log}[variable](at)
        parts = []
        for j in range(1, node.shape[1]):
            basis = torch.ones_like(x)
            for k in range(node.shape[1]):
                v_k, v_j = values[steps, k].unsqueeze(1), values[steps, j].unsqueeze(1)
                if k != j:
                    basis = torch.where(valid[steps, k, None], basis * (x - v_k) / (v_j - v_k), basis)
            parts.append(torch.where(valid[steps, j], (basis * measure).sum(1), 0.0))
        return rho.new_zeros(count, len(offsets)).index_add(0, steps, torch.stack(parts, 1))

    coarse, fine = (integrate(nodes) for nodes in NODES)
    return fine, (fine - coarse).abs().amax(1)


def _stretches(path: GaussianPath, times: Tensor, rho: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The smooth stretches of the wanted steps, cut at the knots of the path: the step of each (S,), and rho at its
    first and last end."""
    cuts = path.knots[(path.knots < times[0]) & (path.knots > times[-1])].flip(0)
    cuts = cuts[~torch.isin(cuts, times)]
    at = torch.cat([times, cuts])
    order = at.argsort(descending=True)
    at, ratio = at[order], torch.cat([rho, path.ratio(cuts)])[order]
    steps = torch.searchsorted(-times, -at[:-1], right=True) - 1
    keep = wanted[steps]
    return steps[keep], ratio[:-1][keep], ratio[1:][keep]
