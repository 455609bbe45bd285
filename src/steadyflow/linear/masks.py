"""Masks (H, W) of 1 (known) and 0 (missing), float64. Each maker takes the size first: the rest can be bound."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from steadyflow.linear.constants import keyed

Size = tuple[int, int]  # (H, W)


def box_mask(shape: Size, size: int | tuple[int, int]) -> Tensor:
    """A box of size pixels (or (height, width)) missing in the middle; of an odd rest the extra pixel is below, right.

    Raises:
        ValueError: unless the box is positive and lies within the image.
    """
    (h, w), (a, b) = shape, (size, size) if isinstance(size, int) else size
    if not (0 < a <= h and 0 < b <= w):
        raise ValueError(f"a box of {a} x {b} does not fit an image of {h} x {w}")
    mask = torch.ones(h, w, dtype=torch.float64)
    top, left = (h - a) // 2, (w - b) // 2
    mask[top : top + a, left : left + b] = 0
    return mask


def random_mask(shape: Size, missing: float = 0.9, seed: int = 0) -> Tensor:
    """Pixels missing at random: round(missing H W) of them, drawn without replacement from the seed."""
    if not 0 <= missing < 1:
        raise ValueError(f"need 0 <= missing < 1, the share of the pixels, got {missing}")
    h, w = shape
    mask = torch.ones(h * w, dtype=torch.float64)
    mask[torch.from_numpy(keyed(seed).permutation(h * w)[: round(missing * h * w)])] = 0
    return mask.reshape(h, w)


def freeform_mask(shape: Size, coverage: tuple[float, float] = (0.2, 0.3), seed: int = 0) -> Tensor:
    """Brush strokes that hide a share of the image between coverage[0] and coverage[1].

    A stroke starts anywhere and is a chain of up to 12 round-ended segments. Each turns by 72 +- 24 degrees, to one
    side and the other in turn, and is |N(r, r / 2)| long, at most 2 r, with r = (H + W) / 8; the brush is 12 to 40
    pixels wide at 256 pixels, in proportion at other sizes. Segments are added until the share drawn for this mask is
    reached. A stroke ends where it leaves the image, or before a segment that would pass coverage[1].
    Sources: Yu et al. 2019 (gated convolution), Algorithm 1; the shares are Saharia et al. 2022's (Palette).

    Raises:
        ValueError: unless 0 < coverage[0] < coverage[1] < 1; an image too small for strokes this fine.
    """
    (h, w), (low, high) = shape, coverage
    if not 0 < low < high < 1:
        raise ValueError(f"need 0 < coverage[0] < coverage[1] < 1, shares of the image, got {low} and {high}")
    random, hidden = keyed(seed), np.zeros((h, w), bool)
    target, mean, side = random.uniform(low, high), (h + w) / 8, (h + w) / 2
    for _ in range(1000):
        at, heading = random.uniform((0, 0), (h, w)), random.uniform(0, 2 * math.pi)
        width = side / 256 * random.uniform(12, 40)
        for k in range(random.integers(4, 13)):
            turn = random.uniform(48, 96) * (-1) ** k
            heading += math.radians(turn)
            length = min(abs(random.normal(mean, mean / 2)), 2 * mean)
            end = at + length * np.array([math.sin(heading), math.cos(heading)])
            drawn = hidden | _segment((h, w), at, end, width / 2)
            if drawn.mean() > high:
                break
            hidden, at = drawn, end
            if hidden.mean() >= target:
                return torch.from_numpy(1.0 - hidden)
            if not (0 <= at[0] <= h and 0 <= at[1] <= w):
                break
    raise ValueError(f"no strokes on {h} x {w} hide between {low} and {high} of it: widen the coverage")


def _segment(shape: Size, start: np.ndarray, end: np.ndarray, radius: float) -> np.ndarray:
    """Pixels whose middle lies within `radius` of the segment, (H, W)."""
    row, column = np.arange(shape[0])[:, None] + 0.5, np.arange(shape[1])[None, :] + 0.5
    (dr, dc), (r, c) = end - start, (row - start[0], column - start[1])
    along = np.clip((r * dr + c * dc) / max(dr * dr + dc * dc, 1e-12), 0, 1)
    return (r - along * dr) ** 2 + (c - along * dc) ** 2 <= radius**2


def cartesian_lines(shape: Size, acceleration: float = 4.0, centre: float = 0.08, seed: int = 0) -> Tensor:
    """A mask of frequencies for `Fourier`: whole columns, as a scanner reads them, k = 0 first.

    round(W / acceleration) columns: the round(centre W) lowest frequencies, and others drawn from the seed.

    Raises:
        ValueError: acceleration < 1, or fewer columns than the centre needs.
    """
    h, w = shape
    if not acceleration >= 1 or not 0 <= centre <= 1:
        raise ValueError(f"need acceleration >= 1 and 0 <= centre <= 1, got {acceleration} and {centre}")
    count, low = max(1, round(w / acceleration)), max(1, round(centre * w))
    if low > count:
        raise ValueError(f"{count} of {w} columns cannot hold the {low} of the centre: lower acceleration or centre")
    nearest = np.argsort(np.minimum(np.arange(w), w - np.arange(w)), kind="stable")
    columns = np.concatenate([nearest[:low], keyed(seed).permutation(nearest[low:])[: count - low]])
    mask = torch.zeros(h, w, dtype=torch.float64)
    mask[:, torch.from_numpy(columns)] = 1
    return mask


def file_mask(shape: Size, file: str | Path, invert: bool = False) -> Tensor:
    """A mask from an image or a .npy file: from half its range up (white) known, below (black) missing.

    Args:
        invert: white is missing.

    Raises:
        ValueError: a file of another size.
        FileNotFoundError: no such file.
    """
    values = image_array(file)
    if values.shape != tuple(shape):
        raise ValueError(f"the mask {file} is {tuple(values.shape)}, the image {tuple(shape)}: resize the file")
    return ((values >= 0.5) != invert).double()


def image_array(file: str | Path) -> Tensor:
    """A grey image in [0, 1], or the two-dimensional array of a .npy file as it is, float64 (H, W)."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix == ".npy":
        array = np.load(path, allow_pickle=False).astype(np.float64)
    else:
        from PIL import Image

        with Image.open(path) as image:
            array = np.asarray(image.convert("L"), np.float64) / 255
    if array.ndim != 2:
        raise ValueError(f"{path} holds an array of {array.ndim} axes; two are needed")
    return torch.from_numpy(array)
