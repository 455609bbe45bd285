"""Fixed points z = f(z, *args) of batched maps: solvers, and gradients through the solution."""

from steadyflow.equilibrium.anderson import Anderson
from steadyflow.equilibrium.broyden import Broyden
from steadyflow.equilibrium.gradients import Equilibrium, Gradient, Implicit, OneStep, Phantom, Unrolled
from steadyflow.equilibrium.losses import correction_loss, jacobian_penalty, normalise
from steadyflow.equilibrium.newton_krylov import NewtonKrylov
from steadyflow.equilibrium.picard import Picard
from steadyflow.equilibrium.solver import FixedPointSolver, Solution, Status

__all__ = [
    "Anderson",
    "Broyden",
    "Equilibrium",
    "FixedPointSolver",
    "Gradient",
    "Implicit",
    "NewtonKrylov",
    "OneStep",
    "Phantom",
    "Picard",
    "Solution",
    "Status",
    "Unrolled",
    "correction_loss",
    "jacobian_penalty",
    "normalise",
]
