"""Batches are a pure function of (seed, step), however they are split, loaded or interrupted."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import Dataset

from steadyflow.data.batches import HeldOutBatches, TrainingBatches, noise
from steadyflow.noise import NoiseSource


class Ramp(Dataset):
    """Item i is the 1 x 2 x 3 image i + [[0, .1, .2], [.3, .4, .5]] with label i mod 4."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return i + torch.arange(6.0).reshape(1, 2, 3) / 10, i % 4


def items(batch):
    return batch.x0[:, 0, 0, 0].round().long()


def test_every_item_once_an_epoch_in_a_new_order():
    batches = list(TrainingBatches(Ramp(10), 4, 5, seed=3))  # 20 samples: two epochs, straddled by the third batch
    order = torch.cat([items(b) for b in batches]).tolist()
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert order[:10] != list(range(10))
    assert torch.equal(torch.cat([b.label for b in batches]), torch.tensor(order) % 4)
    other = torch.cat([items(b) for b in TrainingBatches(Ramp(10), 4, 5, seed=4)]).tolist()
    assert other != order


def test_processes_and_micro_batches_share_out_the_same_numbers():
    whole = TrainingBatches(Ramp(50), 24, 2, seed=1, flip=True)
    for step in (0, 1):
        full = whole.batch(step)
        seen = []
        for a in range(2):
            for r in range(3):
                part = TrainingBatches(Ramp(50), 24, 2, seed=1, flip=True, accumulate=2, rank=r, world=3)
                rows = torch.arange(24)[a::2][r::3]
                got = part.batch(2 * step + a)
                for name in ("x0", "label", "eps", "u", "drop"):
                    assert torch.equal(getattr(got, name), getattr(full, name)[rows]), name
                assert got.step == 2 * step + a
                seen += rows.tolist()
        assert sorted(seen) == list(range(24))


def test_a_loader_that_is_restored_goes_on_where_it_was():
    straight = list(TrainingBatches(Ramp(30), 6, 7, seed=0, accumulate=2))
    assert len(straight) == 14
    first = TrainingBatches(Ramp(30), 6, 7, seed=0, accumulate=2)
    iterator = iter(first)
    for _ in range(5):
        next(iterator)
    again = TrainingBatches(Ramp(30), 6, 7, seed=0, accumulate=2)
    again.load_state_dict(first.state_dict())
    rest = list(again)
    assert len(rest) == 9
    assert len(again) == 14
    for a, b in zip(straight[5:], rest, strict=True):
        assert all(torch.equal(torch.as_tensor(u), torch.as_tensor(v)) for u, v in zip(a, b, strict=True))


def test_loader_processes_change_nothing_and_their_look_ahead_is_not_counted():
    alone, helped = (TrainingBatches(Ramp(30), 6, 8, seed=0, workers=w) for w in (0, 2))
    for i, (a, b) in enumerate(zip(alone, helped, strict=True)):
        assert helped.state_dict() == {"given": i + 1}
        assert all(torch.equal(torch.as_tensor(u), torch.as_tensor(v)) for u, v in zip(a, b, strict=True))


def test_times_are_stratified_over_a_step_and_uniform_over_steps():
    batches = TrainingBatches(Ramp(64), 16, 400, seed=5)
    u = torch.stack([batches.batch(k).u for k in range(400)]).numpy()
    assert np.allclose(np.diff(np.sort(u, axis=1), axis=1), 1 / 16)
    assert ((u >= 0) & (u < 1)).all()
    assert stats.kstest(u[:, 0], "uniform").pvalue > 1e-3
    parts = [TrainingBatches(Ramp(64), 16, 1, seed=5, accumulate=2, rank=r, world=2).batch(0).u for r in (0, 1)]
    for part in parts:  # so is each process's share of a micro-batch
        assert np.allclose(np.diff(np.sort(part.numpy())), 1 / 4)


def test_noise_and_label_drops_have_their_distributions_and_are_independent():
    batches = TrainingBatches(Ramp(64), 32, 60, seed=2)
    all_ = [batches.batch(k) for k in range(60)]
    eps, drop = torch.cat([b.eps for b in all_]).numpy(), torch.cat([b.drop for b in all_]).numpy()
    assert stats.kstest(eps.ravel(), "norm").pvalue > 1e-3
    assert stats.kstest(drop, "uniform").pvalue > 1e-3
    correlation = np.corrcoef(np.c_[eps.reshape(len(eps), -1), drop].T) - np.eye(7)
    assert abs(correlation).max() < 5 / np.sqrt(len(eps))
    assert len(np.unique(eps)) == eps.size
    sampling = NoiseSource(2, range(64), (1, 2, 3))  # the noise sample i starts from must not have been trained on
    z = torch.stack([sampling(k) for k in range(3)]).numpy()
    assert not np.isin(z, eps).any()


def test_flips_mirror_half_of_the_images_whole():
    plain, flipped = (TrainingBatches(Ramp(64), 32, 20, seed=0, flip=f) for f in (False, True))
    count = 0
    for k in range(20):
        a, b = plain.batch(k), flipped.batch(k)
        mirrored = (b.x0 == a.x0.flip(-1)).flatten(1).all(1)
        assert (mirrored | (b.x0 == a.x0).flatten(1).all(1)).all()
        assert torch.equal(a.eps, b.eps)
        count += int(mirrored.sum())
    assert abs(count - 320) < 4 * np.sqrt(160)


def test_held_out_batches_are_the_same_each_pass_and_for_any_number_of_processes():
    whole = HeldOutBatches(Ramp(23), 5, seed=1)
    first, second = list(whole), list(whole)
    assert len(first) == len(whole) == 5
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(torch.as_tensor(u), torch.as_tensor(v)) for u, v in zip(a, b, strict=True))
    assert torch.cat([items(b) for b in first]).tolist() == list(range(23))
    eps = torch.cat([b.eps for b in first])
    for r in range(3):
        part = list(HeldOutBatches(Ramp(23), 4, seed=1, rank=r, world=3))
        assert torch.cat([items(b) for b in part]).tolist() == list(range(23))[r::3]
        assert torch.equal(torch.cat([b.eps for b in part]), eps[r::3])
    u = torch.cat([b.u for b in HeldOutBatches(Ramp(200), 200, seed=0)]).numpy()
    assert stats.kstest(u, "uniform").statistic < 2 / 200  # 200 random ones: about 0.06
    assert all((b.drop == 1).all() for b in first)


def test_one_sample_does_not_depend_on_its_neighbours():
    assert torch.equal(noise(7, [5], (4,))[0], noise(7, [3, 5, 9], (4,))[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 10, "accumulate": 2, "world": 2}, "batch_size 10 must be a positive multiple of 4"),
        ({"batch_size": 0}, "batch_size 0 must be a positive multiple"),
        ({"steps": 0}, "max_steps must be a positive integer, got 0"),
        ({"dataset": Ramp(0)}, "training set is empty"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingBatches(**{"dataset": Ramp(4), "batch_size": 4, "steps": 1, "seed": 0} | arguments)
