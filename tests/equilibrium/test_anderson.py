"""Anderson acceleration: its theorem, its formula, its options."""

import pytest
import torch
from torch import Tensor

from steadyflow.equilibrium import Anderson, Picard


def linear(batch: int, size: int, radius: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices (B, D, D) of the given spectral norm, right sides (B, D), and the fixed points of z = A z + b."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(batch, size, size, generator=generator, dtype=torch.float64)
    matrix = radius * matrix / torch.linalg.matrix_norm(matrix, 2)[:, None, None]
    shift = torch.randn(batch, size, generator=generator, dtype=torch.float64)
    eye = torch.eye(size, dtype=torch.float64)
    return matrix, shift, torch.linalg.solve(eye - matrix, shift)


def apply(z: Tensor, matrix: Tensor, shift: Tensor) -> Tensor:
    return (matrix @ z[..., None])[..., 0] + shift


def gmres_residuals(matrix: Tensor, shift: Tensor, steps: int) -> list[float]:
    """min |b - (I - A) x| over x in the k-th Krylov space of (I - A, b), from its definition, k = 0..steps."""
    system = torch.eye(len(shift), dtype=torch.float64) - matrix
    basis, out = shift[:, None] / shift.norm(), [float(shift.norm())]
    for _ in range(steps):
        image = system @ basis
        weights = torch.linalg.lstsq(image, shift[:, None], driver="gelsd").solution
        out.append(float((shift[:, None] - image @ weights).norm()))
        following = image[:, -1:]
        for _ in range(2):
            following = following - basis @ (basis.T @ following)
        basis = torch.cat([basis, following / following.norm()], 1)
    return out


@pytest.mark.parametrize("radius", [0.9, 3.0])  # a contraction, and a map that Picard cannot solve
@pytest.mark.parametrize("size", [1, 3, 6])
def test_linear_map_of_dimension_m_is_exact_after_m_plus_1_evaluations(radius: float, size: int) -> None:
    matrix, shift, exact = linear(5, size, radius)
    solver = Anderson(m=size, ridge=0.0, max_iterations=size + 2, rtol=0.0)
    solution = solver(apply, torch.zeros_like(shift), matrix, shift)
    # evaluations 1..D+1 make D differences; the iterate they give, evaluated last, solves the system
    assert (solution.residual[size + 1] < 1e-8).all()
    assert (solution.residual[size] > 1e-6).all()
    assert torch.allclose(solution.z, exact, rtol=1e-7, atol=1e-7)


def test_equivalent_to_gmres_on_a_linear_map() -> None:
    """Walker & Ni 2011, section 2: the damped least-squares residual of step k is GMRES' k-th residual."""
    matrix, shift, _ = linear(1, 12, 0.95)
    history: list[Tensor] = []
    Anderson(m=12, ridge=0.0, max_iterations=9, rtol=0.0)(
        lambda z: history.append(z[0].clone()) or apply(z, matrix, shift), torch.zeros_like(shift)
    )
    gmres = gmres_residuals(matrix[0], shift[0], 7)
    system = torch.eye(12, dtype=torch.float64) - matrix[0]
    for k in range(1, 8):  # z_{k+1} = f(x_k) with x_k GMRES' iterate: x_k = A^-1 (z_{k+1} - b)
        x = torch.linalg.solve(matrix[0], history[k + 1] - shift[0])
        assert torch.allclose((shift[0] - system @ x).norm(), torch.tensor(gmres[k]).double(), rtol=1e-5)


def naive(f, z0: Tensor, m: int, beta: float, steps: int) -> list[Tensor]:
    """The iterates of the docstring's update, written down with a QR least squares; z0 (1, D)."""
    zs, gs = [z0[0]], []
    for k in range(steps):
        gs.append(f(zs[k][None])[0] - zs[k])
        recent = range(max(0, k - m), k)
        step = beta * gs[k]
        if k > 0:
            dz = torch.stack([zs[i + 1] - zs[i] for i in recent], 1)
            dg = torch.stack([gs[i + 1] - gs[i] for i in recent], 1)
            step = step - (dz + beta * dg) @ torch.linalg.lstsq(dg, gs[k][:, None]).solution[:, 0]
        zs.append(zs[k] + step)
    return zs


def test_iterates_follow_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 8, generator=generator, dtype=torch.float64) / 3
    shift = torch.randn(1, 8, generator=generator, dtype=torch.float64)
    f = lambda z: torch.tanh(z @ weight) + shift  # noqa: E731
    seen: list[Tensor] = []
    Anderson(m=3, beta=0.7, ridge=0.0, max_iterations=10, rtol=0.0)(
        lambda z: seen.append(z[0].clone()) or f(z), torch.zeros_like(shift)
    )
    for ours, theirs in zip(seen, naive(f, torch.zeros_like(shift), 3, 0.7, 9), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("m", [5, 10])
def test_normal_equations_cost_no_iterations_beside_qr(m: int) -> None:
    """An ill-conditioned symmetric map, eigenvalues up to 0.99, to a residual of 1e-8."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))[0]
    weight = (basis * torch.linspace(-0.3, 0.99, 60, dtype=torch.float64)) @ basis.T
    shift = torch.randn(1, 60, generator=generator, dtype=torch.float64)
    f = lambda z: z @ weight + shift  # noqa: E731
    zs = torch.stack(naive(f, torch.zeros_like(shift), m, 1.0, 400))
    by_qr = int(((f(zs) - zs).norm(dim=1) <= 1e-8 * f(zs).norm(dim=1)).nonzero()[0]) + 1
    ours = Anderson(m=m, max_iterations=400, rtol=1e-8)(f, torch.zeros_like(shift))
    assert 50 < int(ours.iterations) <= 1.02 * by_qr


def test_units_of_the_state_do_not_matter() -> None:
    matrix, shift, _ = linear(3, 20, 0.97)
    solver = Anderson(m=4, ridge=1e-4, max_iterations=200, rtol=1e-8)
    one = solver(apply, torch.zeros_like(shift), matrix, shift)
    million = solver(apply, torch.zeros_like(shift), matrix, 1e6 * shift)
    assert torch.equal(one.iterations, million.iterations)
    assert torch.allclose(one.z, 1e-6 * million.z, rtol=1e-12)


def test_faster_than_picard_and_equal_without_history() -> None:
    matrix, shift, _ = linear(3, 20, 0.97)
    matrix = matrix @ matrix.mT / 0.97  # symmetric: its largest eigenvalue is 0.97
    picard = Picard(max_iterations=600, rtol=1e-8)(apply, torch.zeros_like(shift), matrix, shift)
    anderson = Anderson(m=5, max_iterations=600, rtol=1e-8)(apply, torch.zeros_like(shift), matrix, shift)
    assert picard.converged.all()
    assert anderson.converged.all()
    assert (2 * anderson.iterations < picard.iterations).all()
    always = Anderson(m=5, restart=1e-300, max_iterations=600, rtol=1e-8)  # forgets all, at every step
    forgetful = always(apply, torch.zeros_like(shift), matrix, shift)
    assert torch.equal(forgetful.iterations, picard.iterations)
    assert torch.allclose(forgetful.z, picard.z, rtol=0, atol=1e-14)


def test_restart_is_the_item_s_own_and_helps_after_a_jump() -> None:
    """A map whose matrix changes midway: the stale history hurts the plain method, and a restart forgets it."""
    matrix, shift, _ = linear(2, 10, 0.9)
    other, _, _ = linear(2, 10, 0.9, seed=1)

    def run(restart: float | None) -> Tensor:
        calls = iter(range(1000))

        def f(z: Tensor, matrix: Tensor, other: Tensor, shift: Tensor) -> Tensor:
            return apply(z, matrix if next(calls) < 6 else other, shift)

        solver = Anderson(m=10, restart=restart, max_iterations=200, rtol=1e-10)
        return solver(f, torch.zeros_like(shift), matrix, other, shift).iterations

    assert (run(1.5) < run(None)).all()


def test_state_mixing_is_each_state_by_itself() -> None:
    """Where states do not interact, mixing=state is a batch of B T items."""
    matrix, shift, _ = linear(6, 5, 0.9)
    f = lambda z, matrix, shift: apply(z, matrix, shift)  # noqa: E731
    solver = Anderson(m=3, mixing="state", max_iterations=12, rtol=0.0)
    joint = solver(f, torch.zeros(2, 3, 5, dtype=torch.float64), matrix.view(2, 3, 5, 5), shift.view(2, 3, 5))
    each = Anderson(m=3, max_iterations=12, rtol=0.0)(f, torch.zeros(6, 5, dtype=torch.float64), matrix, shift)
    assert torch.allclose(joint.z.view(6, 5), each.z, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mixing", ["item", "causal"])
def test_causal_mixing_keeps_a_triangular_map_triangular(mixing: str) -> None:
    """z_t = f_t(z_{t-1}): after k evaluations the first k states of Picard are exact. With causal mixing they are."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 4, 4, generator=generator, dtype=torch.float64)
    start = torch.randn(2, 1, 4, generator=generator, dtype=torch.float64)

    def f(z: Tensor) -> Tensor:
        before = torch.cat([start.expand(len(z), 1, 4)[: len(z)], z[:, :-1]], 1)
        return torch.tanh(torch.einsum("btd,tde->bte", before, weight))

    exact = torch.zeros(2, 8, 4, dtype=torch.float64)
    for _ in range(8):
        exact = f(exact)
    errors: list[Tensor] = []
    Anderson(m=3, mixing=mixing, max_iterations=8, rtol=0.0)(
        f, torch.zeros_like(exact), callback=lambda k, rows, fz, _: errors.append((fz - exact).norm(dim=2).amax(0))
    )
    done = [bool((error[: k + 1] < 1e-7).all()) for k, error in enumerate(errors)]
    assert all(done) if mixing == "causal" else not all(done)


def test_history_follows_the_items_that_stay() -> None:
    """Items that converge at very different times, in an order that makes every gap move."""
    matrix, shift, exact = linear(9, 12, 1.0)
    rate = torch.tensor([0.99, 0.1, 0.95, 0.2, 0.9, 0.3, 0.99, 0.5, 0.97], dtype=torch.float64)
    solver = Anderson(m=4, max_iterations=400, rtol=1e-9)
    solution = solver(apply, torch.zeros_like(shift), rate[:, None, None] * matrix, shift)
    exact = torch.linalg.solve(torch.eye(12, dtype=torch.float64) - rate[:, None, None] * matrix, shift)
    assert solution.converged.all()
    assert torch.allclose(solution.z, exact, rtol=1e-6, atol=1e-6)
    masked = Anderson(m=4, max_iterations=400, rtol=1e-9, compact=False)
    again = masked(apply, torch.zeros_like(shift), rate[:, None, None] * matrix, shift)
    assert torch.equal(solution.iterations, again.iterations)


@pytest.mark.parametrize("mixing", ["item", "state", "causal"])
def test_a_window_that_slides_keeps_the_history_of_the_states_it_keeps(mixing):
    """As if those it has left had never been there, and those that come in had just begun."""
    g = torch.Generator().manual_seed(0)
    trail = torch.randn(6, 2, 3, 5, 4, generator=g, dtype=torch.float64)  # (step, z and g, B, T, d)
    solver = Anderson(m=2, ridge=1e-6, mixing=mixing)
    whole, kept = solver.start(trail[0, 0]), solver.start(trail[0, 0, :, 2:])
    for z, r in trail[:4]:
        whole.step(z.flatten(1), r.flatten(1), torch.neg, ())
        kept.step(z[:, 2:].reshape(3, -1).contiguous(), r[:, 2:].reshape(3, -1).contiguous(), torch.neg, ())
    whole.slide(torch.full((3,), 2), 5)
    for i, (z, r) in enumerate(trail[4:]):
        after = whole.step(z.flatten(1), r.flatten(1), torch.neg, ()).view(3, 5, 4)
        if i == 0 or mixing != "item":  # by item, the new states soon have a say
            known = (v[:, :3].flatten(1).contiguous() for v in (z, r))
            expected = kept.step(*known, torch.neg, ()).view(3, 3, 4)
            torch.testing.assert_close(after[:, :3], expected, rtol=1e-10, atol=1e-10)
        if i == 0 and mixing == "state":  # nothing to mix yet
            torch.testing.assert_close(after[:, 3:], (z + r)[:, 3:])
