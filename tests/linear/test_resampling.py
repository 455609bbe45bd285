"""Block averages and bicubic downsampling against other implementations."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from steadyflow.linear import BicubicDownsampling, SuperResolution


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_bicubic_rows_sum_to_one(factor: int) -> None:
    operator = BicubicDownsampling((1, 32, 64), factor)
    for k in operator.factors:
        torch.testing.assert_close(k.sum(1), torch.ones(len(k)).double(), rtol=0, atol=1e-15)
    ones = torch.ones(1, 1, 32, 64, dtype=torch.float64)
    torch.testing.assert_close(operator(ones), torch.ones(1, 1, 32 // factor, 64 // factor).double())


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_bicubic_is_torch_s_away_from_the_borders(factor: int) -> None:
    side = 16 * factor
    x = torch.randn(2, 3, side, side + factor, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = BicubicDownsampling((3, *x.shape[2:]), factor)(x)
    size = (side // factor, side // factor + 1)
    theirs = functional.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False)
    inside = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(ours[inside], theirs[inside], rtol=0, atol=1e-5)
    assert (ours - theirs).abs().max() > 1e-3  # at the border torch has no reflection


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_bicubic_reflects_at_the_borders(factor: int) -> None:
    """Everywhere what torch makes of the image continued by numpy's "symmetric" padding, d c b a | a b c d."""
    x = np.random.default_rng(0).standard_normal((2, 4 * factor, 6 * factor))
    pad = 4 * factor
    wide = torch.from_numpy(np.pad(x, ((0, 0), (pad, pad), (pad, pad)), mode="symmetric"))[None]
    theirs = functional.interpolate(wide, (12, 14), mode="bicubic", antialias=True, align_corners=False)
    ours = BicubicDownsampling((2, *x.shape[1:]), factor)(torch.from_numpy(x)[None])
    torch.testing.assert_close(ours, theirs[..., 4:-4, 4:-4], rtol=0, atol=1e-5)


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("side", [32, 256])
def test_singular_values_of_bicubic_need_no_cutoff(factor: int, side: int) -> None:
    operator = BicubicDownsampling((1, side, side), factor)
    s = operator.singular * factor
    assert s.shape == (1, 1, side // factor, side // factor)
    assert s.min() > 0.45
    assert s.max() < 1 + 1e-12


def test_super_resolution_averages_blocks() -> None:
    x = torch.arange(2 * 4 * 6, dtype=torch.float64).reshape(1, 2, 4, 6)
    operator = SuperResolution((2, 4, 6), 2)
    assert operator(x)[0, 1, 1, 2] == x[0, 1, 2:4, 4:6].mean()
    repeated = operator.pinv(operator(x))
    assert torch.equal(repeated, operator(x).repeat_interleave(2, -1).repeat_interleave(2, -2))
    (rows, columns), image = operator.factors, x[0, 0]
    torch.testing.assert_close(rows @ image @ columns.mT, operator(x)[0, 0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", [SuperResolution, BicubicDownsampling])
@pytest.mark.parametrize("factor", [3, 0, -2, 64])
def test_a_factor_that_does_not_divide(kind: type, factor: int) -> None:
    with pytest.raises(ValueError, match=f"the factor {factor} does not divide an image of 32 x 32"):
        kind((3, 32, 32), factor)
