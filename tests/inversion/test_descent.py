"""The loop: Adam, leaving, batches, the clock; and the naive gradient, which is autograd's."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from steadyflow.denoisers import EpsDenoiser
from steadyflow.grids import Quadratic
from steadyflow.inversion import DDIMInversion, DEQInversion, Naive
from steadyflow.inversion import descent as module
from steadyflow.inversion.chain import Chain, squared_distance
from steadyflow.noise import NoiseSource
from steadyflow.paths import VariancePreserving
from steadyflow.samplers import DDIM, RK45

F64 = torch.float64


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_the_naive_gradient_is_that_of_plain_autograd(eta, mixture, noise, target, ddim):
    sampler = ddim(8, eta)
    chain = Chain(mixture, sampler, sampler.noises(noise), {})
    x = noise(0).requires_grad_()
    h = x
    for k, (t, s) in enumerate(zip(sampler.times[:-1], sampler.times[1:], strict=True)):
        h = sampler.step(mixture, h, t, s, noise(k + 1) if eta else None)
    ((h - target) ** 2).sum().backward()
    for checkpoint in (True, False):
        loss, g, _ = Naive(checkpoint=checkpoint).gradient(chain, x.detach(), target, None)
        torch.testing.assert_close(g, x.grad, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(loss, ((h - target) ** 2).sum(1).detach(), rtol=1e-12, atol=1e-12)


def saved_numbers(checkpoint: bool, steps: int) -> int:
    """Numbers that autograd keeps for the backward pass of the naive gradient through a small network."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)).double()

    class Timeless(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, x, t):
            return self.inner(x)

    path = VariancePreserving()
    denoiser = EpsDenoiser(Timeless(), path).requires_grad_(False)
    chain, kept = Chain(denoiser, DDIM(path, Quadratic(), steps), None, {}), set()
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=F64)

    def keep(tensor):
        kept.add((tensor.data_ptr(), tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Naive(checkpoint=checkpoint).gradient(chain, x, torch.zeros_like(x), None)
    return sum(count for _, count in kept)


def test_checkpointing_keeps_states_not_activations():
    few, many = saved_numbers(True, 10), saved_numbers(True, 40)
    assert many - few <= 30 * 4 * 3 * 2  # a few states of a step more, not its 2 x 64 activations
    assert saved_numbers(False, 40) > 10 * many


class Fixed(module.Descent):
    """A descent along |x|^2 / 2 scaled by coordinate: known to another implementation."""

    def gradient(self, chain, x, target, memory):
        scale = torch.tensor([1.0, 30.0], dtype=x.dtype)
        return squared_distance(x, target), scale * (x - target), memory


def test_the_update_is_adam(mixture, noise, target, ddim):
    found = Fixed(lr=0.05, epochs=25, threshold=0)(mixture, ddim(), target, noise)
    x = (ddim().path(1.0)[1].item() * noise(0)).requires_grad_()
    adam, losses = torch.optim.Adam([x], lr=0.05), []
    for _ in range(25):
        losses.append(((x.detach() - target) ** 2).sum(1))
        x.grad = torch.tensor([1.0, 30.0], dtype=F64) * (x.detach() - target)
        adam.step()
    torch.testing.assert_close(found.curve, torch.stack(losses), rtol=1e-10, atol=1e-12)


class Blind(Naive):
    """Its losses say nothing."""

    exact = False

    def gradient(self, chain, x, target, memory):
        loss, g, memory = super().gradient(chain, x, target, memory)
        return torch.ones_like(loss), g, memory


def test_an_estimated_loss_is_checked_at_the_end(mixture, noise, target, ddim):
    """All estimates are the same, so the first x_T is kept: unless the last is nearer, which it is."""
    found = Blind(lr=0.05, epochs=6, threshold=0)(mixture, ddim(4), target, noise)
    exact = Naive(lr=0.05, epochs=7, threshold=0)(mixture, ddim(4), target, noise)
    assert (exact.curve.diff(dim=0) < 0).all()
    assert torch.equal(found.latent, exact.latent)


METHODS: dict[str, Callable] = {
    "naive": lambda **options: Naive(lr=0.1, checkpoint=False, **options),
    "deq": lambda **options: DEQInversion(lr=0.1, **options),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_the_latent_found_makes_the_image(name, eta, mixture, noise, target, ddim):
    method, sampler = METHODS[name](epochs=150, threshold=1e-5), ddim(4, eta)
    target = target if eta == 0 else sampler(mixture, noise, start=noise(99))  # with these noises not all can be made
    found = method(mixture, sampler, target, noise)
    assert (found.epochs < 150).all()  # all have reached it
    image = sampler(mixture, noise, start=found.latent)
    assert (image - target).norm(dim=1).max() < 3.2e-3
    torch.testing.assert_close(method.image(mixture, sampler, found.latent, noise), image)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_is_its_singles(name, mixture, noise, target, ddim):
    method, sampler = METHODS[name](epochs=20, threshold=0.1), ddim(4, 0.5)
    whole = method(mixture, sampler, target, noise)
    assert len(whole.epochs.unique()) > 1  # they leave at different epochs
    for i in range(len(target)):
        single = method(mixture, sampler, target[i : i + 1], NoiseSource(0, [i], (2,), dtype=F64))
        n = int(single.epochs)
        assert n == whole.epochs[i]
        torch.testing.assert_close(single.latent[0], whole.latent[i], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(single.curve[:, 0], whole.curve[:n, i], rtol=1e-9, atol=1e-11)
        assert whole.curve[n:, i].isnan().all()
    assert whole.curve[whole.epochs - 1, range(4)].le(0.1)[whole.epochs < 20].all()


def test_the_best_epoch_is_kept(mixture, noise, target, ddim):
    """With a step far too long the loss goes up and down."""
    sampler = ddim(6)
    found = Naive(lr=0.8, epochs=30, threshold=0)(mixture, sampler, target, noise)
    assert (found.curve.argmin(0) < 29).any()
    loss = squared_distance(sampler(mixture, noise, start=found.latent), target)
    torch.testing.assert_close(loss, found.curve.min(0).values, rtol=1e-9, atol=1e-12)


def test_what_is_found_after_the_time_does_not_count(mixture, noise, target, ddim, monkeypatch):
    """Every look at this clock takes a second; an epoch looks four times, and its two halves take one each."""
    ticks = iter(range(10000))
    monkeypatch.setitem(module.CLOCKS, "wall", lambda: float(next(ticks)))
    found = Naive(lr=0.05, epochs=100, threshold=0, budget=2.0)(mixture, ddim(4), target, noise)
    assert found.clock[:, 0].tolist() == [0.5 + 0.5 * k for k in range(len(found.clock))]  # shared by 4, 1 s to begin
    assert found.clock[-1, 0] == 2.0
    assert (found.seconds == 2.0).all()
    only = Naive(epochs=100, budget=1e-9)(mixture, ddim(4), target, noise)
    assert only.epochs.tolist() == [1] * 4  # there is always a result


def test_beginning_where_ddim_inversion_ends(mixture, noise, target, ddim):
    sampler = ddim(12)
    near = DDIMInversion()(mixture, sampler, target, noise).latent
    found = Naive(epochs=1, threshold=0, start="ddim_inversion")(mixture, sampler, target, noise)
    torch.testing.assert_close(found.latent, near, rtol=0, atol=0)
    far = Naive(epochs=1, threshold=0)(mixture, sampler, target, noise)
    assert (found.curve[0] < far.curve[0]).all()


def test_progress_goes_from_nothing_to_all(mixture, noise, target, ddim):
    seen: list[float] = []
    Naive(epochs=5, threshold=0)(mixture, ddim(3), target, noise, progress=seen.append)
    assert seen == [0.2, 0.4, 0.6, 0.8, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be a positive integer, got 0"),
        ({"lr": 0.0}, "lr must be positive, got 0"),
        ({"threshold": -1}, "threshold must be at least 0, got -1"),
        ({"budget": 0}, "budget must be positive"),
        ({"clock": "sun"}, "clock must be wall or process, got 'sun'"),
        ({"start": "nose"}, "start must be noise or ddim_inversion, got 'nose'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Naive(**options)


def test_mistakes(mixture, noise, target, ddim):
    with pytest.raises(ValueError, match="inversion needs a one-step sampler, got RK45; set sampler=ddim"):
        Naive()(mixture, RK45(VariancePreserving()), target, noise)
    with pytest.raises(ValueError, match="ddim_inversion inverts deterministic DDIM, got eta=1"):
        Naive(start="ddim_inversion")(mixture, ddim(4, 1.0), target, noise)
    with pytest.raises(FloatingPointError, match="the loss is not finite at epoch 1 of 5; take a smaller lr"):
        Naive(epochs=5)(mixture, ddim(4), target * torch.nan, noise)
