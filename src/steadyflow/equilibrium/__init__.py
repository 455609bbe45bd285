"""Fixed points z = f(z, *args) of batched maps: solvers, and gradients through the solution."""

from steadyflow.equilibrium.anderson import Anderson
from steadyflow.equilibrium.picard import Picard
from steadyflow.equilibrium.solver import FixedPointSolver, Solution, Status

__all__ = ["Anderson", "FixedPointSolver", "Picard", "Solution", "Status"]
