"""steadyflow: experiments with diffusion models, flows, equilibrium models and neural SDEs."""

__version__ = "0.1.0"
