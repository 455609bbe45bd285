"""Newton's method with GMRES."""

import torch
from torch import Tensor

from steadyflow.equilibrium.solver import Arguments, FixedPointSolver, Map, Update, wide


class NewtonKrylov(FixedPointSolver):
    """z_{k+1} = z_k + d,     d = argmin |g_k - (I - J) d| over the Krylov space of (I - J, g_k) of dimension `krylov`,

    with g = f(z) - z and J = df/dz(z_k), seen only through products J v. With krylov >= D this is Newton's method, of
    quadratic order near a solution; it needs no contraction. For small systems: an iteration costs 1 + krylov
    evaluations of f, all of them for every item, so that items do not depend on one another.
    Source: Saad & Schultz 1986 (GMRES); Knoll & Keyes 2004 (Jacobian-free Newton-Krylov).

    Memory: krylov B D numbers, in float32 or wider. The solution is z_k itself, not f(z_k).

    Args:
        krylov: dimension of the Krylov space, krylov >= 1.
        products: forward (torch.func.jvp: f must support forward-mode differentiation) or difference
            ((f(z + h v) - f(z)) / h with h = sqrt(eps) (1 + |z|) / |v|: any f, in float32 or wider).
        max_iterations, rtol, atol, compact: see FixedPointSolver; max_iterations counts Newton steps.
    """

    returns_image = False

    def __init__(
        self,
        krylov: int = 20,
        products: str = "forward",
        max_iterations: int = 20,
        rtol: float = 1e-4,
        atol: float = 0.0,
        compact: bool = True,
    ):
        super().__init__(max_iterations, rtol, atol, compact)
        if krylov < 1:
            raise ValueError(f"need krylov >= 1, got {krylov}")
        if products not in ("forward", "difference"):
            raise ValueError(f"products must be forward or difference, got {products!r}")
        self.krylov, self.products = krylov, products

    def start(self, z0: Tensor) -> Update:
        return _Newton(self)


class _Newton(Update):
    def __init__(self, solver: NewtonKrylov):
        self.solver = solver

    def step(self, z: Tensor, g: Tensor, f: Map, args: Arguments) -> Tensor:
        def product(v: Tensor) -> Tensor:
            v = v.to(z.dtype)
            if self.solver.products == "forward":
                return torch.func.jvp(lambda z: f(z, *args), (z,), (v,))[1].detach()
            h = torch.finfo(z.dtype).eps ** 0.5 * (1 + z.norm(dim=1, keepdim=True))  # the Krylov vectors have length 1
            return (f(z + h * v, *args).detach() - (z + g)) / h

        return z + self._gmres(product, g.to(wide(z.dtype))).to(z.dtype)

    def _gmres(self, product: Map, g: Tensor) -> Tensor:
        """d (n, D): Arnoldi's basis of the Krylov space, orthogonalised twice, then a small least-squares problem."""
        n, size = g.shape
        steps = min(self.solver.krylov, size)
        basis = g.new_zeros(n, steps + 1, size)
        hessenberg = g.new_zeros(n, steps + 1, steps, dtype=torch.float64)
        length = g.norm(dim=1, keepdim=True)
        basis[:, 0] = torch.where(length > 0, g / length, 0.0)
        for j in range(steps):
            v = basis[:, j].clone()
            w = v - product(v).to(v.dtype)
            whole = w.norm(dim=1, keepdim=True)
            for _ in range(2):
                weights = basis[:, : j + 1] @ w[..., None]
                hessenberg[:, : j + 1, j] += weights[..., 0]
                w = w - (weights.mT @ basis[:, : j + 1])[:, 0]
            rest = w.norm(dim=1, keepdim=True)
            # otherwise the space is complete: the rest is rounding
            fresh = rest > 10 * torch.finfo(w.dtype).eps * whole
            hessenberg[:, j + 1, j] = torch.where(fresh, rest, 0.0)[:, 0]
            basis[:, j + 1] = torch.where(fresh, w / rest, 0.0)
        right = torch.zeros_like(hessenberg[:, :, :1])
        right[:, 0] = length
        finite = hessenberg.isfinite().flatten(1).all(1)[:, None, None]
        weights = torch.linalg.pinv(torch.where(finite, hessenberg, 0.0), rtol=1e-13) @ right
        weights = torch.where(finite, weights, torch.nan)  # a product that is not finite must not pass unseen
        return (weights.mT.to(g.dtype) @ basis[:, :steps])[:, 0]
