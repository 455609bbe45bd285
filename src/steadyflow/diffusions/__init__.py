"""Linear diffusions du = F_t u dt + G_t dw: critically-damped Langevin, blurring, and any Gaussian path as one."""

from steadyflow.diffusions.cld import CLD
from steadyflow.diffusions.diagonal import BDM, Isotropic
from steadyflow.diffusions.linear import LinearDiffusion

__all__ = ["BDM", "CLD", "Isotropic", "LinearDiffusion"]
