"""NoiseSource: a frozen function of (seed, index, step), standard Gaussian."""

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


def test_the_stream_is_frozen():
    """Runs that were begun with an earlier version resume to the same images."""
    expected = [0.059911035, 0.015559634, -1.164438486]
    torch.testing.assert_close(NoiseSource(0, [0], (3,))(0), torch.tensor([expected]), rtol=0, atol=1e-7)


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
