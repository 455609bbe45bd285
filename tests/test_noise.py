"""NoiseSource: a frozen function of (seed, index, step), standard Gaussian."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from steadyflow.noise import NoiseSource


def test_any_batching_gives_the_same_noise():
    whole = NoiseSource(3, range(10), (2, 5))
    for step in (0, 1, 999):
        parts = [NoiseSource(3, part, (2, 5))(step) for part in ([0, 1, 2], [3], range(4, 10))]
        assert torch.equal(whole(step), torch.cat(parts))
        shuffled = torch.tensor([7, 2, 9, 0])
        assert torch.equal(NoiseSource(3, shuffled, (2, 5))(step), whole(step)[shuffled])


def by_hand(seed: int, index: int, step: int, size: int) -> np.ndarray:
    """The definition, number by number, in float64."""
    blocks = math.ceil(size / 8)
    bits = np.random.Philox(
        key=np.array([seed, index], np.uint64), counter=np.array([step * blocks, 0, 0, 0], np.uint64)
    )
    words = bits.random_raw(4 * blocks).view(np.int32).astype(np.float64)
    u, v = words[: 4 * blocks], words[4 * blocks :]
    r, angle = np.sqrt(-2 * np.log((np.abs(u) + 0.5) / 2**31)), 2 * np.pi * v / 2**32
    return np.concatenate([r * np.cos(angle), r * np.sin(angle)])[:size]


@pytest.mark.parametrize(("size", "step"), [(3, 0), (8, 5), (27, 1000)])
def test_the_stream_is_as_defined_in_any_order_of_steps(size, step):
    source = NoiseSource(7, [4, 2**63], (size,))
    for k in (step, step + 1, step + 3, step):
        expected = np.stack([by_hand(7, index, k, size) for index in (4, 2**63)])
        np.testing.assert_allclose(source(k), expected, rtol=2e-6, atol=2e-6)


def test_the_stream_is_frozen():
    """Runs that were begun with an earlier version resume to the same images."""
    torch.testing.assert_close(
        NoiseSource(0, [0], (3,))(0), torch.tensor([[-1.5324644, 2.0994911, 0.2751370]]), rtol=0, atol=1e-6
    )


def test_seed_index_and_step_give_independent_standard_gaussians():
    draws = [NoiseSource(seed, [i], (20_000,))(k)[0] for seed, i, k in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    for z in draws:
        assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(torch.stack(draws).numpy()) - np.eye(4)
    assert np.abs(correlation).max() < 4 / np.sqrt(20_000)


def test_swapping_seed_and_index_changes_the_noise():
    assert not torch.equal(NoiseSource(1, [2], (4,))(0), NoiseSource(2, [1], (4,))(0))


def test_every_precision_is_the_same_noise():
    z = NoiseSource(0, range(3), (4,))(2)
    assert torch.equal(NoiseSource(0, range(3), (4,), dtype=torch.float64)(2), z.double())
    assert torch.equal(NoiseSource(0, range(3), (4,), dtype=torch.bfloat16)(2), z.bfloat16())


@pytest.mark.parametrize(("seed", "index"), [(-1, [0]), (0, [3, -2]), (2**64, [0])])
def test_keys_out_of_range_are_refused(seed, index):
    with pytest.raises(ValueError, match=r"\[0, 2\^64\)"):
        NoiseSource(seed, index, (2,))
