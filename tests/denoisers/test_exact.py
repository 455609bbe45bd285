"""Exact denoisers against quadrature, dense linear algebra, Tweedie's formula and their limits."""

import math

import pytest
import torch

from steadyflow.denoisers import Empirical, Gaussian, GaussianMixture, Photographs

F64 = torch.float64


def pair(alpha, sigma):
    return torch.tensor(alpha, dtype=F64), torch.tensor(sigma, dtype=F64)


def random_mixture(k=4, d=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(k, d, generator=g, dtype=F64)
    factor = torch.randn(k, d, d, generator=g, dtype=F64)
    weights = torch.rand(k, generator=g, dtype=F64) + 0.1
    return means, 0.2 * factor @ factor.mT + 0.05 * torch.eye(d, dtype=F64), weights


def states(count, *shape, seed=1):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def dense(x, alpha, sigma, means, covariances, weights):
    """The posterior mean and log p(x) by dense solves, mode by mode."""
    eye = torch.eye(means.shape[1], dtype=F64)
    mean, log = [], []
    for m, c, w in zip(means, covariances, weights / weights.sum(), strict=True):
        v = alpha**2 * c + sigma**2 * eye
        mean.append(m + alpha * torch.linalg.solve(v, (x - alpha * m).T).T @ c)
        log.append(w.log() + torch.distributions.MultivariateNormal(alpha * m, v).log_prob(x))
    r = torch.stack(log).softmax(0)
    return (r.unsqueeze(2) * torch.stack(mean)).sum(0), torch.stack(log).logsumexp(0)


@pytest.mark.parametrize(("alpha", "sigma"), [(1.0, 0.05), (0.8, 0.6), (0.1, 1.0), (1.0, 30.0)])
def test_mixture_is_the_dense_formula(alpha, sigma):
    means, covariances, weights = random_mixture()
    x, (a, s) = states(7, 3), pair(alpha, sigma)
    mixture = GaussianMixture(means, covariances, weights)
    mean, log = dense(x, a, s, means, covariances, weights)
    torch.testing.assert_close(mixture(x, a, s), mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mixture.log_prob(x, a, s), log, rtol=1e-10, atol=1e-10)


def test_mixture_in_one_dimension_is_the_integral():
    means, variances, weights = [[-1.0], [0.5], [2.0]], [0.04, 0.3, 0.1], [0.5, 0.2, 0.3]
    mixture = GaussianMixture(means, variances, weights)
    x, (a, s) = states(9, 1), pair(0.7, 0.4)
    x0 = torch.linspace(-8, 8, 8001, dtype=F64)
    prior = sum(
        w * torch.exp(-((x0 - m[0]) ** 2) / (2 * v)) / math.sqrt(v) for m, v, w in zip(means, variances, weights)
    )
    joint = prior * torch.exp(-((x - a * x0) ** 2) / (2 * s**2))
    torch.testing.assert_close(mixture(x, a, s)[:, 0], (joint * x0).sum(1) / joint.sum(1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "full", "shared"])
def test_tweedie(kind):
    """alpha D = x + sigma^2 grad log p(x)."""
    means, covariances, weights = random_mixture()
    c = {
        "isotropic": covariances[:, 0, 0],
        "diagonal": covariances.diagonal(dim1=1, dim2=2),
        "full": covariances,
        "shared": covariances[:1],
    }[kind]
    mixture = GaussianMixture(means, c, weights)
    a, s = pair([0.9, 0.5, 0.1, 1.0, 0.3], [0.1, 0.8, 1.0, 3.0, 0.02])
    x = states(5, 3).requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_prob(x, a, s).sum(), x)
    expected = (x + s[:, None] ** 2 * score) / a[:, None]
    torch.testing.assert_close(mixture(x, a, s), expected, rtol=1e-10, atol=1e-10)


def test_forms_of_the_covariance_agree():
    means, covariances, weights = random_mixture(d=4)
    x, (a, s) = states(5, 4), pair(0.6, 0.5)
    diagonal = covariances.diagonal(dim1=1, dim2=2)
    expected = GaussianMixture(means, torch.diag_embed(diagonal), weights)(x, a, s)
    torch.testing.assert_close(GaussianMixture(means, diagonal, weights)(x, a, s), expected, rtol=1e-12, atol=1e-12)
    image = GaussianMixture(means.reshape(4, 1, 2, 2), diagonal.reshape(4, 1, 2, 2), weights)
    torch.testing.assert_close(image(x.reshape(5, 1, 2, 2), a, s).flatten(1), expected, rtol=1e-12, atol=1e-12)
    variance = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    torch.testing.assert_close(
        GaussianMixture(means, variance, weights)(x, a, s),
        GaussianMixture(means, variance[:, None].expand(4, 4), weights)(x, a, s),
        rtol=1e-12,
        atol=1e-12,
    )
    torch.testing.assert_close(
        GaussianMixture(means, covariances[:1], weights)(x, a, s),
        GaussianMixture(means, covariances[:1].expand(4, 4, 4), weights)(x, a, s),
        rtol=1e-12,
        atol=1e-12,
    )


def test_gaussian_is_linear():
    means, covariances, _ = random_mixture()
    m, c = means[0], covariances[0]
    x, (a, s) = states(6, 3), pair(0.6, 0.8)
    gain = a * c @ torch.linalg.inv(a**2 * c + s**2 * torch.eye(3, dtype=F64))
    torch.testing.assert_close(Gaussian(m, c)(x, a, s), m + (x - a * m) @ gain.T, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(Gaussian([0.0, 0.0], 1.0)(x[:, :2], a, s), a * x[:, :2], rtol=1e-12, atol=0)


def test_singular_covariance_keeps_to_its_plane():
    direction = torch.tensor([1.0, 2.0, -1.0], dtype=F64)
    m = torch.tensor([0.5, 0.0, 1.0], dtype=F64)
    off = Gaussian(m, torch.outer(direction, direction))(states(6, 3), *pair(0.8, 0.3)) - m
    along = (off @ direction)[:, None] * direction / direction.square().sum()
    torch.testing.assert_close(off, along, rtol=1e-10, atol=1e-10)


def test_limits_and_scale():
    means, covariances, weights = random_mixture()
    mixture, x = GaussianMixture(means, covariances, weights), states(6, 3)
    torch.testing.assert_close(mixture(x, *pair(2.0, 0.0)), x / 2, rtol=1e-12, atol=1e-12)
    mean = (weights[:, None] * means).sum(0) / weights.sum()
    torch.testing.assert_close(mixture(x, *pair(0.0, 1.0)), mean.expand(6, 3), rtol=1e-12, atol=1e-12)
    a, s = pair(0.4, 0.7)
    for c in (1e-3, 50.0):
        torch.testing.assert_close(mixture(c * x, c * a, c * s), mixture(x, a, s), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("build", [GaussianMixture, Empirical])
def test_mixed_times_are_separate_calls_and_state_precision_is_kept(build):
    means, covariances, weights = random_mixture()
    exact = build(means, covariances, weights) if build is GaussianMixture else build(means)
    x = states(4, 3)
    a, s = pair([0.9, 0.5, 0.1, 0.0], [0.1, 0.8, 1.0, 1.0])
    single = torch.cat([exact(x[i : i + 1], a[i], s[i]) for i in range(4)])
    torch.testing.assert_close(exact(x, a, s), single, rtol=1e-12, atol=1e-12)
    out = exact(x.float(), a, s)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, exact(x.float().double(), a, s).float(), rtol=0, atol=0)


def test_label_selects_the_modes_of_a_class():
    means, covariances, weights = random_mixture(k=5)
    labels = torch.tensor([0, 1, 0, 2, 1])
    mixture = GaussianMixture(means, covariances, weights, labels=labels)
    x, (a, s) = states(4, 3), pair(0.7, 0.5)
    out = mixture(x, a, s, label=torch.tensor([0, 1, 2, 3]))
    for i in range(3):
        part = GaussianMixture(means[labels == i], covariances[labels == i], weights[labels == i])
        torch.testing.assert_close(out[i], part(x[i : i + 1], a, s)[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[3:], mixture(x[3:], a, s), rtol=1e-12, atol=1e-12)  # the null label


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("sigma", [0.01, 0.5, 20.0])
def test_empirical_is_a_mixture_of_points(chunk, sigma):
    data, (a, s) = states(50, 2, 3, seed=3), pair(0.8, sigma)
    x = a * data[:6] + s * states(6, 2, 3)
    expected = GaussianMixture(data, torch.zeros(50))(x, a, s)
    torch.testing.assert_close(Empirical(data, chunk=chunk)(x, a, s), expected, rtol=1e-9, atol=1e-9)


def test_empirical_far_from_the_origin_keeps_its_digits():
    """The squared distances are a difference of numbers a million times larger."""
    data, (a, s) = states(50, 4, seed=3), pair(0.8, 0.1)
    x = a * data[:6] + s * states(6, 4)
    expected = Empirical(data)(x, a, s) + 1000
    torch.testing.assert_close(Empirical(data + 1000)(x + a * 1000, a, s), expected, rtol=0, atol=1e-7)


def test_empirical_limits_and_labels():
    data = states(30, 2, seed=3)
    labels = torch.arange(30) % 3
    exact = Empirical(data, labels, chunk=8)
    x = states(5, 2)
    nearest = data[torch.cdist(x / 2, data).argmin(1)]
    assert torch.equal(exact(x, *pair(2.0, 0.0)), Empirical(data)(x, *pair(2.0, 0.0)))
    torch.testing.assert_close(exact(x, *pair(2.0, 0.0)), nearest, rtol=0, atol=1e-14)
    torch.testing.assert_close(exact(x, *pair(0.0, 1.0)), data.mean(0).expand(5, 2), rtol=1e-12, atol=1e-12)
    a, s = pair(0.7, 0.9)
    out = exact(x, a, s, label=torch.tensor([0, 1, 2, 3, 0]))
    for i, keep in enumerate([labels == 0, labels == 1, labels == 2, labels >= 0, labels == 0]):
        torch.testing.assert_close(out[i], Empirical(data[keep])(x[i : i + 1], a, s)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GaussianMixture([1.0, 2.0], [1.0, 1.0]), "means must be"),
        (lambda: GaussianMixture([[1.0], [2.0]], [1.0, 1.0, 1.0]), r"covariances must be \(2,\)"),
        (lambda: GaussianMixture([[1.0], [2.0]], [1.0, -1.0]), "negative eigenvalue -1"),
        (lambda: GaussianMixture([[1.0, 0.0]], [[[1.0, 2.0], [2.0, 1.0]]]), "negative eigenvalue -1"),
        (lambda: GaussianMixture([[1.0], [2.0]], [1.0, 1.0], [1.0, 0.0]), "positive numbers"),
        (lambda: GaussianMixture([[1.0], [2.0]], [1.0, 1.0], labels=[0, 2]), "each class"),
        (lambda: Empirical(torch.zeros(0, 3)), "N > 0"),
        (lambda: Empirical(torch.zeros(2, 3), labels=[0]), "2 integers"),
        (lambda: Gaussian([0.0], 1.0)(torch.zeros(1, 1), *pair(1.0, 1.0), label=torch.zeros(1)), "no classes"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("channels", [1, 3])
def test_photographs_are_gaussian_with_the_spectrum_of_natural_images(channels):
    shape = (channels, 4, 6)
    found, d = Photographs(shape), channels * 24
    alpha, sigma = pair(0.6, 0.8)
    gain = found(torch.eye(d, dtype=F64).reshape(d, *shape), alpha, sigma).reshape(d, d)
    covariance = sigma**2 / alpha * torch.linalg.solve(torch.eye(d, dtype=F64) - alpha * gain, gain)
    torch.testing.assert_close(covariance, covariance.mT)
    other, x = pair(0.9, 0.2), states(2, *shape)  # one law for all noise levels
    torch.testing.assert_close(
        found(x, *other), Gaussian(torch.zeros(shape), covariance)(x, *other), rtol=1e-7, atol=1e-7
    )
    waves = torch.cos(math.pi * 2 * (torch.arange(6, dtype=F64) + 0.5) / 6).expand(shape)  # grey, f = 1/6
    power = 7.5e-3 / (1 / 36 + 1e-6)
    torch.testing.assert_close((covariance @ waves.flatten()).reshape(shape), power * waves)
