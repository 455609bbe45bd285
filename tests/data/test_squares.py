"""The crops and resizes of the works, beside the Pillow operations that they come to, worked out by hand."""

import numpy as np
import pytest
from PIL import Image

from steadyflow.data.squares import square

BOX, BICUBIC, BILINEAR = Image.Resampling.BOX, Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def noise(width, height, seed=0):
    """A picture in which a pixel of offset, or another kernel, shows."""
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8))


@pytest.mark.parametrize(
    ("width", "height", "steps", "box"),
    [
        (
            37,
            50,
            [(18, 25, BOX), (9, 12, BOX)],
            (0, 1, 9, 10),
        ),  # 18 >= 2 * 9: halved again; then 9/9; (12 - 9) // 2 = 1
        (35, 50, [(17, 25, BOX), (9, 13, BICUBIC)], (0, 2, 9, 11)),  # 17 < 18; 25 * 9 / 17 = 13.2; (13 - 9) // 2 = 2
        (50, 33, [(25, 16, BOX), (14, 9, BICUBIC)], (2, 0, 11, 9)),  # 25 * 9 / 16 = 14.06; (14 - 9) // 2 = 2
        (7, 5, [(13, 9, BICUBIC)], (2, 0, 11, 9)),  # enlarged: 7 * 9 / 5 = 12.6; (13 - 9) // 2 = 2
        (9, 16, [], (0, 3, 9, 12)),  # already of that size: (16 - 9) // 2 = 3, where torchvision rounds 3.5 to 4
        (9, 9, [], (0, 0, 9, 9)),
    ],
)
def test_adm(width, height, steps, box):
    """Dhariwal & Nichol 2021: halve by averages while that leaves at least the size, then bicubic, then the centre."""
    image = expected = noise(width, height)
    for w, h, kernel in steps:
        expected = expected.resize((w, h), kernel)
    assert np.array_equal(square(image, 9, "adm"), expected.crop(box))


def test_adm_of_even_sides_averages_neighbours():
    image = noise(36, 36)
    x = np.asarray(image).astype(int)
    for _ in range(2):  # columns, then rows, each to whole numbers, halves up
        x = (x[:, ::2] + x[:, 1::2] + 1) // 2
        x = (x[::2] + x[1::2] + 1) // 2
    assert np.array_equal(square(image, 9, "adm"), x)


def test_celeba_of_ddim():
    """Song et al. 2021: rows 121 +- 64 and columns 89 +- 64 of the aligned 178x218 image, then a bilinear resize."""
    image = noise(178, 218)
    face = Image.fromarray(np.asarray(image)[57:185, 25:153])
    assert np.array_equal(square(image, 64, "bilinear", [25, 57, 128, 128]), face.resize((64, 64), BILINEAR))


def test_square_first_then_resize():
    """DDRM's preprocessing of its list of 1000 ImageNet images: the longer side is cut, then resized."""
    image = noise(31, 20)
    expected = image.crop((6, 0, 26, 20)).resize((8, 8), BILINEAR)  # (31 - 20) / 2 = 5.5, rounded to 6
    assert np.array_equal(square(image, 8, "bilinear", "square"), expected)


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"is 100x218, and crop \[25, 57, 128, 128\] leaves it"):
        square(noise(100, 218), 64, "bilinear", [25, 57, 128, 128])
    with pytest.raises(ValueError, match=r"is 10x12, smaller than 11; set dataset\.resize"):
        square(noise(10, 12), 11, None)
