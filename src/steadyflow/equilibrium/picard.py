"""Picard's fixed-point iteration."""

from torch import Tensor

from steadyflow.equilibrium.solver import Arguments, FixedPointSolver, Map, Update


class Picard(FixedPointSolver):
    """z_{k+1} = z_k + damping (f(z_k) - z_k).

    Converges for a contraction, by the factor max |1 - damping (1 - lambda)| over the eigenvalues lambda of df/dz;
    damping < 1 turns some maps with eigenvalues below -1 into contractions. Memory: none.

    Args:
        damping: 0 < damping; 1 is the plain iteration.
        max_iterations, rtol, atol, compact: see FixedPointSolver.
    """

    def __init__(
        self,
        damping: float = 1.0,
        max_iterations: int = 50,
        rtol: float = 1e-4,
        atol: float = 0.0,
        compact: bool = True,
    ):
        super().__init__(max_iterations, rtol, atol, compact)
        if not damping > 0:
            raise ValueError(f"need damping > 0, got {damping}")
        self.damping = float(damping)

    def start(self, z0: Tensor) -> Update:
        return _Damped(self.damping)


class _Damped(Update):
    def __init__(self, damping: float):
        self.damping = damping

    def step(self, z: Tensor, g: Tensor, f: Map, args: Arguments) -> Tensor:
        return z.add(g, alpha=self.damping)
