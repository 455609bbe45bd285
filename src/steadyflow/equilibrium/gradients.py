"""Gradients through a fixed point."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from steadyflow.equilibrium.solver import Callback, FixedPointSolver, Map, Norm, Solution, Status, euclidean


class Gradient(ABC):
    """What the backward pass of z* = f(z*, *args) does. Gradients reach args and whatever f closes over, not z0."""

    @abstractmethod
    def __call__(
        self,
        solver: FixedPointSolver,
        f: Map,
        z0: Tensor,
        *args: Tensor | None,
        norm: Norm | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """A solution of z = f(z, *args) whose z carries the gradient."""


class Equilibrium(nn.Module):
    """z* = f(z*, *args) by `solver` forwards, by `gradient` backwards.

    Where autograd is off, `solver` alone runs, whatever the gradient. Row b of f(z, *args) may depend on row b of z
    and args only, as for every solver.
    """

    def __init__(self, solver: FixedPointSolver, gradient: Gradient):
        super().__init__()
        self.solver, self.gradient = solver, gradient

    def forward(
        self, f: Map, z0: Tensor, *args: Tensor | None, norm: Norm | None = None, callback: Callback | None = None
    ) -> Solution:
        """See FixedPointSolver.__call__."""
        if not torch.is_grad_enabled():
            return self.solver(f, z0, *args, norm=norm, callback=callback)
        return self.gradient(self.solver, f, z0, *args, norm=norm, callback=callback)


class Implicit(Gradient):
    """dL/dtheta = u^T df/dtheta(z*),     u = J^T u + dL/dz*,     J = df/dz(z*)     (the implicit function theorem)

    The exact gradient at an exact fixed point. The linear system is itself a fixed-point problem, solved per item by
    `solver` from u = dL/dz*, with that solver's tolerance and cap. The graph of one evaluation of f is kept between
    the passes, however many iterations either takes; z is the solver's own. Not differentiable twice. A NewtonKrylov
    needs products=difference here.
    A compiled f must allow a second pass over its graph (torch._functorch.config.donated_buffer = False).
    Source: Bai et al. 2019, Theorem 1; thesis Eq. 2.3, 2.4.

    Warns when the linear system stays unsolved: the gradient is then that of the best iterate.
    """

    def __init__(self, solver: FixedPointSolver):
        self.solver = solver

    def __call__(
        self,
        solver: FixedPointSolver,
        f: Map,
        z0: Tensor,
        *args: Tensor | None,
        norm: Norm | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        solution = solver(f, z0, *args, norm=norm, callback=callback)
        z = solution.z.detach().requires_grad_()
        image = f(z, *args).to(z.dtype)
        if not image.requires_grad:
            return solution
        return replace(solution, z=_Adjoint.apply(image, solution.z, lambda grad: self._solve(z, image, grad)))

    def _solve(self, z: Tensor, image: Tensor, grad: Tensor) -> Tensor:
        """u (B, *S)."""

        def transposed(u: Tensor, rows: Tensor, grad: Tensor) -> Tensor:
            if len(rows) < len(z):  # some items have left; f's graph still has all
                u = torch.zeros_like(z).index_copy_(0, rows, u)
            (product,) = torch.autograd.grad(image, z, u, retain_graph=True, materialize_grads=True)
            return grad + (product[rows] if len(rows) < len(z) else product)

        rows = torch.arange(len(z), device=z.device)
        solution = self.solver(transposed, grad, rows, grad)
        stuck = ((solution.status == Status.CAP) | (solution.status == Status.CYCLE)).nonzero().squeeze(1).tolist()
        if stuck:
            warnings.warn(
                f"Implicit: the linear system of {len(stuck)} of {len(z)} items is not solved after "
                f"{self.solver.max_iterations} iterations; item {stuck[0]} has relative residual "
                f"{float(solution.residual[:, stuck[0]].min()):.3g}, the tolerance is {self.solver.rtol:.3g}",
                stacklevel=2,
            )
        return solution.z


class _Adjoint(torch.autograd.Function):
    """Passes z on, and hands `image` the solution of the adjoint system as its gradient."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, z: Tensor, solve: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve = solve
        return z.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.solve(grad), None, None


class Phantom(Gradient):
    """z <- (1 - tau) z + tau f(z), `steps` times from z*, differentiated as it stands.

    Backwards this is the Neumann series of the implicit gradient for the damped map, cut after `steps` terms:

        u = tau sum_{i < steps} ((1 - tau) I + tau J^T)^i dL/dz      (at an exact fixed point)

    z is the last of these iterates. Memory: `steps` graphs of f, whatever the solver's iterations.
    Source: Geng et al. 2021 (phantom gradients); thesis Eq. 2.5.

    Args:
        tau: the damping, 0 < tau <= 1.
        steps: the number of evaluations, steps >= 1.
    """

    def __init__(self, tau: float = 1.0, steps: int = 5):
        if not 0 < tau <= 1 or steps < 1:
            raise ValueError(f"need 0 < tau <= 1 and steps >= 1, got {tau} and {steps}")
        self.tau, self.steps = float(tau), steps

    def __call__(
        self,
        solver: FixedPointSolver,
        f: Map,
        z0: Tensor,
        *args: Tensor | None,
        norm: Norm | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        solution = solver(f, z0, *args, norm=norm, callback=callback)
        return replace(solution, z=self.attach(f, solution.z, *args))

    def attach(self, f: Map, z: Tensor, *args: Tensor | None) -> Tensor:
        """The damped steps from z (B, *S), an iterate of any solve, with their graph."""
        z = z.detach()
        for _ in range(self.steps):
            z = torch.lerp(z, f(z, *args).to(z.dtype), self.tau)
        return z


class OneStep(Phantom):
    """z = tau f(z*) + (1 - tau) z*: the phantom gradient of one step, dL/dtheta = tau dL/dz df/dtheta(z*).

    tau = 1 is the Jacobian-free gradient (Fung et al. 2022); the thesis inverts DEQ-DDIM with tau = 0.1.
    Source: thesis Eq. 3.18.
    """

    def __init__(self, tau: float = 1.0):
        super().__init__(tau, steps=1)


class Unrolled(Gradient):
    """z_K of z_{k+1} = f(z_k), K = `steps`, differentiated step by step, to z0 as well. The solver gives its tolerances
    only: they decide the status.

    Memory: K graphs of f; with `checkpoint`, K states and one graph, for one more evaluation a step.
    """

    def __init__(self, steps: int, checkpoint: bool = False):
        if steps < 1:
            raise ValueError(f"need steps >= 1, got {steps}")
        self.steps, self.checkpoint = steps, checkpoint

    def __call__(
        self,
        solver: FixedPointSolver,
        f: Map,
        z0: Tensor,
        *args: Tensor | None,
        norm: Norm | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        z, norm, residuals = z0, norm or euclidean, []
        rows = torch.arange(len(z0), device=z0.device)
        for k in range(self.steps):
            fz = checkpoint(f, z, *args, use_reentrant=False) if self.checkpoint else f(z, *args)
            fz = fz.to(z.dtype)
            with torch.no_grad():
                r, size = norm(fz - z).double(), norm(fz).double()
                relative = torch.where(r > 0, r / size, 0.0).where(r.isfinite() & size.isfinite(), torch.inf)
                residuals.append(relative)
                if callback is not None:
                    callback(k, rows, fz.detach(), relative)
            z = fz
        lost, met = residuals[-1].isinf(), (r <= solver.atol) | (residuals[-1] <= solver.rtol)
        status = torch.full_like(rows, Status.CAP).masked_fill(met, Status.CONVERGED).masked_fill(lost, Status.DIVERGED)
        if bool(lost.any()):
            items = ", ".join(map(str, lost.nonzero().squeeze(1)[:8].tolist()))
            warnings.warn(f"Unrolled: f is not finite after {self.steps} steps for items {items}", stacklevel=2)
        return Solution(z, torch.stack(residuals), status.to(torch.int8), torch.zeros_like(rows))
