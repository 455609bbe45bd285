import numpy as np
import pytest
import torch
from scipy import stats

from steadyflow.data import Toy2D
from steadyflow.data.points import normals, uniforms


def test_a_sample_depends_on_seed_split_and_its_number_alone():
    many = uniforms(3, "train", 100, 6)
    assert np.array_equal(uniforms(3, "train", 10, 6), many[:10])
    assert np.array_equal(uniforms(3, "train", 20, 6, start=40), many[40:60])
    for other in (uniforms(4, "train", 100, 6), uniforms(3, "test", 100, 6)):
        assert not np.isin(other, many).any()


def test_numbers_are_uniform_independent_and_never_0_or_1():
    u = uniforms(0, "train", 50_000, 3)
    assert stats.kstest(u.ravel(), "uniform").pvalue > 0.01
    correlation = np.corrcoef(np.hstack([u[:-1], u[1:]]).T) - np.eye(6)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(u))
    extreme = (np.array([0, 2**64 - 1], np.uint64) >> np.uint64(12)).astype(float)
    assert (((extreme + 0.5) * 2.0**-52 > 0) & ((extreme + 0.5) * 2.0**-52 < 1)).all()


def test_normals_are_the_quantiles():
    u = np.array([2.0**-53, 1e-9, 0.1, 0.5, 0.975, 1 - 2.0**-53])
    assert np.allclose(normals(u), stats.norm.ppf(u), rtol=1e-12, atol=1e-15)


def test_items_and_batches_are_the_points():
    data = Toy2D("rings", count=10)
    x, label = data[7]
    assert torch.equal(x, data.points[7])
    assert label == 0
    assert torch.equal(torch.stack([x for x, _ in data.__getitems__([9, 0])]), data.points[[9, 0]])


@pytest.mark.parametrize(("arguments", "message"), [((-1, "train", 5, 2), "seed -1"), ((0, "train", 0, 2), "count 0")])
def test_bad_seed_or_count(arguments, message):
    with pytest.raises(ValueError, match=message):
        uniforms(*arguments)
