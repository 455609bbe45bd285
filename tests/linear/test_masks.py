"""Masks: their sizes, their shares, and that a seed makes the same one again."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from steadyflow.linear import Inpainting, box_mask, cartesian_lines, file_mask, freeform_mask, random_mask


@pytest.mark.parametrize(("shape", "size"), [((64, 64), 20), ((32, 48), (7, 10)), ((9, 9), 9)])
def test_the_box_is_in_the_middle(shape: tuple[int, int], size: int | tuple[int, int]) -> None:
    if size == 9:
        assert not box_mask(shape, size).any()
        return
    mask, (h, w) = box_mask(shape, size), (size, size) if isinstance(size, int) else size
    assert (mask == 0).sum() == h * w
    rows, columns = torch.nonzero(mask.sum(1) < shape[1])[:, 0], torch.nonzero(mask.sum(0) < shape[0])[:, 0]
    assert (len(rows), len(columns)) == (h, w)
    assert abs(rows.double().mean() - (shape[0] - 1) / 2) <= 0.5
    assert abs(columns.double().mean() - (shape[1] - 1) / 2) <= 0.5


@pytest.mark.parametrize("make", [partial(random_mask, missing=0.9), freeform_mask, cartesian_lines])
def test_a_seed_makes_a_mask(make) -> None:  # type: ignore[no-untyped-def]
    assert torch.equal(make((64, 96), seed=3), make((64, 96), seed=3))
    assert not torch.equal(make((64, 96), seed=3), make((64, 96), seed=4))
    assert make((64, 96), seed=3).shape == (64, 96)
    with pytest.raises(ValueError, match="seed must lie in"):
        make((64, 96), seed=-1)


def test_masks_of_a_release_are_those_of_the_next() -> None:
    """The numbers that results depend on: a change here changes published results."""
    assert torch.nonzero(random_mask((8, 8), 0.9, seed=0)).tolist() == [[1, 3], [3, 3], [4, 4], [4, 5], [6, 2], [7, 1]]
    assert int((freeform_mask((64, 64), seed=0) == 0).sum()) == 898


def test_random_pixels_are_as_many_as_asked() -> None:
    assert (random_mask((64, 64), 0.9) == 0).sum() == round(0.9 * 64 * 64)
    assert random_mask((8, 8), 0.0).all()


@pytest.mark.parametrize("shape", [(256, 256), (64, 64), (96, 64), (32, 32)])
def test_free_form_strokes_cover_what_is_asked(shape: tuple[int, int]) -> None:
    shares = torch.stack([(freeform_mask(shape, (0.2, 0.3), seed=i) == 0).double().mean() for i in range(8)])
    assert shares.min() >= 0.2
    assert shares.max() <= 0.3
    assert shares.max() - shares.min() > 0.02  # the share itself is drawn
    assert (freeform_mask(shape, (0.4, 0.5), seed=1) == 0).double().mean() >= 0.4


def test_strokes_are_strokes() -> None:
    """Few connected pieces, thick ones: eroded by two pixels most of the hidden area is left."""
    from scipy import ndimage

    hidden = freeform_mask((256, 256), seed=2).numpy() == 0
    assert ndimage.label(hidden)[1] <= 12
    assert ndimage.binary_erosion(hidden, iterations=2).sum() > 0.5 * hidden.sum()


def test_lines_hold_the_centre() -> None:
    mask = cartesian_lines((32, 64), acceleration=4.0, centre=0.1, seed=1)
    columns = mask[0].bool()
    assert torch.equal(mask, columns.double().expand(32, 64))
    assert columns.sum() == 16
    assert columns[[0, 1, 2, -1, -2]].all()


def test_a_mask_from_a_file(tmp_path: Path) -> None:
    mask = random_mask((12, 20), 0.4, seed=1)
    Image.fromarray((255 * mask.numpy()).astype(np.uint8)).save(tmp_path / "mask.png")
    np.save(tmp_path / "mask.npy", mask.numpy())
    for name in ("mask.png", "mask.npy"):
        assert torch.equal(file_mask((12, 20), tmp_path / name), mask)
    assert torch.equal(file_mask((12, 20), tmp_path / "mask.png", invert=True), 1 - mask)
    x = torch.randn(2, 3, 12, 20)
    assert torch.equal(Inpainting((3, 12, 20), partial(file_mask, file=tmp_path / "mask.png"))(x), mask.float() * x)
    with pytest.raises(ValueError, match=r"mask.png is \(12, 20\), the image \(16, 20\): resize the file"):
        file_mask((16, 20), tmp_path / "mask.png")
    with pytest.raises(FileNotFoundError, match="no file"):
        file_mask((16, 20), tmp_path / "none.png")


def test_bad_masks() -> None:
    shape = (3, 16, 16)
    with pytest.raises(ValueError, match="0 everywhere: nothing is measured"):
        Inpainting(shape, partial(box_mask, size=16))
    with pytest.raises(ValueError, match=r"must be of shape \(16, 16\) or \(3, 16, 16\), got \(1, 8, 16\)"):
        Inpainting(shape, torch.ones(8, 16))
    with pytest.raises(ValueError, match="0 \\(missing\\) and 1 \\(measured\\) only"):
        Inpainting(shape, torch.full((16, 16), 0.5))
    with pytest.raises(ValueError, match="a box of 20 x 20 does not fit an image of 16 x 16"):
        box_mask((16, 16), 20)
    with pytest.raises(ValueError, match="0 <= missing < 1"):
        random_mask((16, 16), 1.0)
    with pytest.raises(ValueError, match="coverage"):
        freeform_mask((16, 16), (0.5, 0.2))
    with pytest.raises(ValueError, match="cannot hold"):
        cartesian_lines((16, 16), acceleration=8.0, centre=0.5)
    with pytest.raises(ValueError, match="acceleration >= 1"):
        cartesian_lines((16, 16), acceleration=0.5)
