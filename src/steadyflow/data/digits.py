"""The digits bundled with scikit-learn: the data set that needs no download."""

import numpy as np
import torch

from steadyflow.data.images import InMemoryImages, check_split

HELD_OUT = 20  # images of each class that are never trained on


class Digits(InMemoryImages):
    """scikit-learn's 1797 handwritten digits, 8x8 grey values 0..16, enlarged to size x size; 10 classes.

        u = round(clamp(bicubic(image), 0, 16) 255 / 16)

    Resize: bicubic (Keys kernel, a = -0.75, half-pixel centres, edge pixels repeated, no antialiasing) in float64,
    which is exact arithmetic at size 8, 16, 32, 64..., so the bytes are the same on every machine.

    Split, fixed for good: 20 images of each class (200) are held out as `test`, 1597 stay as `train`.

    An easy, low-rank set: 64 numbers an image whatever its size, a few hundred examples a class. It shows that a method
    works, not that it works on photographs. It is the test part of UCI's Optical Recognition of Handwritten Digits
    (Alpaydin & Kaynak 1998).

    Args:
        split: train or test.
        size: of an image's side, >= 8 pixels.
    """

    def __init__(self, split: str = "train", size: int = 32):
        if size < 8:
            raise ValueError(f"size must be at least 8, the digits' own; got {size}")
        from sklearn.datasets import load_digits  # here: it takes longer to import than the digits to load

        grey, labels = load_digits(return_X_y=True)
        held_out = held_out_indices(labels)
        index = held_out if check_split(split) == "test" else np.setdiff1d(np.arange(len(labels)), held_out)
        x = torch.from_numpy(grey[index]).reshape(-1, 1, 8, 8)
        x = torch.nn.functional.interpolate(x, size=(size, size), mode="bicubic", align_corners=False)
        images = (x.clamp(0, 16) * (255 / 16)).round().to(torch.uint8)
        super().__init__("digits", split, images, torch.from_numpy(labels[index]), num_classes=10)
        self.index = index  # of each image within scikit-learn's set


def held_out_indices(labels: np.ndarray) -> np.ndarray:
    """20 indices of each class, sorted; drawn with numpy's RandomState(0), whose stream is frozen."""
    random = np.random.RandomState(0)
    drawn = [random.permutation(np.flatnonzero(labels == k))[:HELD_OUT] for k in range(10)]
    return np.sort(np.concatenate(drawn))
