"""steadyflow: experiments with diffusion models, flows, equilibrium models and neural SDEs."""
