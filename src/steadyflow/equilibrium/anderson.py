"""Anderson acceleration."""

import math

import torch
from torch import Tensor

from steadyflow.equilibrium.solver import Arguments, FixedPointSolver, Map, Update, fill

MIXINGS = ("item", "state", "causal")


class Anderson(FixedPointSolver):
    """z_{k+1} = z_k + beta g_k - (DZ_k + beta DG_k) gamma_k,     gamma_k = argmin |g_k - DG_k gamma|^2 + penalty,

    with g_k = f(z_k) - z_k, and DZ_k, DG_k the differences of the last m + 1 iterates and of their g, as columns.
    The penalty is ridge sum_i |DG_i|^2 gamma_i^2: relative to the Gram matrix' diagonal, so that neither the units of z
    nor a fast fall of the residual changes what it does. The normal equations, of unit diagonal, are formed and solved
    in float64. On a linear map it is equivalent to GMRES: exact after D + 1 evaluations when m >= D.
    Source: Anderson 1965, section 4; in this unconstrained form, with beta = 1, Walker & Ni 2011, section 2.

    With z (B, T, ...) a trajectory, `mixing` says what one gamma mixes:
        item    the whole item;
        state   each z[:, t] by itself, fitted to its own g (the thesis' DEQ-DDIM, 3.4);
        causal  each z[:, t] by itself, fitted to the g of states 0..t, and not at all (gamma = 0) once states 0..t-1
                are exact to rounding: where f_t depends on earlier states only, states 0..k-1 are exact after k
                evaluations, as with Picard (triangular Anderson: Tang et al. 2024, ParaTAA).

    Memory: 2 m B D numbers in z0's dtype.

    Args:
        m: the history, m >= 1 differences.
        beta: the mixing, beta > 0.
        ridge: the relative penalty, ridge >= 0.
        restart: an item whose |g| exceeds `restart` times its smallest since the last restart forgets its history and
            goes on with a damped step; None: never. Values of 1 or less restart at every rise.
        mixing: item, state or causal.
        max_iterations, rtol, atol, compact: see FixedPointSolver.
    """

    def __init__(
        self,
        m: int = 5,
        beta: float = 1.0,
        ridge: float = 1e-10,
        restart: float | None = None,
        mixing: str = "item",
        max_iterations: int = 50,
        rtol: float = 1e-4,
        atol: float = 0.0,
        compact: bool = True,
    ):
        super().__init__(max_iterations, rtol, atol, compact)
        if m < 1 or not beta > 0 or ridge < 0 or (restart is not None and not restart > 0):
            raise ValueError(f"need m >= 1, beta > 0, ridge >= 0, restart > 0; got {m}, {beta}, {ridge}, {restart}")
        if mixing not in MIXINGS:
            raise ValueError(f"mixing must be one of {', '.join(MIXINGS)}, got {mixing!r}")
        self.m, self.beta, self.ridge, self.restart, self.mixing = m, float(beta), float(ridge), restart, mixing

    def start(self, z0: Tensor) -> Update:
        if self.mixing != "item" and z0.ndim < 2:
            raise ValueError(f"mixing={self.mixing} needs z0 (B, T, ...), got shape {tuple(z0.shape)}")
        return _History(self, z0)


class _History(Update):
    """The columns of DG and of DZ + beta DG, (B, T, m, d) each, and DG's Gram matrices; T = 1 for mixing=item."""

    def __init__(self, solver: Anderson, z0: Tensor):
        self.solver = solver
        batch, states = len(z0), 1 if solver.mixing == "item" else z0.shape[1]
        d = math.prod(z0.shape[1:]) // states
        self.m = min(solver.m, solver.max_iterations)
        self.dg = z0.new_empty(batch, states, self.m, d)
        self.move = torch.empty_like(self.dg)
        self.gram = z0.new_zeros(batch, states, self.m, self.m, dtype=torch.float64)
        self.valid = z0.new_zeros(batch, 1, self.m, dtype=torch.bool)  # all the columns, but for restarts
        self.lowest = z0.new_zeros(batch, dtype=torch.float64)  # |g|, since the last restart
        self.count = 0  # of the columns made so far; the next goes to slot count % m
        self.z: Tensor | None = None
        self.g: Tensor | None = None
        self.slid = False

    def keep(self, order: Tensor) -> None:
        for memory in (self.dg, self.move, self.gram, self.valid, self.lowest):
            fill(memory, order)
        if self.z is not None and self.g is not None:
            self.z, self.g = self.z[order], self.g[order]

    def slide(self, by: Tensor, states: int) -> None:
        """States that are new have no differences yet: columns of zero, and NaN for their iterate before."""
        n, single, self.slid = len(by), self.dg.shape[1] == 1, True
        source = torch.arange(states, device=by.device) + by[:, None]
        known, source = source < states, source.clamp(max=states - 1)
        row = torch.arange(n, device=by.device)[:, None]

        def moved(x: Tensor, new: float) -> Tensor:  # x (n, states, ...)
            return torch.where(known.view(n, states, *[1] * (x.ndim - 2)), x[row, source], new)

        for memory in (self.dg, self.move):
            if single:  # (n, 1, m, states d)
                columns = memory[:n, 0].unflatten(2, (states, -1)).transpose(1, 2)
                memory[:n, 0] = moved(columns, 0.0).transpose(1, 2).flatten(2)
            else:
                memory[:n] = moved(memory[:n], 0.0)
        made = self.dg[:n, :, : min(self.count, self.m)].double()
        self.gram[:n, :, : made.shape[2], : made.shape[2]] = made @ made.mT
        if self.z is not None and self.g is not None:
            self.z, self.g = (moved(x.view(n, states, -1), math.nan).view(n, -1) for x in (self.z, self.g))

    def step(self, z: Tensor, g: Tensor, f: Map, args: Arguments) -> Tensor:
        n, states, d = len(z), self.dg.shape[1], self.dg.shape[3]

        def flat(x: Tensor) -> Tensor:
            return x.view(n, states, d)

        plain = z.add(g, alpha=self.solver.beta)
        before, self.z, self.g = (self.z, self.g), z, g
        if before[0] is None or before[1] is None:
            self.lowest = torch.linalg.vector_norm(g, dim=1, dtype=torch.float64)
            return plain
        slot, columns = self.count % self.m, min(self.count + 1, self.m)
        self.count += 1
        dg = torch.sub(flat(g), flat(before[1]), out=self.dg[:n, :, slot])
        move = torch.sub(flat(z), flat(before[0]), out=self.move[:n, :, slot]).add_(dg, alpha=self.solver.beta)
        if self.slid:  # nothing came before a new state
            for new in (dg, move):
                new.masked_fill_(new.isnan(), 0.0)
        self.valid[:n, :, slot] = True
        if self.solver.restart is not None:
            self._forget(g, self.solver.restart)

        known = self.dg[:n, :, :columns]
        product = inner(known.flatten(0, 1), dg.flatten(0, 1), g.view(-1, d)).unflatten(0, (n, states))
        self.gram[:n, :, slot, :columns] = self.gram[:n, :, :columns, slot] = product[..., 0]
        gamma = self._solve(self.gram[:n, :, :columns, :columns], product[..., 1], self.valid[:n, :, :columns])
        if self.solver.mixing == "causal":
            size, length = (earlier(flat(x)) for x in (z, g))
            gamma = torch.where((length <= 8 * torch.finfo(z.dtype).eps * size)[..., None], 0.0, gamma)
        move = self.move[:n, :, :columns].flatten(0, 1)
        plain.view(-1, 1, d).baddbmm_(gamma.to(z.dtype).view(-1, 1, columns), move, alpha=-1)
        return plain

    def _solve(self, gram: Tensor, right: Tensor, valid: Tensor) -> Tensor:
        """gamma (n, T, columns) of the normal equations with unit diagonal."""
        if self.solver.mixing == "causal":
            gram, right = gram.cumsum(1), right.cumsum(1)
        length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        scale = torch.where(valid & (length > 0), 1 / length, 0.0)
        system = gram * scale[..., :, None] * scale[..., None, :]
        # a column of no length has a zero row and the right side 0: its gamma is 0
        system.diagonal(dim1=-2, dim2=-1).copy_(torch.full_like(scale, 1 + max(self.solver.ridge, 1e-15)))
        factor, _ = torch.linalg.cholesky_ex(system)
        return torch.cholesky_solve((right * scale)[..., None], factor)[..., 0] * scale

    def _forget(self, g: Tensor, restart: float) -> None:
        n = len(g)
        size = torch.linalg.vector_norm(g, dim=1, dtype=torch.float64)
        rose = size > restart * self.lowest[:n]
        self.valid[:n] &= ~rose[:, None, None]
        self.lowest[:n] = torch.where(rose, size, torch.minimum(size, self.lowest[:n]))


def inner(columns: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The inner products in float64, (N, c, 2), of the columns (N, c, d) with a and with b, (N, d).

    Block by block: a copy of the whole history in float64 would cost its memory, and most of the time on a CPU.
    """
    count, c, d = columns.shape
    block = 1 << (18 if columns.device.type == "cpu" else 24)  # numbers, on a CPU no more than its cache holds
    rows, width = max(1, block // (c * d)), max(1, min(d, block // c))
    out = columns.new_zeros(count, c, 2, dtype=torch.float64)
    for i in range(0, count, rows):
        for j in range(0, d, width):
            at = slice(i, i + rows), slice(j, j + width)
            right = torch.stack([a[at], b[at]], dim=1).double()
            out[at[0]] += columns[at[0], :, at[1]].double() @ right.mT
    return out


def earlier(x: Tensor) -> Tensor:
    """|x[:, :t]| for each t, (n, T), from x (n, T, d)."""
    squares = torch.linalg.vector_norm(x, dim=2, dtype=torch.float64).square()
    return torch.nn.functional.pad(squares.cumsum(1)[:, :-1], (1, 0)).sqrt()
