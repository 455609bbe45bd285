"""The noise of the velocity alone, from which that of the whole state follows."""

import pytest
import torch
from torch import Tensor, nn

from steadyflow.denoisers import MixtureNoise, VelocityNoise
from steadyflow.diffusions import CLD
from steadyflow.paths import VariancePreserving

POINTS = torch.tensor([[[[0.7]]], [[[-0.4]]]], dtype=torch.float64)


@pytest.mark.parametrize("diffusion", [CLD(), CLD(beta=2.0, mass=1.0, damping=2.0, initial=0.5)])
def test_a_network_that_is_exact_for_the_velocity_is_exact_for_both(diffusion: CLD) -> None:
    exact = MixtureNoise(diffusion, POINTS, [0.09, 0.3])

    class Network(nn.Module):
        def forward(self, u: Tensor, t: Tensor) -> Tensor:
            """What the mixed score leaves of the exact noise of the velocity."""
            lower, variance = diffusion.cholesky(t)[:, 1, 1], diffusion.covariance(t)[:, 1, 1]
            eps = diffusion.apply(diffusion.rotation(t), exact(u, t)).chunk(2, 1)[1]
            return eps - (lower / variance)[:, None, None, None] * u.chunk(2, 1)[1]

    t = torch.tensor([1e-4, 1e-2, 0.3, 1.0], dtype=torch.float64)
    u = torch.tensor([[1.0, -0.6], [-0.1, 1.7], [1.3, 0.4], [1.5, -0.7]], dtype=torch.float64)[:, :, None, None]
    model, network = VelocityNoise(Network(), diffusion), Network()
    model.network.register_parameter("dtype", nn.Parameter(torch.zeros(1, dtype=torch.float64)))
    torch.testing.assert_close(model(u, t), exact(u, t), rtol=1e-9, atol=1e-9)
    assert network(u, t).abs().max() > 0.02
    for i in range(4):
        torch.testing.assert_close(model(u[i : i + 1], t[i]), exact(u[i : i + 1], t[i]), rtol=1e-9, atol=1e-9)


def test_other_paths_are_refused() -> None:
    with pytest.raises(ValueError, match="velocity of a diffusion like CLD, not of VariancePreserving"):
        VelocityNoise(nn.Identity(), VariancePreserving())  # type: ignore[arg-type]
