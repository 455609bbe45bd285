"""A classifier of noisy samples, asked at any (alpha, sigma)."""

from torch import Tensor, nn

from steadyflow.denoisers.network import call_whole
from steadyflow.paths import GaussianPath, expand


class NetworkClassifier(nn.Module):
    """log p(label | x) for x = alpha x_0 + sigma eps, by a network trained on the noisy samples of a path.

        t = time_at(sigma / alpha),  log p(label | x) = network(x (alpha' + sigma') / (alpha + sigma), t, label)

    with (alpha', sigma') = path(t), as for denoisers: p(label | c x, c alpha, c sigma) = p(label | x, alpha, sigma).

    Args:
        network: module called as network(x (B, *S), t (B,), label (B,)) -> log-probability (B,).
        path: the path it was trained on.
        clock: (a, b); the network's own time is max(a t + b, 0); see NetworkDenoiser.
    """

    def __init__(self, network: nn.Module, path: GaussianPath, clock: tuple[float, float] = (1.0, 0.0)):
        super().__init__()
        rate, start = clock
        self.network, self.path, self.clock = network, path, (float(rate), float(start))

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """The log-probability (B,) of each sample's label (B,)."""
        t = self.path.time_at(sigma / alpha)
        own = self.path(t)
        x = x * expand((own[0] + own[1]) / (alpha + sigma), x)
        time = (self.clock[0] * t + self.clock[1]).clamp(min=0)
        return call_whole(self.network, x, time, label=label).to(x.dtype)
