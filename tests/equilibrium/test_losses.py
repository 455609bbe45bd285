"""The regularisers against their definitions."""

import pytest
import torch
from torch import Tensor, nn

from steadyflow.equilibrium import OneStep, Picard, correction_loss, jacobian_penalty, normalise


def cell(z: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh((z.flatten(1) @ weight).view(z.shape) + x)


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = (0.3 * torch.randn(6, 6, generator=generator, dtype=torch.float64)).requires_grad_()
    z, x = torch.randn(2, 3, 2, 3, generator=generator, dtype=torch.float64).unbind()
    slope = (1 - cell(z, x, weight).square()).flatten(1)  # J_ij = tanh'_i W_ji
    return weight, z, x, torch.einsum("bi,ji->b", slope.square(), weight.square()) / 6


def test_jacobian_penalty_over_a_whole_basis_is_the_frobenius_norm() -> None:
    weight, z, x, exact = problem()
    basis = torch.eye(6, dtype=torch.float64).view(6, 1, 2, 3).expand(6, 3, 2, 3) * 6**0.5  # mean of v v^T is I
    penalty = jacobian_penalty(lambda z, x: cell(z, x, weight), z, basis, x)
    assert torch.allclose(penalty, exact, rtol=1e-12)
    (ours,) = torch.autograd.grad(penalty.sum(), weight, retain_graph=True)
    (theirs,) = torch.autograd.grad(exact.sum(), weight)
    assert torch.allclose(ours, theirs, rtol=1e-10)


def test_jacobian_penalty_is_unbiased() -> None:
    weight, z, x, exact = problem()
    probes = torch.randn(400, 3, 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        each = torch.stack([jacobian_penalty(lambda z, x: cell(z, x, weight), z, p[None], x).detach() for p in probes])
    assert ((each.mean(0) - exact).abs() < 4 * each.std(0) / 20).all()


def test_correction_loss_pulls_the_iterates_to_the_target() -> None:
    weight, z0, x, _ = problem()
    f = lambda z, x: cell(z, x, weight)  # noqa: E731
    states: list[Tensor] = []
    solution = Picard(max_iterations=100, rtol=1e-12)(
        f, z0, x, callback=lambda k, rows, fz, _: states.append(fz.clone()) if k < 3 else None
    )
    attached = [OneStep().attach(f, z, x) for z in states]
    loss = correction_loss(attached, solution.z, decay=0.5)
    expected = sum(w * (z - solution.z).square().mean((1, 2)) for w, z in zip((0.25, 0.5, 1.0), attached, strict=True))
    assert torch.allclose(loss, expected)
    (gradient,) = torch.autograd.grad(loss.sum(), weight)
    with torch.no_grad():
        weight -= 1e-3 * gradient
    better = correction_loss([OneStep().attach(f, z, x) for z in states], solution.z, decay=0.5)
    assert better.sum() < loss.sum()


@pytest.mark.parametrize("kind", ["spectral", "weight"])
def test_normalise(kind: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    x = torch.randn(2, 2, 4, 4)
    before = network(x)
    assert normalise(network, kind) is network
    if kind == "weight":
        assert torch.allclose(network(x), before, atol=1e-6)
    else:
        for _ in range(100):  # power iterations
            network(x)
        for layer in (network[0], network[3]):
            assert abs(torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() - 1) < 1e-4


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="probes must have the shape"):
        jacobian_penalty(torch.tanh, torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="at least one iterate"):
        correction_loss([], torch.zeros(2, 3))
    with pytest.raises(ValueError, match="spectral or weight"):
        normalise(nn.Linear(2, 2), "batch")
