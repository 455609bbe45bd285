"""Broyden and Newton-Krylov: where Picard diverges, orders of convergence, formulas."""

import pytest
import torch
from torch import Tensor

from steadyflow.equilibrium import Broyden, NewtonKrylov, Picard, Status


def expansive(batch: int = 6, size: int = 8, seed: int = 0) -> tuple:
    """z -> A tanh(z) + b with |A| up to 6: not a contraction, with a root near b / (I - A)."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(batch, size, size, generator=generator, dtype=torch.float64)
    matrix = -(matrix @ matrix.mT)  # negative eigenvalues: I - A is well conditioned, Picard overshoots
    matrix = matrix / torch.linalg.matrix_norm(matrix, 2)[:, None, None]
    matrix = torch.linspace(1.5, 6, batch, dtype=torch.float64)[:, None, None] * matrix
    shift = torch.randn(batch, size, generator=generator, dtype=torch.float64)

    def f(z: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
        return (matrix @ torch.tanh(z)[..., None])[..., 0] + shift

    return f, torch.zeros_like(shift), (matrix, shift)


SOLVERS = {
    "good": Broyden(max_iterations=200, rtol=1e-9),
    "bad": Broyden(update="bad", max_iterations=400, rtol=1e-9),
    "short": Broyden(memory=12, max_iterations=400, rtol=1e-9),
    "search": Broyden(line_search=4, max_iterations=400, rtol=1e-9),
    "newton": NewtonKrylov(krylov=5, products="difference", max_iterations=40, rtol=1e-9),
}


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_solves_where_picard_does_not(solver) -> None:
    f, z0, args = expansive()
    picard = Picard(max_iterations=200)(f, z0, *args)
    assert not picard.converged[1:].any()
    solution = solver(f, z0, *args)
    assert solution.converged.all()
    change = (f(solution.z, *args) - solution.z).norm(dim=1) / solution.z.norm(dim=1)
    assert (change <= 1.01e-9).all()  # of z itself, which a root finder returns


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("compact", [True, False])
def test_batch_equals_singles(solver, compact: bool) -> None:
    f, z0, args = expansive()
    whole = type(solver)(**{**vars(solver), "compact": compact})(f, z0, *args)
    assert len(set(whole.iterations.tolist())) > 1
    for b in range(len(z0)):
        single = solver(f, z0[b : b + 1], *(a[b : b + 1] for a in args))
        assert int(single.iterations) == whole.iterations[b]
        assert torch.allclose(single.z[0], whole.z[b], rtol=0, atol=1e-7)


@pytest.mark.parametrize("update", ["good", "bad"])
def test_iterates_follow_the_formula(update: str) -> None:
    """Broyden's rank-one updates of a dense inverse, written down naively."""
    f, z0, (matrix, shift) = expansive(1, 5)
    g = lambda z: f(z[None], matrix, shift)[0] - z  # noqa: E731
    inverse = -torch.eye(5, dtype=torch.float64)
    zs = [z0[0]]
    for k in range(8):
        zs.append(zs[k] - inverse @ g(zs[k]))
        s, y = zs[k + 1] - zs[k], g(zs[k + 1]) - g(zs[k])
        v = inverse.T @ s if update == "good" else y
        inverse = inverse + torch.outer(s - inverse @ y, v) / (v @ y)
        assert torch.allclose(inverse @ y, s)
    seen: list[Tensor] = []

    def watching(z: Tensor, *args: Tensor) -> Tensor:
        seen.append(z[0].clone())
        return f(z, *args)

    Broyden(update=update, max_iterations=9, rtol=0.0)(watching, z0, matrix, shift)
    for ours, theirs in zip(seen, zs, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-8, atol=1e-8)


def test_good_broyden_ends_on_linear_systems_within_2d_steps() -> None:
    """Gay 1979: Broyden's good method solves a linear system of dimension D in at most 2 D steps."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(4, 5, 5, generator=generator, dtype=torch.float64)
    shift = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    solution = Broyden(max_iterations=12, rtol=1e-8)(
        lambda z, a, b: (a @ z[..., None])[..., 0] + b, torch.zeros_like(shift), matrix, shift
    )
    assert solution.converged.all()
    assert (solution.iterations <= 11).all()


def test_newton_is_exact_on_a_linear_map_and_quadratic_elsewhere() -> None:
    f, z0, args = expansive()
    linear = NewtonKrylov(krylov=8, products="difference", max_iterations=2, rtol=1e-7)(
        lambda z, a, b: (a @ z[..., None])[..., 0] + b, z0, *args
    )
    assert linear.converged.all()
    residual = NewtonKrylov(krylov=8, products="difference", max_iterations=20, rtol=1e-14)(f, z0, *args).residual
    pairs = 0
    for k in range(len(residual) - 1):
        now, then = residual[k], residual[k + 1]
        near = (now < 1e-2) & (now > 1e-6)
        assert (then[near] < 20 * now[near] ** 2).all()
        pairs += int(near.sum())
    assert pairs >= 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own rules use it
def test_forward_products_are_what_differences_approach() -> None:
    f, z0, args = expansive()
    difference, forward = (
        NewtonKrylov(krylov=8, products=products, max_iterations=3, rtol=0.0)(f, z0, *args)
        for products in ("difference", "forward")
    )
    assert torch.allclose(difference.z, forward.z, rtol=0, atol=1e-5)
    assert not torch.equal(difference.z, forward.z)


def test_newton_with_a_short_krylov_space_is_inexact_but_converges() -> None:
    f, z0, args = expansive()
    short = NewtonKrylov(krylov=3, products="difference", max_iterations=60, rtol=1e-9)(f, z0, *args)
    full = NewtonKrylov(krylov=8, products="difference", max_iterations=60, rtol=1e-9)(f, z0, *args)
    assert short.converged.all()
    assert (short.iterations > full.iterations).all()


def test_line_search_saves_a_solve_that_overshoots() -> None:
    """arctan: undamped steps from far away leap ever further; with halvings the root is found."""
    f = lambda z: z - 4 * torch.atan(z)  # noqa: E731
    z0 = torch.full((1, 1), 30.0, dtype=torch.float64)
    searching = Broyden(line_search=10, max_iterations=100, rtol=0.0, atol=1e-10)(f, z0)
    assert searching.converged.all()
    assert searching.z.abs().item() < 1e-9


def test_a_vanishing_update_is_left_out() -> None:
    solution = Broyden(max_iterations=5, rtol=0.0)(lambda z: z + 1, torch.zeros(2, 3))  # y = 0: no root, no update
    assert solution.z.isfinite().all()
    assert (solution.status == Status.CAP).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Broyden(memory=0), "memory >= 1"),
        (lambda: Broyden(update="ugly"), "good or bad"),
        (lambda: NewtonKrylov(krylov=0), "krylov >= 1"),
        (lambda: NewtonKrylov(products="backward"), "forward or difference"),
    ],
)
def test_mistakes_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
