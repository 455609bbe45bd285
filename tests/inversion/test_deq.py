"""Inversion through the equilibrium: its gradients against their definitions."""

import math
import warnings

import pytest
import torch

from steadyflow.denoisers import Gaussian
from steadyflow.equilibrium import Anderson, Picard
from steadyflow.inversion import DEQInversion, Naive
from steadyflow.inversion.chain import Chain, squared_distance
from steadyflow.samplers.trajectory import Transport

F64 = torch.float64
SOLVERS = {
    "sequential": None,
    "picard": Picard(max_iterations=20, rtol=1e-13),
    "anderson": Anderson(m=3, mixing="causal", max_iterations=30, rtol=1e-12),
}


def chain_of(sampler, mixture, noise) -> Chain:
    return Chain(mixture, sampler, sampler.noises(noise), {})


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("variance", [math.inf, None, 0.25])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_the_one_step_gradient_is_its_definition(eta, variance, solver, mixture, noise, target, ddim):
    """Autograd through z' = tau F(z*; x_T) + (1 - tau) z* with z* held fixed; Pokle 2025, Eq. 3.18."""
    chain = chain_of(ddim(8, eta), mixture, noise)
    x = noise(0).requires_grad_()
    z = chain.states(x)
    image = Transport(chain.sampler, variance).sweep(mixture, z, x, chain.noises)
    (0.1 * image + 0.9 * z)[:, -1].sub(target).square().sum().backward()
    method = DEQInversion(SOLVERS[solver], tau=0.1, variance=variance)
    loss, g, _ = method.gradient(chain, x.detach(), target, None)
    torch.testing.assert_close(g, x.grad, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(loss, (z[:, -1] - target).square().sum(1), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_the_ift_gradient_is_the_exact_one(eta, solver, mixture, noise, target, ddim):
    chain, x = chain_of(ddim(8, eta), mixture, noise), noise(0)
    loss, exact, _ = Naive().gradient(chain, x, target, None)
    method = DEQInversion(SOLVERS[solver], gradient="ift")
    found = method.gradient(chain, x, target, None)
    torch.testing.assert_close(found[0], loss, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found[1], exact, rtol=1e-4, atol=1e-6)


def test_the_phantom_gradient_lies_between(mixture, noise, target, ddim):
    """One step is the one-step gradient; undamped, N steps are exact, since F is triangular."""
    chain, x = chain_of(ddim(6), mixture, noise), noise(0)
    exact = Naive().gradient(chain, x, target, None)[1]
    one = DEQInversion(tau=0.3).gradient(chain, x, target, None)[1]

    def phantom(tau: float, steps: int) -> torch.Tensor:
        return DEQInversion(gradient="phantom", tau=tau, phantom_steps=steps).gradient(chain, x, target, None)[1]

    torch.testing.assert_close(phantom(0.3, 1), one, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(phantom(1.0, 6), exact, rtol=1e-9, atol=1e-10)
    assert 1e-3 < (phantom(1.0, 2) - exact).norm() / exact.norm() < 0.5


@pytest.mark.parametrize("options", [{}, {"gradient": "phantom", "tau": 0.5, "phantom_steps": 3}, {"gradient": "ift"}])
def test_every_gradient_finds_the_latent(options, mixture, noise, target, ddim):
    sampler, solver = ddim(6), Anderson(m=3, mixing="causal", max_iterations=15, rtol=1e-6)
    found = DEQInversion(solver, lr=0.1, epochs=200, threshold=1e-4, **options)(mixture, sampler, target, noise)
    assert (found.epochs < 200).all()
    assert (sampler(mixture, noise, start=found.latent) - target).norm(dim=1).max() < 1.1e-2


def test_one_sweep_an_epoch_finds_it_too(mixture, noise, target, ddim):
    """The equilibrium is found while x_T is, and no image leaves on a loss that is not its latent's."""
    sampler, solver = ddim(5), Picard(max_iterations=1, rtol=0.0)
    found = DEQInversion(solver, lr=0.05, epochs=150, threshold=1e-3)(mixture, sampler, target, noise)
    assert (found.epochs < 150).all()
    loss = squared_distance(sampler(mixture, noise, start=found.latent), target)
    assert loss.max() <= 1e-3
    torch.testing.assert_close(found.curve.nan_to_num(math.inf).amin(0), loss, rtol=1e-9, atol=0)


def test_a_warm_start_saves_iterations_and_changes_nothing(mixture, noise, target, ddim):
    class Counted(Picard):
        count = 0

        def __call__(self, f, z0, *args, **options):
            solution = super().__call__(f, z0, *args, **options)
            self.count += int(solution.iterations.sum())
            return solution

    counts, latents = [], []
    for warm in (True, False):
        solver = Counted(max_iterations=20, rtol=1e-3)
        found = DEQInversion(solver, warm=warm, epochs=20, threshold=0)(mixture, ddim(12), target, noise)
        counts.append(solver.count)
        latents.append(found.latent)
    torch.testing.assert_close(*latents, rtol=1e-2, atol=1e-3)
    assert counts[0] < 0.75 * counts[1]


def test_its_condition_number_is_the_chains_and_that_of_the_gradient_its_square(noise, ddim):
    """On Gaussian data x_0 is linear in x_T, and so are both gradients; the chain's Jacobian has condition 20."""
    denoiser, sampler = Gaussian([0.0, 0.0], [[1.0025 / 2, 0.9975 / 2], [0.9975 / 2, 1.0025 / 2]]), ddim(50)
    chain, zero = chain_of(sampler, denoiser, noise).rows(torch.arange(2)), torch.zeros(2, 2, dtype=F64)
    jacobian = torch.linalg.cond(chain.states(torch.eye(2, dtype=F64))[:, -1])
    assert jacobian > 10
    for method, power in ((DEQInversion(), 1), (Naive(), 2)):
        g = method.gradient(chain, torch.eye(2, dtype=F64), zero, None)[1]
        assert torch.linalg.cond(g) == pytest.approx(float(jacobian) ** power, rel=0.05)


def test_mistakes(mixture, noise, target, ddim):
    with pytest.raises(ValueError, match="gradient must be one_step, phantom or ift, got 'exact'"):
        DEQInversion(gradient="exact")
    with pytest.raises(ValueError, match="need 0 < tau <= 1, got 0"):
        DEQInversion(tau=0)
    with pytest.raises(ValueError, match="steps >= 1"):
        DEQInversion(gradient="phantom", phantom_steps=0)
    with warnings.catch_warnings(), pytest.raises(FloatingPointError, match="not finite"):
        DEQInversion(epochs=2)(mixture, ddim(4), target * torch.nan, noise)
