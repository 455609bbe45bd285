"""Compositions and stacks do what their parts do, one after another or side by side."""

from functools import partial

import pytest
import torch

from steadyflow.linear import (
    BicubicDownsampling,
    Blur,
    Colorization,
    Composition,
    Convolution,
    Denoising,
    Inpainting,
    PaddedConvolution,
    Stack,
    SuperResolution,
    WalshHadamard,
    box_mask,
    motion_kernel,
)

SHAPE = (3, 16, 32)
X = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "parts",
    [
        [partial(Blur, std=1.0, size=7), partial(SuperResolution, factor=4)],
        [partial(Blur, std=1.0, size=7, boundary="zero"), partial(BicubicDownsampling, factor=2), Denoising],
        [Colorization, partial(Blur, std=1.0, size=7), partial(SuperResolution, factor=2)],
        [partial(SuperResolution, factor=2), partial(WalshHadamard, ratio=0.5)],
        [Blur, partial(Inpainting, mask=partial(box_mask, size=6))],
        [Denoising],
    ],
)
def test_parts_act_in_order(parts: list) -> None:
    x = X
    for part in parts:
        x = part(x.shape[1:])(x)
    torch.testing.assert_close(Composition(SHAPE, parts)(X), x, rtol=0, atol=1e-13)


def test_the_cutoff_is_the_composition_s() -> None:
    """Blur and average are merged into one pair of matrices, whose cutoff is the composition's."""
    whole = Composition(SHAPE, [partial(Blur, std=0.7), partial(SuperResolution, factor=2)], cutoff=1e-9)
    y = whole(X)
    torch.testing.assert_close(whole(whole.pinv(y)), y, rtol=0, atol=1e-9)
    coarse = Composition(SHAPE, [partial(Blur, std=0.7), partial(SuperResolution, factor=2)], cutoff=0.6)
    assert (coarse(coarse.pinv(y)) - y).abs().max() > 0.01


def test_more_measurements_leave_less_unknown() -> None:
    blurs = [partial(Convolution, kernel=motion_kernel(15, 9.0, angle)) for angle in (0.0, 90.0)]
    one, two = Stack(SHAPE, blurs[:1]), Stack(SHAPE, blurs)
    assert (two.project(X) - X).norm() < 0.5 * (one.project(X) - X).norm()
    torch.testing.assert_close(two(X), torch.cat([blur(SHAPE)(X) for blur in blurs], 1), rtol=0, atol=1e-14)


def test_what_a_composition_refuses() -> None:
    after = Composition(SHAPE, [Blur, Colorization])
    with pytest.raises(ValueError, match="a composition with Blur before Colorization has A and A\\^T alone"):
        after.pinv(after(X))
    padded = Composition(SHAPE, [Denoising, partial(PaddedConvolution, kernel=motion_kernel(7, 3.0, 40.0))])
    with pytest.raises(ValueError, match="PaddedConvolution has A and A\\^T alone"):
        padded.project(X)
    with pytest.raises(ValueError, match="at least one part"):
        Composition(SHAPE, [])
    with pytest.raises(ValueError, match="the factor 3 does not divide an image of 16 x 32"):
        Composition(SHAPE, [Denoising, partial(SuperResolution, factor=3)])


def test_what_a_stack_refuses() -> None:
    kernel = motion_kernel(7, 3.0)
    mixed = Stack(SHAPE, [partial(Convolution, kernel=kernel), partial(Convolution, kernel=kernel, boundary="reflect")])
    with pytest.raises(ValueError, match="a stack of Convolution, Convolution has A and A\\^T alone"):
        mixed.pinv(mixed(X))
    with pytest.raises(ValueError, match="measurements of one size"):
        Stack(SHAPE, [Denoising, partial(SuperResolution, factor=2)])
    with pytest.raises(ValueError, match="no parts"):
        Stack(SHAPE, [])
