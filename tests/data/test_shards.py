import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from steadyflow.data import Digits, InMemoryPoints, Shards, write_shards

ROWS = 37
BYTES = ROWS * 32 * 32  # of a shard of 37 digits


def written(path, dataset):
    for _ in write_shards(dataset, path, batch_size=16, shard_bytes=BYTES):
        pass
    return Shards(path, dataset.split)


def test_shards_are_the_set_they_were_made_from(tmp_path):
    digits = Digits("test")
    shards = written(tmp_path, digits)
    assert sorted(f.name for f in (tmp_path / "test").iterdir()) == [
        *[f"{k:05d}.npy" for k in range(6)],
        "labels.npy",
        "set.json",
    ]
    about = (shards.name, shards.split, shards.shape, shards.num_classes, len(shards), shards.fingerprint)
    assert about == ("digits", "test", (1, 32, 32), 10, 200, digits.fingerprint)
    assert torch.equal(shards.pixels(range(200)), digits.images)
    assert torch.equal(shards.labels, digits.labels)
    order = np.random.RandomState(0).permutation(200).tolist()  # across shards, in any order
    for (x, k), (y, label), i in zip(shards.__getitems__(order), digits.__getitems__(order), order, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, shards[i][0])
        assert k == label == shards[i][1]
    loaded = torch.cat([x for x, _ in DataLoader(shards, 33, num_workers=1)])
    assert torch.equal(loaded, torch.stack([x for x, _ in digits]))


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    class Counted(Digits):
        asked: list[int]

        def __getitems__(self, indices):
            self.asked += list(indices)
            return super().__getitems__(indices)

    digits = Counted("test")
    digits.asked = []
    for done in write_shards(digits, tmp_path, batch_size=16, shard_bytes=BYTES):
        if done >= 2 * ROWS + 16:  # in the third shard
            break
    with pytest.raises(
        FileNotFoundError, match=r"5 of the 7 files of .*test are missing \(00002\.npy\): run the command"
    ):
        Shards(tmp_path, "test")
    digits.asked = []
    for _ in write_shards(digits, tmp_path, batch_size=16):  # another size of shard by now: the old one stays
        pass
    assert digits.asked == list(range(2 * ROWS, 200))
    assert torch.equal(Shards(tmp_path, "test").pixels(range(200)), digits.images)
    assert not list((tmp_path / "test").glob(".*"))


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no shards at .*train; write them with `steadyflow prepare .* shards="
    ):
        Shards(tmp_path)
    digits = Digits("test")
    shards = written(tmp_path, digits)
    with pytest.raises(ValueError, match=r"test holds another set \(digits, 200 images of \[1, 32, 32\]\); remove it"):
        written(tmp_path, Digits("test", size=16))
    with pytest.raises(ValueError, match=r"toy holds vectors \(2,\); shards are of images"):
        written(tmp_path, InMemoryPoints("toy", "train", torch.zeros(3, 2)))
    with pytest.raises(IndexError):
        shards[200]
    file = tmp_path / "test/00001.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"00001\.npy is damaged .*; remove it and write it again"):
        Shards(tmp_path, "test")[ROWS]
    np.save(file, np.zeros((3, 1, 32, 32), np.uint8))
    with pytest.raises(ValueError, match=r"00001\.npy is uint8 \(3, 1, 32, 32\), expected uint8 \(37, 1, 32, 32\)"):
        Shards(tmp_path, "test")[ROWS]
    about = json.loads((tmp_path / "test/set.json").read_text())
    (tmp_path / "test/set.json").write_text(json.dumps(about)[:-9])
    with pytest.raises(ValueError, match=r"set\.json is damaged"):
        Shards(tmp_path, "test")
