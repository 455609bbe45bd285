"""Noise models eps(u, t) of a linear diffusion: a network, an exact mixture, and any denoiser on a Gaussian path."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from steadyflow.denoisers.denoiser import Denoiser
from steadyflow.denoisers.network import call, call_whole
from steadyflow.diffusions import LinearDiffusion
from steadyflow.diffusions.linear import inverse
from steadyflow.paths import GaussianPath, combine

INDICES = ((0, 0), (1, 0), (1, 1))  # of a lower triangle


class NoiseModel(nn.Module, ABC):
    """eps(u, t) = -R_t^T grad log p_t(u), for u_t = Psi(t, 0) lift(x_0) + R_t eps of a linear diffusion.

    What a denoiser is to Gaussian paths: once wrapped, nobody asks whether a network was trained to predict the noise
    of R_t or of the Cholesky factor L_t, since eps_R = O_t^T eps_L.
    """

    @abstractmethod
    def forward(self, u: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """eps (B, k C, *rest) in u's dtype, for u of that shape (not in the diffusion's basis), t () or (B,)."""


class NetworkNoise(NoiseModel):
    """A network trained on a linear diffusion to give the noise eps_K of K_t = R_t or L_t. By what it predicts:

        eps          eps_K = network
        eps, s       eps_K = K^T C^-1 u + network,          C = s^2 psi psi^T + Sigma_t,  psi = Psi(t, 0) lift(1)
        v, s         eps_K = K^T C^-1 u + q network / r,    q = s K^-1 psi,  r = sqrt(1 + |q|^2)

    with s the data's standard deviation. The first term is the exact noise of data N(0, s^2 I): the mixed score, beyond
    which the network learns what the data are. What is left of the noise lies along q, as u = psi x_0 + K eps ties it
    to x_0: v = (q^T eps - x_0 / s) / r, of variance 1 at every time and frequency, has the data's channels alone (the
    network's first C). It is what an isotropic path calls v. An error of it is at most as large in eps and s times that
    in x_0; an error of eps is s / |q| times that in x_0, thousands where blurring has left a thousandth, and a flow
    without fresh noise never forgets it.
    Source: Zhang et al. 2023 (gDDIM), Eq. 4-5; Dockhorn et al. 2022, Section 3.2 (mixed score; there of the velocity
    alone, here of the whole state); Salimans & Ho 2022, Section 4 and Karras et al. 2022, Section 5 (isotropic v).

    Args:
        network: module called as network(u (B, k C, *rest), t (B,), **condition) -> (B, k C, *rest), in the precision
            of its own parameters.
        path: the linear diffusion it is trained on.
        factor: K, "R" or "L".
        data_std: s, or None for no mixed score.
        predicts: "eps" or "v", which needs data_std.

    Raises:
        ValueError: another factor or prediction, data_std <= 0, or a Gaussian path, whose predictions are eps, x0 ...
    """

    def __init__(
        self,
        network: nn.Module,
        path: LinearDiffusion,
        factor: str = "R",
        data_std: float | None = None,
        predicts: str = "eps",
    ):
        super().__init__()
        if not isinstance(path, LinearDiffusion):
            raise ValueError(
                f"this prediction is of the noise of a linear diffusion, not of {type(path).__name__}; choose path=cld "
                "or bdm, or prediction=eps"
            )
        if factor not in ("R", "L"):
            raise ValueError(f"factor must be R or L, got {factor}")
        if predicts not in ("eps", "v") or (predicts == "v" and data_std is None):
            raise ValueError(f"predicts must be eps, or v with a data_std, got {predicts} with data_std={data_std}")
        if data_std is not None and not data_std > 0:
            raise ValueError(f"need data_std > 0, or null for no mixed score, got {data_std}")
        self.network, self.path, self.factor, self.data_std, self.predicts = network, path, factor, data_std, predicts

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """u_t = Psi(t, 0) lift(x0) + K_t eps, for x0 (B, C, *rest), eps (B, k C, *rest) and t (B,)."""
        path = self.path
        mean = path.apply(path(t)[0], path.to_basis(path.lift(x0)))
        return path.from_basis(mean + path.apply(self._root(t), path.to_basis(eps)))

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What `output` should be: eps."""
        return eps

    def output(self, u: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        """eps_K (B, k C, *rest)."""
        out = call(self.network, u, t, **condition).to(u.dtype)
        if self.data_std is None:
            return out
        path, root, (psi, covariance) = self.path, self._root(t), self.path(t)
        q = self.data_std * psi[..., :1]
        eps = path.apply(root.mT @ inverse(q @ q.mT + covariance), path.to_basis(u))
        if self.predicts == "eps":
            return out + path.from_basis(eps)
        q = inverse(root) @ q
        along = pad(q / (1 + q.mT @ q).sqrt(), (0, path.variables - 1))  # v is the first variable of a state
        return path.from_basis(eps + path.apply(along, path.to_basis(path.lift(path.data(out)))))

    def forward(self, u: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        eps = self.output(u, t, **condition)
        if self.factor == "R" or self.path.variables == 1:
            return eps
        return self.path.from_basis(self.path.apply(self.path.rotation(t).mT, self.path.to_basis(eps)))

    def _root(self, t: Tensor) -> Tensor:
        return self.path.root(t) if self.factor == "R" else self.path.cholesky(t)


class VelocityNoise(NoiseModel):
    """A network that predicts the noise of the velocity alone, on a diffusion of a position and a velocity u = (x, v).

        eps_v = network(u, t) + l_vv v / Sigma_vv        (mixed score: the exact noise of v ~ N(0, Sigma_vv))
        u = psi x_0 + L (eps_x, eps_v):  two equations for x_0 and eps_x
        eps_R = O^T (eps_x, eps_v),      psi = Psi(t, 0) lift(1)

    The probability flow needs eps_v alone, but a sampler that holds eps_R still over a step needs both; the posterior
    means of x_0 and eps obey the equation of their samples, so the second is exact where the first is. It is well
    conditioned: psi_v and -psi_x l_xv / l_xx, whose sum divides, are both negative for critically-damped Langevin.
    Source: Dockhorn et al. 2022, Eq. 8-9 and Section 3.2.

    Args:
        network: module called as network(u (B, 2 C, *rest), t (B,), **condition) -> (B, C, *rest).
        path: a linear diffusion of two variables without a basis, as CLD.

    Raises:
        ValueError: another path.
    """

    def __init__(self, network: nn.Module, path: LinearDiffusion):
        super().__init__()
        if not isinstance(path, LinearDiffusion) or path.variables != 2 or path.frequencies:
            raise ValueError(
                f"this prediction is of the velocity of a diffusion like CLD, not of {type(path).__name__}"
            )
        self.network, self.path = network, path

    def forward(self, u: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        psi, covariance = self.path(t)
        lower = self.path.cholesky(t)
        (psi_x, psi_v), (l_xx, l_xv, l_vv) = psi[..., 0].unbind(-1), (lower[..., i, j] for i, j in INDICES)
        x, v = u.chunk(2, 1)
        eps_v = combine(
            torch.ones_like(l_vv),
            call_whole(self.network, u, t, **condition).to(u.dtype),
            l_vv / covariance[..., 1, 1],
            v,
        )
        slope = l_xv / l_xx
        scale = 1 / (psi_v - slope * psi_x)
        x0 = combine(-slope * scale, x, scale, combine(torch.ones_like(l_vv), v, -l_vv, eps_v))
        eps_x = combine(1 / l_xx, x, -psi_x / l_xx, x0)
        return self.path.apply(self.path.rotation(t).mT, torch.cat([eps_x, eps_v], 1))


class DenoiserNoise(NoiseModel):
    """A denoiser on a Gaussian path as a noise model: eps = (x - alpha D(x, alpha, sigma)) / sigma."""

    def __init__(self, denoiser: Denoiser, path: GaussianPath):
        super().__init__()
        self.denoiser, self.path = denoiser, path

    def forward(self, u: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        alpha, sigma = self.path(t)
        return combine(1 / sigma, u, -alpha / sigma, self.denoiser(u, alpha, sigma, **condition))


class MixtureNoise(NoiseModel):
    """The exact noise of data x_0 ~ sum_m w_m N(mu_m, c_m I), carried through a linear diffusion, in float64.

        u_t | m ~ N(Psi(t, 0) lift(mu_m), C_m),  C_m = c_m psi psi^T + Sigma_t,  psi = Psi(t, 0) lift(1)
        eps = R_t^T sum_m r_m C_m^-1 (u - Psi lift(mu_m)),  r_m the posterior weight of mode m

    c_m = 0 is a point: several of them are a data set, one is the case in which eps is constant along the flow.

    Args:
        path: the linear diffusion.
        means: (M, C, *rest). variances: (M,), c_m >= 0. weights: (M,), normalised here; equal by default.

    Raises:
        ValueError: shapes that do not fit, negative variances or weights.
    """

    means: Tensor
    variances: Tensor
    log_weights: Tensor

    def __init__(
        self,
        path: LinearDiffusion,
        means: Tensor | Sequence,
        variances: Tensor | Sequence,
        weights: Tensor | Sequence | None = None,
    ):
        super().__init__()
        m, c = (torch.as_tensor(v, dtype=torch.float64) for v in (means, variances))
        w = torch.ones(len(m)).double() if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        if m.ndim < 2 or c.shape != (len(m),) or w.shape != (len(m),) or not ((c >= 0).all() and (w > 0).all()):
            raise ValueError(
                f"need means (M, C, *rest), M variances >= 0 and M weights > 0, got {tuple(m.shape)}, {c.tolist()}, "
                f"{w.tolist()}"
            )
        self.path = path
        for name, value in (("means", m), ("variances", c), ("log_weights", (w / w.sum()).log())):
            self.register_buffer(name, value, persistent=False)

    def log_prob(self, u: Tensor, t: Tensor) -> Tensor:
        """log p_t(u), (B,)."""
        return self._modes(u, t)[0].logsumexp(0)

    def forward(self, u: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        if condition:
            raise ValueError(f"this exact model has no condition, got {', '.join(condition)}; sample without a label")
        log, pulls = self._modes(u, t)
        mixed = torch.einsum("mb,mb...->b...", log.softmax(0), pulls)
        return self.path.from_basis(self.path.apply(self.path.root(t).mT, mixed)).to(u.dtype)

    def _modes(self, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """log w_m p(u | m) (M, B), and C_m^-1 (u - mean of m) in the basis (M, B, k C, *rest)."""
        path, y = self.path, self.path.to_basis(u.double())
        psi, covariance = path(t)
        logs, pulls = [], []
        for mean, variance, log_weight in zip(self.means, self.variances, self.log_weights, strict=True):
            z = y - path.apply(psi, path.to_basis(path.lift(mean[None])).expand_as(y))
            c = variance * psi[..., :1] @ psi[..., :1].mT + covariance
            pull = path.apply(inverse(c), z)
            volume = torch.linalg.det(c).log().reshape(*t.shape, -1).mean(-1) / path.variables  # of one entry
            quadratic = (z * pull).flatten(1).sum(1)
            logs.append(log_weight - 0.5 * (quadratic + z[0].numel() * (volume + math.log(2 * math.pi))))
            pulls.append(pull)
        return torch.stack(logs), torch.stack(pulls)
