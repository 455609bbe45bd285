"""Gradients through the fixed point: exact against closed forms, approximate against their own definitions."""

import pytest
import torch
from torch import Tensor, nn

from steadyflow.equilibrium import (
    Anderson,
    Broyden,
    Equilibrium,
    Gradient,
    Implicit,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Unrolled,
)

TIGHT = {"max_iterations": 300, "rtol": 1e-13}


class Cell(nn.Module):
    """z -> tanh(W z + x) on items (3, 2), a contraction with norm 0.7."""

    def __init__(self, size: int = 6, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(size, size, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(0.7 * weight / torch.linalg.matrix_norm(weight, 2))
        self.calls: list[int] = []

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls.append(len(z))
        return torch.tanh((z.flatten(1) @ self.weight).view(z.shape) + x)


def inputs(batch: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 2, generator=generator, dtype=torch.float64)
    return torch.zeros_like(x), x


def gradients(gradient: Gradient, solver=None, cell: Cell | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """z, and the gradients of sum_b b |z_b|^4 with respect to the weight and x."""
    cell = cell or Cell()
    z0, x = inputs()
    x.requires_grad_()
    solution = Equilibrium(solver or Anderson(**TIGHT), gradient)(cell, z0, x)
    loss = (solution.z.flatten(1).norm(dim=1) ** 4 * torch.arange(1, 5)).sum()
    return solution.z.detach(), *torch.autograd.grad(loss, [cell.weight, x])


ADJOINTS = {
    "picard": Picard(**TIGHT),
    "anderson": Anderson(**TIGHT),
    "anderson, masked": Anderson(**TIGHT, compact=False),
    "broyden": Broyden(**TIGHT),
    "newton": NewtonKrylov(krylov=6, products="difference", max_iterations=10, rtol=1e-13),
}


@pytest.mark.parametrize("solver", ADJOINTS.values(), ids=ADJOINTS)
def test_implicit_equals_unrolled(solver) -> None:
    expected = gradients(Unrolled(80))
    for ours, theirs in zip(gradients(Implicit(solver)), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-8 * float(theirs.abs().max()))


def test_implicit_of_a_linear_map_is_a_closed_form_solve() -> None:
    """z = z A + x: dL/dx = dL/dz (I - A^T)^-1, dL/dA = z^T dL/dx. Picard diverges here; Broyden does not mind."""
    generator = torch.Generator().manual_seed(0)
    matrix = 2 * torch.randn(5, 5, generator=generator, dtype=torch.float64)
    matrix.requires_grad_()
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    solver = Broyden(max_iterations=100, rtol=1e-13)
    solution = Equilibrium(solver, Implicit(solver))(lambda z, x: z @ matrix + x, torch.zeros_like(x), x)
    assert torch.allclose(solution.z, torch.linalg.solve(torch.eye(5) - matrix, x, left=False), atol=1e-9)
    ours = torch.autograd.grad(solution.z, [x, matrix], grad)
    on_x = torch.linalg.solve(torch.eye(5) - matrix.detach().T, grad, left=False)
    assert torch.allclose(ours[0], on_x, rtol=1e-8, atol=1e-9)
    assert torch.allclose(ours[1], solution.z.detach().T @ on_x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "gradient",
    [Implicit(Anderson(**TIGHT)), Unrolled(25), Unrolled(25, checkpoint=True)],
    ids=lambda g: type(g).__name__,
)
def test_gradcheck_of_the_exact_gradients(gradient: Gradient) -> None:
    equilibrium = Equilibrium(Anderson(**TIGHT), gradient)
    generator = torch.Generator().manual_seed(0)
    weight = (0.1 * torch.randn(3, 3, generator=generator, dtype=torch.float64)).requires_grad_()
    x = torch.randn(2, 3, generator=generator, dtype=torch.float64, requires_grad=True)

    def run(weight: Tensor, x: Tensor) -> Tensor:
        return equilibrium(lambda z, x: torch.tanh(z @ weight + x), torch.zeros(2, 3, dtype=torch.float64), x).z

    assert torch.autograd.gradcheck(run, (weight, x), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "gradient",
    [Phantom(0.6, 4), Phantom(1.0, 2), OneStep(), OneStep(0.1)],
    ids=["phantom-4", "phantom-2", "one-step", "one-step-0.1"],
)
def test_phantom_is_its_truncated_series(gradient: Phantom) -> None:
    """u = tau sum_i ((1 - tau) I + tau J^T)^i dL/dz, from the Jacobian itself."""
    cell = Cell()
    z, *ours = gradients(gradient, cell=cell)
    _, x = inputs()
    with torch.no_grad():
        assert torch.allclose(z, cell(z, x), atol=1e-12)
    grad = torch.autograd.functional.jacobian(lambda z: (z.flatten(1).norm(dim=1) ** 4 * torch.arange(1, 5)).sum(), z)
    u = torch.zeros_like(z)
    for b in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda s, b=b: cell(s[None], x[b : b + 1])[0], z[b]).view(6, 6)
        damped = (1 - gradient.tau) * torch.eye(6, dtype=torch.float64) + gradient.tau * jacobian.detach().T
        series = sum(torch.linalg.matrix_power(damped, i) for i in range(gradient.steps))
        u[b] = (gradient.tau * series @ grad[b].flatten()).view(3, 2)
    x.requires_grad_()
    expected = torch.autograd.grad(cell(z, x), [cell.weight, x], u)
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-10)


def test_phantom_of_many_steps_is_the_implicit_gradient() -> None:
    for ours, theirs in zip(gradients(Phantom(0.8, 120)), gradients(Implicit(Anderson(**TIGHT))), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-10)


def test_attach_is_the_gradient_of_any_iterate() -> None:
    cell, (z0, x) = Cell(), inputs()
    z = OneStep(0.3).attach(cell, z0 + 1, x)
    assert torch.allclose(z, 0.7 * (z0 + 1) + 0.3 * cell(z0 + 1, x))
    (ours,) = torch.autograd.grad(z.sum(), cell.weight)
    (theirs,) = torch.autograd.grad(0.3 * cell(z0 + 1, x).sum(), cell.weight)
    assert torch.allclose(ours, theirs)


def test_unrolled_with_checkpoints_is_unrolled_and_reaches_the_start() -> None:
    cell, (_, x) = Cell(), inputs()
    results = []
    for checkpoint in (False, True):
        z0 = torch.full_like(x, 0.5).requires_grad_()
        cell.calls.clear()
        solution = Equilibrium(Picard(rtol=1e-3), Unrolled(7, checkpoint))(cell, z0, x)
        results.append([solution.z, *torch.autograd.grad(solution.z.square().sum(), [cell.weight, z0])])
        assert len(cell.calls) == (14 if checkpoint else 7)
        assert solution.residual.shape == (7, 4)
        assert torch.equal(solution.converged, solution.residual[-1] <= 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][2].abs().max() > 0


def saved(gradient: Gradient, iterations: int) -> int:
    """Tensors saved for the backward pass when the solver runs the given number of iterations."""
    count = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return x

    cell, (z0, x) = Cell(), inputs()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        solution = Equilibrium(Anderson(max_iterations=iterations, rtol=0.0), gradient)(cell, z0, x)
    assert solution.z.requires_grad
    return count


@pytest.mark.parametrize("gradient", [Implicit(Picard()), Phantom(0.5, 3), OneStep()], ids=lambda g: type(g).__name__)
def test_memory_does_not_grow_with_the_iterations(gradient: Gradient) -> None:
    assert 0 < saved(gradient, 3) == saved(gradient, 60)


def test_memory_of_the_unrolled_gradient_does_grow() -> None:
    assert saved(Unrolled(60), 5) > 15 * saved(Unrolled(3), 5)
    assert saved(Unrolled(60, checkpoint=True), 5) < saved(Unrolled(60), 5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gradient", [Implicit(Picard()), Phantom(0.5, 3), OneStep()], ids=lambda g: type(g).__name__)
def test_cuda_memory_does_not_grow_with_the_iterations(gradient: Gradient) -> None:
    weight = (torch.eye(512, device="cuda") / 2).requires_grad_()
    x = torch.randn(256, 512, device="cuda")
    held = []
    for iterations in (5, 50):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        solver = Picard(max_iterations=iterations, rtol=0.0)
        solution = Equilibrium(solver, gradient)(lambda z, x: torch.tanh(z @ weight + x), torch.zeros_like(x), x)
        held.append(torch.cuda.memory_allocated() - before - solution.residual.nbytes)
        del solution
    assert held[1] < 1.1 * held[0]


def test_batch_gradient_is_the_sum_of_the_singles() -> None:
    cell, (z0, x) = Cell(), inputs()
    equilibrium = Equilibrium(Anderson(**TIGHT), Implicit(Anderson(**TIGHT)))
    (whole,) = torch.autograd.grad(equilibrium(cell, z0, x).z.pow(3).sum(), cell.weight)
    singles = [
        torch.autograd.grad(equilibrium(cell, z0[b : b + 1], x[b : b + 1]).z.pow(3).sum(), cell.weight)[0]
        for b in range(4)
    ]
    assert torch.allclose(whole, sum(singles), rtol=1e-10, atol=1e-12)


def test_evaluation_takes_the_solver_alone() -> None:
    cell, (z0, x) = Cell(), inputs()
    with torch.no_grad():
        solution = Equilibrium(Picard(rtol=1e-6), Unrolled(2))(cell, z0, x)
    assert solution.converged.all()
    assert not solution.z.requires_grad


def test_unsolved_linear_system_warns() -> None:
    cell, (z0, x) = Cell(), inputs()
    z = Equilibrium(Anderson(**TIGHT), Implicit(Picard(max_iterations=2, rtol=1e-9)))(cell, z0, x).z
    with pytest.warns(UserWarning, match="linear system of 4 of 4 items is not solved after 2 iterations"):
        z.sum().backward()


def test_unrolled_divergence_warns() -> None:
    with pytest.warns(UserWarning, match="Unrolled: f is not finite after 12 steps for items 1"):
        Unrolled(12)(Picard(), lambda z: z**2 + 0, torch.tensor([[0.5], [1e30]], requires_grad=True))


def test_autocast_and_a_compiled_map() -> None:
    cell, (z0, x) = Cell().float(), inputs()
    z0, x = z0.float(), x.float()
    equilibrium = Equilibrium(Anderson(rtol=3e-2), Implicit(Anderson(rtol=3e-2)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = equilibrium(cell, z0, x)
    assert solution.z.dtype == torch.float32
    solution.z.pow(3).sum().backward()
    expected = gradients_float(cell, z0, x)
    assert (cell.weight.grad - expected).norm() < 0.1 * expected.norm()


def gradients_float(cell: Cell, z0: Tensor, x: Tensor) -> Tensor:
    equilibrium = Equilibrium(Anderson(rtol=1e-6), Implicit(Anderson(rtol=1e-5)))
    return torch.autograd.grad(equilibrium(cell, z0, x).z.pow(3).sum(), cell.weight)[0]


@pytest.mark.slow
def test_compiled_map_under_implicit() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (0.2 * torch.randn(6, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    z0, x = torch.zeros(4, 6, dtype=torch.float64), torch.randn(4, 6, generator=generator, dtype=torch.float64)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ weight + x)

    solver = Anderson(**TIGHT, compact=False)
    equilibrium = Equilibrium(solver, Implicit(solver))
    expected = torch.autograd.grad(equilibrium(f, z0, x).z.pow(3).sum(), weight)[0]
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(equilibrium(compiled, z0, x).z.pow(3).sum(), weight)[0]
    assert torch.allclose(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "call", [lambda: Phantom(0.0), lambda: Phantom(1.5), lambda: Phantom(1.0, 0), lambda: Unrolled(0)]
)
def test_mistakes_are_named(call) -> None:
    with pytest.raises(ValueError, match="steps >= 1"):
        call()
