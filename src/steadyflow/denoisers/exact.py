"""Exact denoisers, in closed form, of Gaussians, Gaussian mixtures and finite data sets."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from steadyflow.denoisers.denoiser import Denoiser

TINY = 1e-20  # sigma = 0 is read as this, the limit of the formulas below in float64


class GaussianMixture(Denoiser):
    """E[x_0 | x] for x_0 ~ sum_k w_k N(m_k, C_k).

        D = sum_k r_k [m_k + alpha C_k (alpha^2 C_k + sigma^2 I)^-1 (x - alpha m_k)]
        r_k ~ w_k N(x; alpha m_k, alpha^2 C_k + sigma^2 I),  sum_k r_k = 1

    computed in float64 in the eigenbasis of each C_k, found once: a call costs O(B K D) for isotropic and diagonal
    covariances, O(B K D^2) for full ones and O(B D^2 + B K D) for a full one shared by all modes.

    Args:
        means: (K, *S).
        covariances: (K,) isotropic variances; (K, *S) or (K, D) diagonals, D = prod(S); (K, D, D) full, or (1, D, D)
            shared.
        weights: (K,), positive, normalised here; equal by default.
        labels: (K,) the class of each mode, 0..C-1. With them the denoiser takes `label` (B,): a sample's modes are
            those of its class, all of them for the null label C.

    Raises:
        ValueError: shapes that do not fit, weights that are not positive, a covariance with a negative eigenvalue.
    """

    means: Tensor
    values: Tensor
    basis: Tensor | None
    log_weights: Tensor
    labels: Tensor | None

    def __init__(
        self,
        means: Tensor | Sequence,
        covariances: Tensor | Sequence,
        weights: Tensor | Sequence | None = None,
        labels: Tensor | Sequence | None = None,
    ):
        super().__init__()
        m, c = torch.as_tensor(means, dtype=torch.float64), torch.as_tensor(covariances, dtype=torch.float64)
        if m.ndim < 2:
            raise ValueError(f"means must be (K, *S), got {tuple(m.shape)}")
        k, self.shape = len(m), tuple(m.shape[1:])
        m, d = m.flatten(1), m[0].numel()
        w = torch.ones(k, dtype=torch.float64) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        if w.shape != (k,) or not (w > 0).all():
            raise ValueError(f"weights must be {k} positive numbers, got {w.tolist()}")
        basis = None
        if c.shape in ((k, d, d), (1, d, d)):
            values, basis = torch.linalg.eigh(c)
            rounding = 1e-14 * d * values.abs().amax(1, keepdim=True)
            values = torch.where(values.abs() < rounding, 0.0, values)
            m = (m.unsqueeze(1) @ basis).squeeze(1)  # means in the eigenbasis
        elif c.shape in ((k,), (k, d), (k, *self.shape)):
            values = c.reshape(k, -1)
        else:
            raise ValueError(
                f"covariances must be ({k},), ({k}, {d}), ({k}, {d}, {d}) or (1, {d}, {d}), got {tuple(c.shape)}"
            )
        if not (values >= 0).all():
            raise ValueError(f"a covariance has the negative eigenvalue {values.min():.3g}")
        for name, value in (("means", m), ("values", values), ("basis", basis), ("log_weights", (w / w.sum()).log())):
            value = None if value is None else value.contiguous()  # no expanded view, which processes cannot share
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("labels", _classes(labels, k), persistent=False)

    def _modes(self, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """x - alpha m in the eigenbasis (K, B, D), its variances (K, B, 1 or D), log w_k p_k(x) (K, B)."""
        y = x.flatten(1).to(self.means.dtype)
        y = y.unsqueeze(0) if self.basis is None else y @ self.basis
        alpha, sigma = (torch.as_tensor(v).to(y).reshape(-1, 1) for v in (alpha, sigma))
        z = y - alpha * self.means.unsqueeze(1)
        variance = alpha**2 * self.values.unsqueeze(1) + sigma.clamp(min=TINY) ** 2
        d = z.shape[2]
        log = -0.5 * ((z * z / variance).sum(2) + variance.log().sum(2) * (d / variance.shape[2]))
        log = log + (self.log_weights - 0.5 * d * math.log(2 * math.pi)).unsqueeze(1)
        keep = _members(self.labels, label)
        return z, variance, log if keep is None else log.masked_fill(~keep.T, -math.inf)

    def log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log p(x) of x = alpha x_0 + sigma eps, (B,) in float64."""
        return self._modes(x, alpha, sigma, None)[2].logsumexp(0)

    def forward(  # type: ignore[override]  # the only condition it knows is the label
        self, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None = None
    ) -> Tensor:
        z, variance, log = self._modes(x, alpha, sigma, label)
        alpha = torch.as_tensor(alpha).to(z).reshape(-1, 1)
        gain = alpha * self.values.unsqueeze(1) / variance
        r = log.softmax(0).unsqueeze(2)
        if self.basis is None or len(self.basis) == 1:
            out = (r * (self.means.unsqueeze(1) + gain * z)).sum(0)
            out = out if self.basis is None else out @ self.basis[0].T
        else:
            out = ((r * (self.means.unsqueeze(1) + gain * z)) @ self.basis.mT).sum(0)
        return out.reshape(x.shape).to(x.dtype)


class Gaussian(GaussianMixture):
    """E[x_0 | x] for x_0 ~ N(m, C): D = m + alpha C (alpha^2 C + sigma^2 I)^-1 (x - alpha m).

    Args:
        mean: (*S).
        covariance: () isotropic variance, (*S) or (D,) diagonal, or (D, D) full, D = prod(S).
    """

    def __init__(self, mean: Tensor | Sequence, covariance: Tensor | Sequence | float):
        mean, covariance = (torch.as_tensor(v, dtype=torch.float64) for v in (mean, covariance))
        super().__init__(mean.unsqueeze(0), covariance.unsqueeze(0))


class Empirical(Denoiser):
    """E[x_0 | x] for x_0 uniform on a data set: D = sum_n softmax_n(-|x - alpha x_n|^2 / (2 sigma^2)) x_n.

    Computed in float64, the data taken in chunks with a running softmax: a call costs O(B N D) by matrix products and
    O(B chunk + chunk D) memory. At sigma = 0 it is the nearest point.

    Args:
        data: (N, *S), kept in its own dtype.
        labels: (N,) the class of each point, 0..C-1. With them the denoiser takes `label` (B,): a sample's points are
            those of its class, all of them for the null label C.
        chunk: how many points are taken at a time.
    """

    data: Tensor
    labels: Tensor | None
    centre: Tensor
    norms: Tensor

    def __init__(self, data: Tensor, labels: Tensor | Sequence | None = None, chunk: int = 4096):
        super().__init__()
        if data.ndim < 2 or len(data) == 0:
            raise ValueError(f"data must be (N, *S) with N > 0, got {tuple(data.shape)}")
        self.chunk = chunk
        self.register_buffer("data", data.flatten(1), persistent=False)
        self.register_buffer("labels", _classes(labels, len(data)), persistent=False)
        centre = self.data.mean(0, dtype=torch.float64)  # distances from the centre lose fewer digits
        norms = torch.cat([(part.double() - centre).square().sum(1) for part in self.data.split(chunk)])
        self.register_buffer("centre", centre, persistent=False)
        self.register_buffer("norms", norms, persistent=False)

    def forward(  # type: ignore[override]  # the only condition it knows is the label
        self, x: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor | None = None
    ) -> Tensor:
        y = x.flatten(1).double()
        alpha, sigma = (torch.as_tensor(v).to(y).reshape(-1, 1) for v in (alpha, sigma))
        sigma = sigma.clamp(min=TINY)
        y = (y - alpha * self.centre) * (alpha / sigma**2)
        half = 0.5 * (alpha / sigma) ** 2
        keep = _members(self.labels, label)
        top = torch.full_like(y[:, :1], -math.inf)
        total, out = torch.zeros_like(top), torch.zeros_like(y)
        for i in range(0, len(self.data), self.chunk):
            part = self.data[i : i + self.chunk].double() - self.centre
            log = y @ part.T - half * self.norms[i : i + self.chunk]
            if keep is not None:
                log = log.masked_fill(~keep[:, i : i + self.chunk], -math.inf)
            new = torch.maximum(top, log.amax(1, keepdim=True))
            scale = torch.where(new > -math.inf, torch.exp(top - new), 1.0)
            p = torch.where(new > -math.inf, torch.exp(log - new), 0.0)
            out, total, top = out * scale + p @ part, total * scale + p.sum(1, keepdim=True), new
        return (out / total + self.centre).reshape(x.shape).to(x.dtype)


def _classes(labels: Tensor | Sequence | None, count: int) -> Tensor | None:
    """Class labels (count,) as int64, checked."""
    if labels is None:
        return None
    classes = torch.as_tensor(labels).long()
    if classes.shape != (count,) or classes.unique().tolist() != list(range(int(classes.max()) + 1)):
        raise ValueError(f"labels must be {count} integers, each class 0..C-1 present, got {classes.unique().tolist()}")
    return classes


def _members(labels: Tensor | None, label: Tensor | None) -> Tensor | None:
    """Which of the K modes are of sample b's class, (B, K); the null label keeps all, no label is no selection."""
    if label is None:
        return None
    if labels is None:
        raise ValueError("this exact denoiser has no classes; give it labels, or sample without a label")
    label = label.unsqueeze(1)
    return (labels == label) | (label > labels.max())
