"""The baseline without a denoiser: linear regression on the training split."""

import pytest
import torch
from torch import Tensor

from steadyflow.denoisers import CountedDenoiser, Gaussian
from steadyflow.linear import Inpainting
from steadyflow.noise import NoiseSource
from steadyflow.restorers import LinearRegression, Measurement

SHAPE = (1, 2, 3)


def _random(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def restored(regression: LinearRegression, given: Measurement) -> Tensor:
    unused = CountedDenoiser(Gaussian(torch.zeros(SHAPE), torch.ones(())))
    x = regression(unused, given, NoiseSource(0, range(len(given.y)), SHAPE))
    assert unused.rows == 0
    return x


def test_it_is_the_best_affine_estimate_of_the_training_set_s_covariance(dense: type) -> None:
    """m + C A^T (A C A^T + sigma_y^2 I)^-1 (y - A m), of a noise beside which the least ridge is nothing."""
    images, a, sigma_y = _random(60, *SHAPE, seed=0) @ _random(3, 3, seed=1) + 0.5, _random(4, 6, seed=2), 0.3
    x = images.flatten(1)
    covariance, y = torch.cov(x.mT, correction=0), _random(5, 4, seed=3)
    gain = covariance @ a.mT @ torch.linalg.inv(a @ covariance @ a.mT + sigma_y**2 * torch.eye(4))
    expected = x.mean(0) + (y - x.mean(0) @ a.mT) @ gain.mT
    regression = LinearRegression([(image, 0) for image in images])
    found = restored(regression, Measurement(y, dense(a, SHAPE), sigma_y)).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    again = restored(regression, Measurement(y[2:3], dense(a, SHAPE), sigma_y)).flatten(1)
    torch.testing.assert_close(again, found[2:3], rtol=0, atol=1e-12)


def test_images_of_a_subspace_are_restored_from_as_many_numbers() -> None:
    basis, mask = _random(2, 6, seed=0), torch.tensor([[1.0, 1, 0], [0, 0, 1]])
    images = (_random(40, 2, seed=1) @ basis + 0.3).reshape(-1, *SHAPE)
    operator = Inpainting(SHAPE, mask)
    regression = LinearRegression(lambda: [(image, 0) for image in images[:30]])
    found = restored(regression, Measurement(operator(images[30:]), operator))
    torch.testing.assert_close(found, images[30:], rtol=0, atol=1e-4)


def test_mistakes(dense: type) -> None:
    given = Measurement(_random(1, 4, seed=0), dense(_random(4, 6, seed=1), SHAPE))
    with pytest.raises(ValueError, match="at least 10 images, got 3"):
        LinearRegression([(torch.zeros(SHAPE), 0)] * 3).fit(given)
    with pytest.raises(ValueError, match=r"fitted on images \(1, 4, 4\), for images \(1, 2, 3\)"):
        LinearRegression([(torch.zeros(1, 4, 4), 0)] * 20).fit(given)
