"""Non-linear measurements: the two identities of h and h^+, and JPEG against libjpeg."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from steadyflow.linear import JPEG, Clip, NonlinearOperator, Quantise

SHAPE = (3, 32, 48)
OPERATORS: dict[str, Callable[[], NonlinearOperator]] = {
    "clip": lambda: Clip(SHAPE),
    "clip x3": lambda: Clip(SHAPE, 3.0),
    "1 bit": lambda: Quantise(SHAPE, 1),
    "4 bits": lambda: Quantise(SHAPE, 4),
    "jpeg 10": lambda: JPEG(SHAPE, 10),
    "jpeg 75, full colours": lambda: JPEG(SHAPE, 75, halve_colours=False),
    "jpeg grey": lambda: JPEG((1, 32, 48), 30),
}


def picture(shape: tuple[int, int, int] = SHAPE) -> Tensor:
    """A smooth image with an edge, (2, *shape), inside [-1, 1]."""
    c, h, w = shape
    row, column = torch.linspace(0, 3, h).double()[:, None], torch.linspace(0, 4, w).double()[None, :]
    planes = [0.5 * torch.sin(row * (i + 1) + column) + 0.3 * (column > 2 + 0.2 * i) for i in range(c)]
    return torch.stack([torch.stack(planes), torch.stack(planes).flip(-1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_two_identities(name: str, dtype: torch.dtype) -> None:
    h = OPERATORS[name]()
    x, y = picture(h.shape).to(dtype), 1.5 * picture(h.shape).to(dtype).flip(0)  # y: anything, beyond [-1, 1] too
    tolerance = {"rtol": 0.0, "atol": 2e-5 if dtype == torch.float32 else 1e-12}
    torch.testing.assert_close(h(h.pinv(h(x))), h(x), **tolerance)
    torch.testing.assert_close(h.pinv(h(h.pinv(y))), h.pinv(y), **tolerance)
    assert (h.project(x) - x).abs().max() > 0.01  # and something is lost
    torch.testing.assert_close(h(x)[1:], h(x[1:]), **tolerance)


def test_levels() -> None:
    x = torch.linspace(-1.2, 1.2, 4096).reshape(1, 1, 64, 64)
    out = Quantise((1, 64, 64), 2)(x)
    torch.testing.assert_close(out.unique(), torch.tensor([-1, -1 / 3, 1 / 3, 1]))
    assert (out - x.clamp(-1, 1)).abs().max() <= 1 / 3 + 1e-6


@pytest.mark.parametrize("quality", [1, 10, 30, 50, 75, 95, 100])
def test_tables_are_libjpeg_s(quality: int) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG", quality=quality)
    tables = Image.open(file).quantization
    k = JPEG((3, 16, 16), quality)._constants(torch.device("cpu"), torch.float64)
    assert k.luma.flatten().tolist() == list(tables[0])
    assert k.chroma.flatten().tolist() == list(tables[1])


@pytest.mark.parametrize(("quality", "halve"), [(10, False), (75, False), (30, True)])
def test_jpeg_is_libjpeg_s(quality: int, halve: bool) -> None:
    """On an 8-bit image, to the 8-bit roundings that ours leaves out. libjpeg smooths halved colours: there, grey."""
    levels = ((0.8 * picture()[:1] + 1) * 127.5).round()
    file = io.BytesIO()
    image = Image.fromarray(levels[0].permute(1, 2, 0).numpy().astype(np.uint8))
    image.save(file, "JPEG", quality=quality, subsampling=2 if halve else 0)
    theirs = torch.from_numpy(np.asarray(Image.open(file)).astype(np.float64)).permute(2, 0, 1)[None]
    ours = ((JPEG(SHAPE, quality, halve)(levels / 127.5 - 1) + 1) * 127.5).clamp(0, 255)
    if halve:
        grey = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).reshape(1, 3, 1, 1)
        levels, theirs, ours = ((grey * image).sum(1) for image in (levels, theirs, ours))
    assert (ours - theirs).abs().mean() < 0.8
    assert (levels - theirs).abs().mean() > 2 * (ours - theirs).abs().mean()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="multiples of 16, got 24 x 32: crop the image"):
        JPEG((3, 24, 32))
    with pytest.raises(ValueError, match="1 to 100, got 0"):
        JPEG(SHAPE, 0)
    with pytest.raises(ValueError, match="1 or 3 channels, the image has 2"):
        JPEG((2, 16, 16))
    with pytest.raises(ValueError, match="gain must be positive"):
        Clip(SHAPE, 0.0)
    with pytest.raises(ValueError, match="1 to 16 bits"):
        Quantise(SHAPE, 0)
    with pytest.raises(ValueError, match=r"takes a batch \(B, 3, 32, 48\), got \(1, 3, 8, 8\)"):
        Clip(SHAPE)(torch.zeros(1, 3, 8, 8))
