"""What every solver promises: items stop, leave and return by themselves; trouble is named, never NaN in silence."""

import math

import pytest
import torch
from torch import Tensor

from steadyflow.equilibrium import Anderson, Broyden, FixedPointSolver, Picard, Status

SOLVERS = {
    "picard": lambda **k: Picard(damping=0.9, **k),
    "anderson": lambda **k: Anderson(m=4, **k),
    "broyden": lambda **k: Broyden(memory=8, **k),
}


@pytest.fixture(params=SOLVERS)
def make(request: pytest.FixtureRequest):
    return SOLVERS[request.param]


def problem(batch: int = 7, shape: tuple[int, ...] = (3, 4), dtype: torch.dtype = torch.float64, seed: int = 0):
    """A nonlinear contraction whose items converge at different rates, its argument and its start."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape)
    weight = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0].to(dtype)
    rate = torch.linspace(0.1, 0.9, batch, dtype=dtype)
    shift = torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(dtype)

    def f(z: Tensor, shift: Tensor, rate: Tensor, nothing: None = None) -> Tensor:
        return (rate[:, None] * torch.tanh(z.flatten(1) @ weight)).view(z.shape) + shift

    return f, torch.zeros(batch, *shape, dtype=dtype), (shift, rate, None)


def test_solution_is_the_fixed_point_to_the_tolerance(make) -> None:
    f, z0, args = problem()
    exact = z0
    for _ in range(400):
        exact = f(exact, *args)
    for rtol in (1e-3, 1e-6, 1e-10):
        solution = make(max_iterations=300, rtol=rtol)(f, z0, *args)
        assert solution.converged.all()
        error = (solution.z - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
        assert (error <= rtol / (1 - 0.9)).all()  # |z - z*| <= |f(z) - z| / (1 - L)


def test_residual_history(make) -> None:
    f, z0, args = problem()
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    solver = make(max_iterations=300, rtol=1e-6)
    solution = solver(
        f, z0, *args, callback=lambda k, rows, fz, relative: seen.append((rows.clone(), fz.clone(), relative.clone()))
    )
    assert solution.residual.dtype == torch.float64
    assert len(seen) == len(solution.residual) == solution.iterations.max()
    for k, (rows, _, relative) in enumerate(seen):
        assert torch.equal(solution.residual[k, rows], relative)
        gone = torch.ones(len(z0), dtype=torch.bool)
        gone[rows] = False
        assert solution.residual[k, gone].isnan().all()
    first = (f(z0, *args) - z0).flatten(1).norm(dim=1) / f(z0, *args).flatten(1).norm(dim=1)
    assert torch.allclose(solution.residual[0], first, rtol=1e-14, atol=0)
    for b, n in enumerate(solution.iterations.tolist()):
        assert solution.residual[n - 1, b] <= 1e-6
        assert (solution.residual[: n - 1, b] > 1e-6).all()
        rows, fz, _ = seen[n - 1]
        if solver.returns_image:
            assert torch.equal(solution.z[b], fz[rows == b][0])  # f of the best, here the last, iterate
        single = tuple(None if a is None else a[b : b + 1] for a in args)
        change = (f(solution.z[b : b + 1], *single) - solution.z[b]).norm() / fz[rows == b].norm()
        # z_n itself has the residual recorded; its image has less, by the contraction's factor
        assert change <= solution.residual[n - 1, b] * (1 + 1e-9)


def test_batch_equals_singles(make) -> None:
    f, z0, args = problem()
    solver = make(max_iterations=300, rtol=1e-8)
    solution = solver(f, z0, *args)
    assert len(set(solution.iterations.tolist())) > 3
    for b in range(len(z0)):
        single = solver(f, z0[b : b + 1], *(None if a is None else a[b : b + 1] for a in args))
        n = int(single.iterations)
        assert n == solution.iterations[b]
        assert torch.allclose(single.z[0], solution.z[b], rtol=0, atol=1e-13)
        assert torch.allclose(single.residual[:, 0], solution.residual[:n, b], rtol=1e-6, atol=1e-14)


def test_items_leave(make) -> None:
    f, z0, args = problem()
    rows: list[int] = []

    def counting(z: Tensor, *args: Tensor | None) -> Tensor:
        rows.append(len(z))
        return f(z, *args)

    solution = make(max_iterations=300, rtol=1e-8)(counting, z0, *args)
    assert rows == (~solution.residual.isnan()).sum(1).tolist()
    assert sum(rows) == solution.iterations.sum()
    assert rows[0] == 7
    assert rows[-1] < 7


def test_masking_gives_what_leaving_gives(make) -> None:
    f, z0, args = problem()
    seen: list[Tensor] = []

    def watching(z: Tensor, *args: Tensor | None) -> Tensor:
        seen.append(z.clone())
        return f(z, *args)

    leaving = make(max_iterations=300, rtol=1e-8)(f, z0, *args)
    masking = make(max_iterations=300, rtol=1e-8, compact=False)(watching, z0, *args)
    assert {len(z) for z in seen} == {7}
    assert torch.equal(leaving.iterations, masking.iterations)
    assert torch.allclose(leaving.z, masking.z, rtol=0, atol=1e-13)
    assert torch.allclose(leaving.residual, masking.residual, rtol=1e-6, atol=1e-14, equal_nan=True)
    for b, n in enumerate(masking.iterations.tolist()):
        assert all(torch.equal(z[b], masking.z[b]) for z in seen[n:])  # what is done stays as it is


def test_absolute_tolerance_alone(make) -> None:
    def f(z: Tensor) -> Tensor:
        return 0.5 * z.flip(1)  # the fixed point is 0, where no relative tolerance can be met

    solution = make(max_iterations=100, rtol=0.0, atol=1e-6)(f, torch.rand(3, 2, dtype=torch.float64) + 1)
    assert solution.converged.all()
    assert (solution.z.norm(dim=1) <= 2e-6).all()


def test_best_iterate_is_returned_not_the_last() -> None:
    values = iter([5.0, 1.0, 3.0, 2.0])  # of f(z) - z
    solution = Picard(max_iterations=4, rtol=0.0)(lambda z: z + next(values), torch.zeros(1, 1))
    assert solution.z.item() == 6.0  # 0 -> 5 -> 6 -> 9: f(z_1) = 6 has the smallest residual
    assert solution.status.item() == Status.CAP


def test_what_converged_is_returned_though_another_residual_was_smaller() -> None:
    steps = iter([1e-3, 100.0, 2e-3])  # of f(z) - z: relative to f(z), the last alone is small
    solution = Picard(rtol=1e-4)(lambda z: z + next(steps), torch.zeros(1, 1))
    assert solution.converged.all()
    assert solution.z.item() == pytest.approx(100.003)


def test_start_at_the_solution() -> None:
    solution = Anderson()(lambda z: z, torch.ones(2, 3))
    assert solution.iterations.tolist() == [1, 1]
    assert solution.converged.all()


def test_norm_of_the_last_state_decides(make) -> None:
    # the last state of a trajectory converges first
    rate = torch.tensor([[0.97], [0.9], [0.2]], dtype=torch.float64) * torch.linspace(0.5, 1, 10, dtype=torch.float64)
    f = lambda z: rate * z + 1  # noqa: E731
    z0 = torch.zeros(4, 3, 10, dtype=torch.float64)
    solver = make(max_iterations=2000, rtol=1e-6)
    whole, last = solver(f, z0), solver(f, z0, norm=lambda r: r[:, -1].norm(dim=1))
    assert whole.converged.all()
    assert last.converged.all()
    assert (last.iterations < whole.iterations).all()
    assert torch.allclose(last.z[:, -1], (1 / (1 - rate[-1])).expand(4, 10), rtol=1e-5)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("make", [SOLVERS["picard"], SOLVERS["anderson"]], ids=["picard", "anderson"])
def test_divergence_warns_and_returns_the_best_iterate(make, compact: bool) -> None:
    factor = torch.tensor([[0.1], [3.0], [-0.2], [1e30]], dtype=torch.float32)
    shift = torch.full_like(factor, 1.0)
    z0 = torch.zeros(4, 1)

    def f(z: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
        return factor * (z * z + z) + shift

    with pytest.warns(
        UserWarning, match=r"2 of 4 items diverged \(1, 3\); item 1 left at iteration \d+ with \|f\(z\) - z\| = "
    ):
        solution = make(max_iterations=60, rtol=1e-5, compact=compact)(f, z0, factor, shift)
    assert solution.status[1] == solution.status[3] == Status.DIVERGED
    assert solution.z.isfinite().all()
    assert solution.converged[2]


def test_growth_is_divergence_before_it_overflows() -> None:
    with pytest.warns(UserWarning, match="Picard: 2 of 2 items diverged"):
        solution = Picard(max_iterations=1000)(lambda z: 3 * z + 1, torch.zeros(2, 1, dtype=torch.float64))
    assert solution.status.tolist() == [Status.DIVERGED] * 2
    assert solution.iterations.tolist() == [14, 14]  # 3^13 > 1e6
    assert solution.z.tolist() == [[1.0]] * 2  # f(z_0)


def test_nan_from_the_start() -> None:
    with pytest.warns(UserWarning, match=r"2 of 2 items diverged \(0, 1\); item 0 left at iteration 1 with .* nan"):
        solution = Picard()(lambda z: torch.where(z > 0, math.nan, 0.5 * z + 1), torch.tensor([[1.0], [-1.0]]))
    assert solution.z.tolist() == [[1.0], [0.5]]  # the start, and f(-1) = 0.5, where f is NaN
    assert solution.residual[0].tolist() == [math.inf, 3.0]
    assert solution.residual[1].isinf().tolist() == [False, True]


def test_limit_cycles_are_named() -> None:
    turn = 2 * math.pi / 5
    rotation = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]], dtype=torch.float64)
    z0 = torch.ones(3, 2, dtype=torch.float64)

    def f(z: Tensor, item: Tensor) -> Tensor:
        maps = torch.stack([-z, z @ rotation.T, -0.99 * z])
        return maps[item, torch.arange(len(z))]

    solution = Picard(max_iterations=40)(f, z0, torch.arange(3))
    assert solution.status.tolist() == [Status.CYCLE, Status.CYCLE, Status.CAP]  # the last one does converge, slowly
    assert solution.period.tolist() == [2, 5, 0]


def test_rounding_is_no_limit_cycle() -> None:
    f, z0, args = problem(dtype=torch.float32)
    solution = Picard(max_iterations=400, rtol=0.0)(f, z0, *args)
    assert (solution.status != Status.CYCLE).all()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 4e-3)])
def test_dtypes(make, dtype: torch.dtype, rtol: float) -> None:
    f, z0, args = problem()
    exact = make(max_iterations=300, rtol=1e-10)(f, z0, *args).z
    f, z0, args = problem(dtype=dtype)
    solution = make(max_iterations=100, rtol=rtol)(f, z0, *args)
    assert solution.z.dtype == dtype
    assert solution.residual.dtype == torch.float64
    assert solution.converged.all()
    assert ((solution.z.double() - exact).flatten(1).norm(dim=1) <= 10 * rtol * exact.flatten(1).norm(dim=1)).all()


def test_autocast_reaches_f_and_not_the_solver(make) -> None:
    f, z0, args = problem(dtype=torch.float32)
    seen = set()

    def watching(z: Tensor, *args: Tensor | None) -> Tensor:
        seen.add((z.dtype, (z.flatten(1) @ z.flatten(1).T).dtype))
        return f(z, *args)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = make(max_iterations=40, rtol=3e-2)(watching, z0, *args)
    assert seen == {(torch.float32, torch.bfloat16)}
    assert solution.z.dtype == torch.float32
    assert solution.converged.all()


@pytest.mark.slow
def test_compiled_map() -> None:
    f, z0, args = problem()
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(f, backend=backend, fullgraph=True, dynamic=False)
    expected = Anderson(max_iterations=300, rtol=1e-8)(f, z0, *args)
    solution = Anderson(max_iterations=300, rtol=1e-8, compact=False)(compiled, z0, *args)
    assert len(graphs) == 1  # the shapes never changed
    assert torch.allclose(solution.z, expected.z, rtol=0, atol=1e-12)


def test_no_graph_unless_f_asks(make) -> None:
    f, z0, args = problem()
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    states = set()

    def watching(z: Tensor, *args: Tensor | None) -> Tensor:
        states.add((z.requires_grad, torch.is_grad_enabled()))
        with torch.enable_grad():
            inner = z.detach().requires_grad_()
            slope = torch.autograd.grad(inner.square().sum(), inner)[0]
        return f(z, *args) * weight + 0 * slope

    solution = make(max_iterations=300)(watching, z0.requires_grad_(), *args)
    assert states == {(False, False)}
    assert not solution.z.requires_grad


def test_shapes() -> None:
    assert Anderson()(lambda z: z.cos(), torch.zeros(3, dtype=torch.float64)).z.shape == (3,)
    empty = Anderson()(lambda z: z.cos(), torch.zeros(0, 4))
    assert empty.z.shape == (0, 4)
    assert empty.iterations.shape == empty.converged.shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Picard(max_iterations=0), "max_iterations >= 1"),
        (lambda: Picard(rtol=-1.0), "rtol >= 0"),
        (lambda: Picard(damping=0.0), "damping > 0"),
        (lambda: Anderson(m=0), "m >= 1"),
        (lambda: Anderson(mixing="states"), "item, state, causal"),
        (lambda: Anderson(mixing="state")(torch.cos, torch.zeros(3)), "needs z0"),
        (lambda: Picard()(torch.cos, torch.zeros(3, 1, dtype=torch.int64)), "floating dtype"),
        (lambda: Picard()(torch.add, torch.zeros(3, 1), torch.zeros(2)), "lead with the batch"),
        (lambda: Picard()(lambda z: z.sum(), torch.zeros(3, 1)), "keep the shape"),
    ],
)
def test_mistakes_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu(make) -> None:
    f, z0, args = problem()
    expected = make(max_iterations=300, rtol=1e-8)(f, z0, *args)
    weightless = [None if a is None else a.cuda() for a in args]

    def on_device(z: Tensor, *args: Tensor | None) -> Tensor:
        return f(z.cpu(), *(None if a is None else a.cpu() for a in args)).cuda()

    solution = make(max_iterations=300, rtol=1e-8)(on_device, z0.cuda(), *weightless)
    assert torch.equal(solution.iterations.cpu(), expected.iterations)
    assert torch.allclose(solution.z.cpu(), expected.z, rtol=0, atol=1e-10)


def test_solvers_are_solvers() -> None:
    assert all(isinstance(make(), FixedPointSolver) for make in SOLVERS.values())
