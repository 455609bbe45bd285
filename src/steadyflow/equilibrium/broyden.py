"""Broyden's method."""

import math

import torch
from torch import Tensor

from steadyflow.equilibrium.solver import Arguments, FixedPointSolver, Map, Update, fill, wide


class Broyden(FixedPointSolver):
    """z_{k+1} = z_k - t H_k g_k,     H_{k+1} = H_k + (s - H_k y) v^T / v^T y,     H_0 = -I,

    with g = f(z) - z, s = z_{k+1} - z_k, y = g_{k+1} - g_k, and v = H_k^T s (good) or v = y (bad): H is an inverse of
    dg/dz that satisfies H y = s. A root finder, so f need not contract; the first step is Picard's. H is kept as -I
    plus `memory` rank-one terms, and starts anew when they are full. An update whose v^T y vanishes is left out.
    Source: Broyden 1965 (both methods, his H is -H here); restarts as in Kelley 1995, chapter 7.

    With `line_search`, an item whose |g| does not fall to (1 - 1e-4 t) of what it was goes back and halves its step t,
    up to `line_search` times (Armijo's rule). Every trial is an iteration, and one that is not finite ends the item.

    Memory: 2 memory B D numbers, in float32 or wider. The solution is z_k itself, not f(z_k).

    Args:
        memory: the rank-one terms kept, memory >= 1.
        update: good or bad.
        line_search: the halvings of a step, 0 for none.
        max_iterations, rtol, atol, compact: see FixedPointSolver.
    """

    returns_image = False

    def __init__(
        self,
        memory: int = 30,
        update: str = "good",
        line_search: int = 0,
        max_iterations: int = 50,
        rtol: float = 1e-4,
        atol: float = 0.0,
        compact: bool = True,
    ):
        super().__init__(max_iterations, rtol, atol, compact)
        if memory < 1 or line_search < 0:
            raise ValueError(f"need memory >= 1 and line_search >= 0, got {memory} and {line_search}")
        if update not in ("good", "bad"):
            raise ValueError(f"update must be good or bad, got {update!r}")
        self.memory, self.update, self.line_search = memory, update, line_search

    def start(self, z0: Tensor) -> Update:
        return _Inverse(self, z0)


class _Inverse(Update):
    """H = -I + sum_i u_i v_i^T, and what each item last accepted."""

    def __init__(self, solver: Broyden, z0: Tensor):
        self.solver = solver
        size, memory = math.prod(z0.shape[1:]), min(solver.memory, solver.max_iterations)
        self.u = z0.new_zeros(len(z0), memory, size, dtype=wide(z0.dtype))
        self.v = torch.zeros_like(self.u)
        self.terms = 0  # of the memory in use
        self.past: list[Tensor] = []  # z, g, |g|, -H g, t and the halvings so far, of the last accepted iterate

    def keep(self, order: Tensor) -> None:
        fill(self.u, order)
        fill(self.v, order)
        self.past = [x[order] for x in self.past]

    def step(self, z: Tensor, g: Tensor, f: Map, args: Arguments) -> Tensor:
        narrow = z.dtype
        z, g = z.to(self.u.dtype), g.to(self.u.dtype)
        size, one = g.norm(dim=1), torch.ones(len(z), device=z.device, dtype=z.dtype)
        if not self.past:
            self.past = [z, g, size, g, one, 0 * one]
            return (z + g).to(narrow)
        z0, g0, size0, d0, t, halvings = self.past
        back = (size > (1 - 1e-4 * t) * size0) & (halvings < self.solver.line_search)
        self._add(z - z0, g - g0, ~back)
        d = torch.where(back[:, None], d0, g - self._low(g, self.u, self.v))
        t = torch.where(back, t / 2, one)
        z, g = torch.where(back[:, None], z0, z), torch.where(back[:, None], g0, g)
        self.past = [z, g, torch.where(back, size0, size), d, t, torch.where(back, halvings + 1, 0)]
        return (z + t[:, None] * d).to(narrow)

    def _low(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """sum_i left_i (right_i^T x), (n, D)."""
        n, terms = len(x), self.terms
        weights = right[:n, :terms] @ x[..., None]
        return (weights.mT @ left[:n, :terms])[:, 0]

    def _add(self, s: Tensor, y: Tensor, accepted: Tensor) -> None:
        n = len(s)
        if self.terms == self.u.shape[1]:
            self.terms = 0
        v = self._low(s, self.v, self.u) - s if self.solver.update == "good" else y
        product = (v * y).sum(1)
        sound = accepted & (product.abs() > 10 * torch.finfo(s.dtype).eps * v.norm(dim=1) * y.norm(dim=1))
        error = s - (self._low(y, self.u, self.v) - y)
        self.u[:n, self.terms] = torch.where(sound[:, None], error / torch.where(sound, product, 1.0)[:, None], 0.0)
        self.v[:n, self.terms] = v
        self.terms += 1
