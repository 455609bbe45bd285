"""The residual MLP: its size, its zero start, its conditioning, and that it learns a field known in closed form."""

import pytest
import torch
from torch import Tensor

from steadyflow.networks import MLP


def perturbed(**options: object) -> MLP:
    """A small network with random weights everywhere, the zero-initialised ones included."""
    torch.manual_seed(0)
    network = MLP(**{"dim": 3, "width": 16, "blocks": 2, **options})  # type: ignore[arg-type]
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p) / p[0].numel() ** 0.5)
    return network


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, generator=generator, dtype=dtype)
    return x, torch.rand(4, generator=generator, dtype=dtype), torch.tensor([0, 1, 4, 2])


@pytest.mark.parametrize(("dim", "width", "blocks", "classes"), [(2, 32, 3, 0), (5, 16, 1, 7)])
def test_parameter_count_equals_the_closed_form(dim: int, width: int, blocks: int, classes: int) -> None:
    square = width * width + width
    conditioning = 2 * square + (classes + 1) * width * bool(classes)
    expected = conditioning + (dim + 1) * width + blocks * 4 * square + 2 * square + (width + 1) * dim
    network = MLP(dim, width, blocks, num_classes=classes)
    assert sum(p.numel() for p in network.parameters()) == expected


def test_a_new_network_returns_exactly_zero_and_its_blocks_are_the_identity() -> None:
    network = MLP(3, 16, 2, num_classes=4)
    x, t, label = inputs()
    assert network(x, t, label).count_nonzero() == 0
    h = torch.randn(4, 16)
    assert all(torch.equal(block(h, torch.randn(4, 16)), h) for block in network.blocks)


def test_gradient_reaches_every_parameter() -> None:
    network = perturbed(num_classes=4)
    x, t, label = inputs()
    network(x, t, label).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_batch_equals_singles() -> None:
    network = perturbed(num_classes=4).double().eval()
    x, t, label = inputs(torch.float64)
    singles = [network(x[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(network(x, t, label), torch.cat(singles), rtol=1e-12, atol=1e-12)


def test_no_label_is_the_null_label_and_label_and_time_matter() -> None:
    network = perturbed(num_classes=4).eval()
    x, t, label = inputs()
    null = network(x, t)
    assert torch.equal(null, network(x, t, torch.full((4,), 4)))
    assert torch.equal(null[2], network(x, t, label)[2])
    assert (null - network(x, t, label))[[0, 1, 3]].abs().amin(1).max() > 1e-3
    assert not torch.allclose(null, network(x, t.flip(0)), atol=1e-3)


def test_bf16_autocast_agrees_with_float32() -> None:
    network = perturbed().eval()
    x, t, _ = inputs()
    exact = network(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        half = network(x, t)
    assert half.dtype == torch.bfloat16
    error = (half.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-5 < error < 0.03


def test_it_learns_the_optimal_denoiser_of_a_gaussian() -> None:
    # For x_0 ~ N(0, s^2) and x = (1 - t) x_0 + t eps, E[x_0 | x] = (1 - t) s^2 x / ((1 - t)^2 s^2 + t^2). Trained by
    # regression on x_0 alone, the network must come near it, which takes x and t together.
    torch.manual_seed(0)
    network, s = MLP(1, 32, 2), 0.5
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 250)
        t, x0 = torch.rand(256), s * torch.randn(256, 1)
        loss = (network((1 - t[:, None]) * x0 + t[:, None] * torch.randn(256, 1), t) - x0).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    t = torch.linspace(0, 1, 21).repeat_interleave(21)
    deviation = ((1 - t) ** 2 * s**2 + t**2).sqrt()
    x = torch.linspace(-2, 2, 21).repeat(21) * deviation
    exact = (1 - t) * s**2 * x / deviation**2
    with torch.no_grad():
        error = (network(x[:, None], t)[:, 0] - exact).square().mean().sqrt()
    assert error < 0.1 * exact.square().mean().sqrt()


@pytest.mark.parametrize(
    ("x", "t", "label", "message"),
    [
        ((2, 2), 2, None, r"takes vectors \(B, 3\), got shape \(2, 2\)"),
        ((2, 3, 1), 2, None, r"takes vectors \(B, 3\), got shape \(2, 3, 1\)"),
        ((2, 3), 1, None, r"time must have shape \(2,\), got \(1,\)"),
        ((2, 3), 2, torch.tensor([0, 5]), "label 5 is out of range: classes are 0..3, the null label is 4"),
    ],
)
def test_a_wrong_call_is_one_line(x: tuple, t: int, label: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLP(3, 16, 1, num_classes=4)(torch.zeros(x), torch.zeros(t), label)


def test_a_wrong_size_is_one_line_at_construction() -> None:
    with pytest.raises(ValueError, match="dim >= 1 and blocks >= 1, got 2 and 0"):
        MLP(2, blocks=0)
    with pytest.raises(ValueError, match="even dimension of at least 4, got 7"):
        MLP(2, width=7)
