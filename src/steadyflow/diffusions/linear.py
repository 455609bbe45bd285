"""What a linear diffusion is: the matrices of du = F_t u dt + G_t dw, and their action on a state."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from steadyflow.paths import Time


class LinearDiffusion(ABC):
    """du = F_t u dt + G_t dw from u_0 = lift(x_0) at t = 0 to noise at t = 1:  u_t | x_0 ~ N(Psi(t, 0) u_0, Sigma_t).

        d Psi(t, s) / dt = F_t Psi(t, s),  Psi(s, s) = I;    d Sigma / dt = F Sigma + Sigma F^T + G G^T
        dR / dt = (F + 1/2 G G^T Sigma^-1) R = F R + B,  B_t = 1/2 G G^T R^-T;    R R^T = L L^T = Sigma,  R = L O

    L is the lower Cholesky factor and O an orthogonal matrix. With the noise eps(u, t) = -R_t^T grad log p_t(u) the
    probability flow is du/dt = F u + B eps, and eps is constant along it if the data are one point.

    The state u (B, k C, *rest) holds k variables of the data's shape (B, C, *rest), stacked on the channels (k = 2 for
    a position and a velocity). The matrices act on the k variables, at each frequency of an orthonormal basis where
    there is one: a block is a float64 tensor (*T, *F, k, k), T the shape of t and F that of the frequencies, or ().

    A square root of Sigma_0, which is singular, need not be given: R is fixed at t = 1 by R_1 = L_1 (O_1 = I).
    Source: Zhang et al. 2023 (gDDIM), Eq. 1, 11, 17 (thesis Eq. 7.1, 7.7, 7.16-7.17).
    """

    variables: int = 1  # k

    def __call__(self, t: Time) -> tuple[Tensor, Tensor]:
        """(Psi(t, 0), Sigma_t): the law of u_t given u_0."""
        return self.transition(t, torch.zeros((), dtype=torch.float64)), self.covariance(t)

    @abstractmethod
    def drift(self, t: Time) -> Tensor:
        """F_t."""

    @abstractmethod
    def noise(self, t: Time) -> Tensor:
        """G_t."""

    @abstractmethod
    def transition(self, t: Time, s: Time) -> Tensor:
        """Psi(t, s), for t after or before s."""

    @abstractmethod
    def covariance(self, t: Time) -> Tensor:
        """Sigma_t."""

    @abstractmethod
    def cholesky(self, t: Time) -> Tensor:
        """L_t; at t = 0 its limit."""

    @abstractmethod
    def rotation(self, t: Time) -> Tensor:
        """O_t = L_t^-1 R_t."""

    @abstractmethod
    def rate(self, t: Time) -> Tensor:
        """B_t = 1/2 G_t G_t^T R_t^-T, t > 0."""

    @abstractmethod
    def damped_transition(self, t: Time, s: Time, lambda_: float) -> Tensor:
        """Psi^(t, s), t <= s: the transition of F^ = F + (1 + lambda^2) / 2 G G^T Sigma^-1 (thesis Prop. 9).

        R_t R_s^-1 for lambda = 0, Sigma_t Psi(s, t)^T Sigma_s^-1 for lambda = 1.
        """

    def root(self, t: Time) -> Tensor:
        """R_t = L_t O_t."""
        return self.cholesky(t) @ self.rotation(t)

    def lift(self, x: Tensor) -> Tensor:
        """The mean of u_0 given the data x (B, C, *rest): x, the other variables 0."""
        return torch.cat([x] + [torch.zeros_like(x)] * (self.variables - 1), 1)

    def data(self, u: Tensor) -> Tensor:
        """The data's part x (B, C, *rest) of a state: its first variable."""
        return u.unflatten(1, (self.variables, -1))[:, 0]

    def to_basis(self, u: Tensor) -> Tensor:
        """The state in the orthonormal basis in which the matrices are blocks; here the identity."""
        return u

    def from_basis(self, y: Tensor) -> Tensor:
        """The inverse of to_basis, its transpose."""
        return y

    def apply(self, block: Tensor, y: Tensor) -> Tensor:
        """A y for a block (*F, k, k), or (B, *F, k, k) with one of each item, and y (B, k C, *rest) in the basis."""
        k = self.variables
        parts = y.unflatten(1, (k, -1)).unbind(1)
        block = block.to(y.dtype) if block.ndim == 2 else block.to(y.device, y.dtype)  # 0-dim entries may stay
        frequencies = self.frequencies
        if block.ndim == 3 + len(frequencies):  # one of each item: room for the channels, and for *rest
            block = block.reshape(len(block), 1, *(frequencies or [1] * (y.ndim - 2)), k, k)
        return torch.cat([sum(block[..., i, j] * parts[j] for j in range(k)) for i in range(k)], 1)

    @property
    def frequencies(self) -> tuple[int, ...]:
        """F."""
        return ()

    @property
    def knots(self) -> Tensor:
        """The times (K,), rising, at which F or G jumps."""
        return torch.empty(0, dtype=torch.float64)

    def ratio(self, t: Time) -> Tensor:
        """Grids and training times that are rules in sigma / alpha ask for it."""
        raise ValueError(
            f"{type(self).__name__} has no single noise-to-signal ratio; choose times by t: sampler/grid=quadratic or "
            "uniform, times=uniform or logit_normal"
        )

    time_at = ratio


def inverse(block: Tensor) -> Tensor:
    """A^-1 of blocks (..., k, k), k <= 2."""
    if block.shape[-1] == 1:
        return 1 / block
    (a, b), (c, d) = (row.unbind(-1) for row in block.unbind(-2))
    adjugate = torch.stack([torch.stack([d, -b], -1), torch.stack([-c, a], -1)], -2)
    return adjugate / (a * d - b * c)[..., None, None]


def factor(block: Tensor) -> Tensor:
    """The lower Cholesky factor of positive semidefinite blocks (..., k, k), k <= 2, forgiving rounding below zero."""
    if block.shape[-1] == 1:
        return block.clamp(min=0).sqrt()
    xx, xv, vv = block[..., 0, 0].clamp(min=0).sqrt(), block[..., 1, 0], block[..., 1, 1]
    lower = torch.where(xx > 0, xv / xx, 0.0)
    zero = torch.zeros_like(xx)
    last = (vv - lower * lower).clamp(min=0).sqrt()
    return torch.stack([torch.stack([xx, zero], -1), torch.stack([lower, last], -1)], -2)


def float64(t: Time) -> Tensor:
    """A time as a float64 tensor."""
    return torch.as_tensor(t, dtype=torch.float64)
