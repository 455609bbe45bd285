import pytest
import torch
from scipy import stats

from steadyflow.data import GaussianMixtureSamples
from steadyflow.denoisers import GaussianMixture

COUNT = 20_000


def mixture(dim=5, modes=3):
    generator = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(modes, dim, generator=generator, dtype=torch.float64)
    roots = torch.randn(modes, dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    covariances = roots @ roots.mT
    return means, (covariances + covariances.mT) / 2 + 0.05 * torch.eye(dim, dtype=torch.float64), [0.2, 0.5, 0.3]


def test_each_component_has_its_weight_mean_and_covariance():
    means, covariances, weights = mixture()
    data = GaussianMixtureSamples(means, covariances, weights, count=COUNT)
    counts = torch.bincount(data.component)
    assert stats.chisquare(counts, COUNT * torch.tensor(weights)).pvalue > 1e-3
    for k in range(3):
        x = data.points[data.component == k].double() - means[k]
        squared = (x * torch.linalg.solve(covariances[k], x.T).T).sum(1)
        assert stats.kstest(squared, stats.chi2(5).cdf).pvalue > 1e-3
        white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariances[k]), x.T, upper=False)
        assert torch.allclose(white.mean(1), torch.zeros(5).double(), atol=5 / len(x) ** 0.5)
        assert torch.allclose(torch.cov(white), torch.eye(5).double(), atol=5 * 2**0.5 / len(x) ** 0.5)


def test_the_ways_of_giving_a_covariance_agree():
    means = [[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]]
    full = [[[0.25, 0.0, 0.0], [0.0, 0.25, 0.0], [0.0, 0.0, 0.25]]] * 2
    points = [GaussianMixtureSamples(means, c, count=50).points for c in (0.25, [0.25] * 2, [[0.25] * 3] * 2, full)]
    assert all(torch.equal(points[0], other) for other in points[1:])


def test_a_sample_depends_on_its_number_alone():
    means, covariances, weights = mixture()
    many = GaussianMixtureSamples(means, covariances, weights, count=100, seed=2).points
    assert torch.equal(GaussianMixtureSamples(means, covariances, weights, count=10, seed=2).points, many[:10])
    other = GaussianMixtureSamples(means, covariances, weights, "test", count=100, seed=2).points
    assert not torch.isin(other, many).any()


@pytest.mark.parametrize("form", ["full", "diagonal", "number"])
def test_its_attributes_are_the_arguments_of_the_exact_denoiser(form):
    means, full, weights = mixture()
    covariances = {"full": full, "diagonal": full.diagonal(dim1=1, dim2=2), "number": 0.3}[form]
    data = GaussianMixtureSamples(means, covariances, weights, count=COUNT)
    denoiser = GaussianMixture(data.means, data.covariances, data.weights)
    x0 = data.points.double()
    z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigma = torch.tensor(1.5, dtype=torch.float64)
    error = x0 - denoiser(x0 + sigma * z, torch.ones_like(sigma), sigma)
    # a posterior mean leaves an error that no function of x explains
    for test in (torch.ones_like(x0), x0 + sigma * z):
        product = error * test
        assert (product.mean(0).abs() < 5 * product.std(0) / COUNT**0.5).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.0, 1.0], 1.0), r"means must be \(K, D\)"),
        (([[0.0, 1.0]], [[1.0, 1.0, 1.0]]), r"got \(1, 3\)"),
        (([[0.0, 1.0]], 1.0, [0.5, 0.5]), r"and \(2,\)"),
        (([[0.0, 1.0]], [[1.0, -1.0]]), "positive definite"),
        (([[0.0, 1.0]], [[[1.0, 0.5], [0.0, 1.0]]]), "symmetric"),
        (([[0.0], [1.0]], 1.0, [1.0, 0.0]), "weight positive"),
    ],
)
def test_what_is_no_mixture_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixtureSamples(*arguments)
