"""Inversion through the equilibrium of the whole trajectory."""

import math

import torch
from torch import Tensor

from steadyflow.equilibrium import Equilibrium, FixedPointSolver, Gradient, Implicit, Phantom, Picard
from steadyflow.inversion.chain import Chain, squared_distance
from steadyflow.inversion.descent import Descent
from steadyflow.samplers.trajectory import Transport

GRADIENTS = ("one_step", "phantom", "ift")


class DEQInversion(Descent):
    """Adam along a gradient through the fixed-point map F of the trajectory z = (x_1, ..., x_N), at its equilibrium z*:

        z* = F(z*; x_T),   z' = tau F(z*; x_T) + (1 - tau) z*,   g = d |z'_N - x*|^2 / dx_T   with z* held fixed

    which with one step of F (`Transport`) is one vector-Jacobian product of the sampler's first step alone, since x_T
    enters F_N nowhere else, whatever N is:

        g = 2 tau (c_N / c_1) J^T (x_N - x*),   J = d step_0 / d x_T

    Where there is little signal J is near a multiple of I, and g near one of x_N - x*: the residual itself. It is not
    the gradient of L, J_0^T ... J_{N-1}^T 2 (x_N - x*), and that is its virtue: to first order, descent along it has
    the condition number of the chain's Jacobian, descent along the gradient the square of it.

    Algorithm 4 of the source hands all of z to the optimiser and returns x_T. But z is a function of x_T at the
    equilibrium, and where the solver starts has no say in it, so x_T alone is optimised here; the other states are the
    solver's, which goes on from those of the last epoch (`warm`).

    A solver that stops early (configs/method/deq_sweep.yaml: one sweep an epoch) lags behind x_T, and so does the loss
    it sees; it bears no large lr. A loss at or below the threshold is therefore measured again on the sampler's own
    steps, from which the solver then goes on, so that no image leaves on a loss that is not its latent's. The public
    code of the source lets the gradient through the linear term of x_T alone.

    gradient=phantom takes `phantom_steps` damped steps of F and differentiates all of them; gradient=ift is the exact
    gradient of L, by the implicit function theorem. Each costs N evaluations for each step of F.
    Source: Pokle 2025, Algorithms 2-4, Eq. 3.15-3.18; with a stochastic sampler (DEQ-sDDIM), Eq. 3.11-3.13.

    Args:
        solver: of the equilibrium. None takes the sampler's steps one after another (F is triangular): exact, and of N
            evaluations, as many as one iteration of a solver, which takes them as one call for all states in parallel.
        gradient: one_step, phantom or ift.
        tau: the damping of one_step (which Adam undoes) and of phantom, 0 < tau <= 1.
        phantom_steps: >= 1.
        variance: of the map F, see `Transport`; infinite is the thesis' map.
        warm: whether a solve starts from the last epoch's trajectory, or from x_T in every state.
        max_batch: rows a denoiser call takes; None: all B N.
        lr, epochs, threshold, budget, clock, start: see Descent.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        solver: FixedPointSolver | None = None,
        gradient: str = "one_step",
        tau: float = 0.1,
        phantom_steps: int = 5,
        variance: float | None = 0.25,
        warm: bool = True,
        max_batch: int | None = None,
        lr: float = 0.01,
        epochs: int = 400,
        threshold: float = 0.5,
        budget: float | None = None,
        clock: str = "wall",
        start: str = "noise",
    ):
        super().__init__(lr, epochs, threshold, budget, clock, start)
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be {', '.join(GRADIENTS[:-1])} or {GRADIENTS[-1]}, got {gradient!r}")
        if not 0 < tau <= 1:
            raise ValueError(f"need 0 < tau <= 1, got {tau}")
        self.solver, self.tau, self.variance, self.warm, self.max_batch = solver, float(tau), variance, warm, max_batch
        self.exact = solver is None
        self.through: Gradient | None = None
        if gradient == "phantom":
            self.through = Phantom(self.tau, phantom_steps)
        elif gradient == "ift":
            self.through = Implicit(Picard(max_iterations=1001, rtol=1e-5))  # exact after N: F is triangular

    def gradient(
        self, chain: Chain, x: Tensor, target: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        trajectory = Transport(chain.sampler, self.variance, self.max_batch)
        solver: FixedPointSolver = Picard(max_iterations=1, rtol=math.inf)  # what is one already passes
        if self.solver is not None:
            solver, guess = self.solver, trajectory.initial(chain.denoiser, x) if memory is None else memory
        else:
            guess = chain.states(x)
        f, rest = trajectory.bind(chain.denoiser, chain.condition), (chain.noises, *chain.condition.values())
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            if self.through is None:
                z = guess if self.solver is None else solver(f, guess, x, *rest).z
                loss, z = self._checked(chain, x, target, z)
                onward = 2 * self.tau * float(trajectory.scale[-1] / trajectory.scale[0]) * (z[:, -1] - target)
                (g,) = torch.autograd.grad(chain.step(0, x), x, onward)
            else:
                z = Equilibrium(solver, self.through)(f, guess, x, *rest).z
                (g,) = torch.autograd.grad(squared_distance(z[:, -1], target).sum(), x)
                loss, z = self._checked(chain, x, target, z.detach())
        return loss, g, z if self.warm and self.solver is not None else None

    def _checked(self, chain: Chain, x: Tensor, target: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of the trajectories, and these: the sampler's own where the loss would end the search."""
        loss = squared_distance(z[:, -1], target)
        near = (loss <= self.threshold).nonzero()[:, 0]
        if not self.exact and len(near):
            z = z.index_copy(0, near, chain.rows(near).states(x.detach()[near]))
            loss = squared_distance(z[:, -1], target)
        return loss, z
