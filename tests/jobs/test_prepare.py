"""`steadyflow prepare`, from the command line; the fetching itself is tested with the datasets."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from steadyflow import cli
from steadyflow.data import Digits, InMemoryImages, InMemoryPoints
from steadyflow.jobs.prepare import check


def prepare(tmp_path, *overrides):
    return cli.main(["prepare", *overrides, f"data_dir={tmp_path}/data", f"hydra.run.dir={tmp_path}/run"])


def words(text):
    """What is printed, free of the table's lines and of where it is broken."""
    return re.sub(r"[^!-~]+", "", text)


def test_check_counts_and_measures_every_item():
    data = Digits("test")
    found = check(data, batch_size=33)
    x = data.images.double() / 127.5 - 1
    assert (found["count"], found["shape"], found["class_counts"]) == (200, [1, 32, 32], [20] * 10)
    assert (found["min"], found["max"]) == (-1, 1)
    assert found["mean"] == pytest.approx(x.mean().item(), abs=1e-6)
    assert found["std"] == pytest.approx(x.std(correction=0).item(), abs=1e-6)
    assert found["fingerprint"] == data.fingerprint


def test_points_may_leave_the_unit_square():
    found = check(InMemoryPoints("far", "train", torch.tensor([[3.0, -9.0], [1.0, 1.0]])))
    assert (found["min"], found["max"], found["mean"], found["class_counts"]) == (-9, 3, -1, [])


def broken(name):
    """A set of 6 items with one fault, in item 4."""
    images, labels = torch.zeros(6, 1, 4, 4, dtype=torch.uint8), torch.arange(6) % 3
    labels[4] = 3 if name == "label" else 1
    whole = InMemoryImages("toy", "train", images, labels, 3)
    changed = {"nan": torch.full((1, 4, 4), torch.nan), "range": torch.full((1, 4, 4), 1.5)}
    items = [(changed.get(name, x) if i == 4 else x, k) for i, (x, k) in enumerate(whole)]
    shape = (3, 4, 4) if name == "shape" else (1, 4, 4)

    class Items(list):
        pass

    data = Items(items)
    data.__dict__.update(name="toy", split="train", shape=shape, num_classes=3, fingerprint="")
    return data


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan", r"toy train, items 4 to 5: expected finite \(1, 4, 4\), .* or a NaN"),
        ("range", r"items 4 to 5: images must lie in \[-1, 1\], got up to 1\.5"),
        ("label", r"items 4 to 5: label 3 of 3 classes"),
        ("shape", r"items 0 to 1: expected finite \(3, 4, 4\), got shape \(1, 4, 4\)"),
    ],
)
def test_a_fault_is_named_with_where_it_is(fault, message):
    with pytest.raises(ValueError, match=message):
        check(broken(fault), batch_size=2)
    assert check(broken("none"), batch_size=2)["class_counts"] == [2, 2, 2]


def test_prints_what_the_digits_are(tmp_path, capsys):
    assert prepare(tmp_path) == 0
    said = words(capsys.readouterr().out)
    for part in ["1597", "200", "1x32x32", "-1to1", "fingerprint", "20,20,20,20,20,20,20,"]:
        assert part in said


def test_a_folder_without_a_test_split_is_said_and_is_no_mistake(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    for i in range(3):
        pixels = np.full((9, 12, 3), 100 * i, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "set" / f"{i}.png")
    chosen = ["dataset=image_folder", f"dataset.path={tmp_path}/set", "dataset.size=8"]
    assert prepare(tmp_path, *chosen) == 0
    said = words(capsys.readouterr().out)
    assert "notestsplit:" in said
    assert "setdataset.held_out=N" in said
    assert prepare(tmp_path, *chosen, "dataset.split=test") == 2
    assert "split test is empty: 3 images" in capsys.readouterr().err
    (tmp_path / "set" / "1.png").write_text("?")
    assert prepare(tmp_path, *chosen) == 2
    error = capsys.readouterr().err
    assert "1.png is not an image" in error
    assert error.count("\n") == 1


def test_shards_are_written_checked_and_read(tmp_path, capsys):
    assert prepare(tmp_path, f"shards={tmp_path}/shards") == 0
    said = words(capsys.readouterr().out)
    assert f"dataset=shardsdataset.path={tmp_path}/shards" in said
    assert prepare(tmp_path, "dataset=shards", f"dataset.path={tmp_path}/shards") == 0
    assert words(capsys.readouterr().out) in said  # the same table
    assert prepare(tmp_path, f"shards={tmp_path}/shards", "dataset.size=16") == 2
    assert "holds another set (digits, 1597 images of [1, 32, 32])" in capsys.readouterr().err


def test_a_class_that_can_download_is_asked_to(tmp_path, monkeypatch, capsys):
    import steadyflow.data

    asked = []
    monkeypatch.setattr(steadyflow.data.MNIST, "download", classmethod(lambda cls, root: asked.append(root)))
    assert prepare(tmp_path, "dataset=mnist") == 2
    assert asked == [f"{tmp_path}/data"]
    error = capsys.readouterr().err
    assert error.startswith("steadyflow prepare: error: ")
    assert error.count("\n") == 1
    for part in [f"{tmp_path}/data/MNIST/raw", "data_dir=DIR"]:
        assert part in error


def test_offline_says_what_to_put_where(tmp_path, monkeypatch, capsys):
    import torchvision

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    assert prepare(tmp_path, "dataset=cifar10") == 2
    error = capsys.readouterr().err
    assert "put cifar-10-python.tar.gz from http://127.0.0.1:9/ in" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset=image_folder"], "Missing mandatory value: dataset.path; give it as dataset.path=..."),
        (["dataset=image_folder", "dataset.path=.", "dataset.size=x"], "size must be a whole number, got 'x'"),
        (["dataset=none"], "dataset=none has no images"),
    ],
)
def test_a_set_that_cannot_be_made_is_one_line(tmp_path, capsys, overrides, message):
    assert prepare(tmp_path, *overrides) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
