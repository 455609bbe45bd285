"""Walsh-Hadamard and Fourier measurements, colour to grey."""

import numpy as np
import pytest
import scipy.linalg
import torch

from steadyflow.linear import Colorization, Fourier, WalshHadamard, random_mask


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 4), (2, 8, 8), (1, 16, 16), (2, 8, 64)])
def test_walsh_hadamard_is_scipy_s(shape: tuple[int, int, int]) -> None:
    n = shape[1] * shape[2]
    operator, x = WalshHadamard(shape, 1.0), gaussian(2, *shape)
    w = torch.from_numpy(scipy.linalg.hadamard(n) / np.sqrt(n))
    torch.testing.assert_close(operator.transform(x.flatten(2)), x.flatten(2) @ w, rtol=0, atol=1e-12)
    torch.testing.assert_close(operator(x)[:, :, 0], x.flatten(2) @ w, rtol=0, atol=1e-12)


def test_rows_are_drawn_from_the_seed() -> None:
    a, b, c = (WalshHadamard((1, 32, 32), 0.25, seed).rows for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert len(a) == len(a.unique()) == 256
    assert a[0] == 0
    assert a.max() < 1024


def test_the_mean_is_always_measured() -> None:
    x = gaussian(1, 1, 16, 16)
    operator = WalshHadamard((1, 16, 16), 1 / 256)
    torch.testing.assert_close(operator.pinv(operator(x)), x.mean().expand_as(x))


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (6, 6), (1, 8)])
@pytest.mark.parametrize("missing", [0.0, 0.6])
def test_fourier_measures_each_pair_once(size: tuple[int, int], missing: float) -> None:
    """Against numpy's full plane: what the mask holds, of k or -k, and nothing else, comes back."""
    mask, x = random_mask(size, missing, seed=1), gaussian(1, 2, *size)
    operator = Fourier((2, *size), mask)
    m = mask.numpy()
    both = np.maximum(m, np.roll(m[::-1, ::-1], (1, 1), (0, 1)))
    plane = np.fft.fft2(x.numpy(), norm="ortho")
    back = np.fft.ifft2(both * plane, norm="ortho")
    assert np.abs(back.imag).max() < 1e-14
    torch.testing.assert_close(operator.pinv(operator(x)), torch.from_numpy(back.real), rtol=0, atol=1e-13)
    y = operator(x)
    half = plane[..., : size[1] // 2 + 1]
    measured = operator.singular[0, [0, 2]].numpy() > 0
    np.testing.assert_allclose(y[0, :2].numpy(), half.real[0] * measured[0], atol=1e-13)
    np.testing.assert_allclose(y[0, 2:].numpy(), half.imag[0] * measured[1], atol=1e-13)
    assert (operator.singular > 0).sum() == 2 * both.sum()  # as many numbers as frequencies, of each of two channels


@pytest.mark.parametrize("weights", ["mean", "luma", (0.2, 0.5, 0.1)])
def test_colours_are_summed(weights: str | tuple[float, ...]) -> None:
    row = {"mean": [1 / 3] * 3, "luma": [0.299, 0.587, 0.114]}.get(weights, weights)  # type: ignore[call-overload]
    x = gaussian(2, 3, 4, 5)
    y = Colorization((3, 4, 5), weights)(x)
    torch.testing.assert_close(y, sum(w * x[:, i : i + 1] for i, w in enumerate(row)), rtol=0, atol=1e-15)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="H W a power of two, got 12 x 16"):
        WalshHadamard((1, 12, 16))
    with pytest.raises(ValueError, match="0 < ratio <= 1"):
        WalshHadamard((1, 16, 16), 0.0)
    with pytest.raises(ValueError, match="needs 1 weights, not all 0"):
        Colorization((1, 8, 8), "luma")
    with pytest.raises(ValueError, match="not all 0"):
        Colorization((3, 8, 8), (0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="'mean', 'luma' or one number a channel, got 'grey'"):
        Colorization((3, 8, 8), "grey")
    with pytest.raises(ValueError, match="nothing is measured"):
        Fourier((1, 8, 8), torch.zeros(8, 8))
