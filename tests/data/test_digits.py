import hashlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from steadyflow.data import Digits, from_uint8


def test_the_split_is_pinned():
    train, test = Digits("train"), Digits("test")
    digest = hashlib.sha256(test.index.astype("<i8").tobytes()).hexdigest()
    assert digest == "853756f75d238fda9468bebfd3df50b60cde8d636955323d02b0d423f47efa67"
    assert train.fingerprint == "4f7c119a9a82bfc39d22ee4c16317443cb034a53067f75a6848f373049a93a11"
    assert test.fingerprint == "846c959224acfffd74363e47e767b825459ac72041c9c76d02f9461ddbc164a6"


def test_train_and_test_partition_the_set_with_20_of_each_class_held_out():
    train, test = Digits("train"), Digits("test")
    assert sorted([*train.index, *test.index]) == list(range(1797))
    assert torch.bincount(test.labels).tolist() == [20] * 10
    assert np.array_equal(load_digits().target[train.index], train.labels.numpy())


def test_resize_is_the_exact_keys_bicubic():
    def keys(distance: Fraction) -> Fraction:  # a = -3/4
        d, a = abs(distance), Fraction(-3, 4)
        if d <= 1:
            return (a + 2) * d**3 - (a + 3) * d**2 + 1
        return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else Fraction(0)

    weights = [[Fraction(0)] * 8 for _ in range(32)]
    for i in range(32):
        centre = Fraction(2 * i + 1, 8) - Fraction(1, 2)
        for j in range(centre.__floor__() - 1, centre.__floor__() + 3):
            weights[i][min(max(j, 0), 7)] += keys(centre - j)
    w = np.array([[float(v) for v in row] for row in weights])
    assert all(Fraction(float(v)) == v for row in weights for v in row)  # dyadic, so float64 is exact
    test = Digits("test")
    exact = np.einsum("ik,nkl,jl->nij", w, load_digits().images[test.index], w)
    assert np.array_equal(np.round(exact.clip(0, 16) * 255 / 16), test.images[:, 0].numpy())


def test_size_8_is_the_original():
    test = Digits("test", size=8)
    assert np.array_equal(np.round(load_digits().images[test.index] * 255 / 16), test.images[:, 0].numpy())


def test_items_one_by_one_and_in_a_batch():
    test = Digits("test")
    x, label = test[7]
    assert torch.equal(x, from_uint8(test.images[7]))
    assert label == test.labels[7]
    assert x.abs().max() <= 1
    for (x, label), (y, other) in zip(test.__getitems__([5, 0, 199]), [test[i] for i in (5, 0, 199)], strict=True):
        assert torch.equal(x, y)
        assert label == other
        assert isinstance(label, int)


@pytest.mark.parametrize(
    ("split", "size", "message"),
    [("val", 32, "train, test; got 'val'"), ("test", 7, "got 7")],
)
def test_bad_arguments_are_named(split, size, message):
    with pytest.raises(ValueError, match=message):
        Digits(split, size)
