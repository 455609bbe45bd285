"""The public data sets as their configs read them, on a few pictures laid out as the originals are."""

import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from torch.utils.data import DataLoader

from steadyflow.data import from_uint8
from steadyflow.data.squares import square

CONFIGS = Path(__file__).parents[2] / "configs"
SHARED = Path(__file__).parents[2].parent / "shared" / "data"
SETS = sorted(f.stem for f in (CONFIGS / "dataset").glob("*.yaml") if "\nsource: " in f.read_text())


def dataset(name, data_dir, *overrides):
    """(a maker of splits, its config), with pictures kept few: `expected` is checked apart."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("prepare", [f"dataset={name}", f"data_dir={data_dir}", *overrides]).dataset
    make = instantiate(config, _partial_=True, expected=None, cache_dir=str(data_dir / "cache"))
    return config, lambda split="train", **changed: make(split=split, **changed)


def picture(path, width=12, height=9, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8))
    image.save(path)
    return image


def pixels(image):
    return from_uint8(torch.from_numpy(np.array(image))).permute(2, 0, 1)


@pytest.mark.parametrize("name", SETS)
def test_an_absent_set_says_where_how_and_what_to_set(name, tmp_path):
    config, make = dataset(name, tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        make("test")
    message = str(caught.value)
    assert "\n" not in message
    for part in (config.path, f"{name} comes from {config.source}", "dataset.path=PATH", str(tmp_path)):
        assert part in message


def test_celeba(tmp_path):
    _, make = dataset("celeba64", tmp_path)
    images = [picture(tmp_path / f"celeba/img_align_celeba/{i:06d}.jpg", 178, 218, i) for i in range(1, 6)]
    lines = [f"{i:06d}.jpg {part}" for i, part in enumerate([0, 1, 2, 0, 2], 1)]
    (tmp_path / "celeba/list_eval_partition.txt").write_text("\n".join(lines))
    train, test = make(), make("test")
    assert (train.names, test.names) == (["000001.jpg", "000004.jpg"], ["000003.jpg", "000005.jpg"])
    with Image.open(tmp_path / "celeba/img_align_celeba/000004.jpg") as file:
        assert torch.equal(train[1][0], pixels(square(file, 64, "bilinear", [25, 57, 128, 128])))
    assert len(images) == 5
    with pytest.raises(ValueError, match=r"celeba64 at .* has 5 images, expected 202599: .* dataset\.expected=null"):
        make(expected={"all": 202599})
    (tmp_path / "celeba/list_eval_partition.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match=r"no line `name number` for 1 of the images, such as 000001\.jpg"):
        make()
    (tmp_path / "celeba/list_eval_partition.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"no text file of image names at .*; set dataset\.only or"):
        make()


def test_afhq_of_one_class_and_of_three(tmp_path):
    for place in ("train/cat/1.png", "train/cat/2.png", "train/dog/1.png", "train/wild/1.png", "val/dog/1.png"):
        picture(tmp_path / "afhq" / place)
    (_, make), (_, cats), (_, dogs) = (dataset(f"afhq{name}", tmp_path) for name in ("", "_cat256", "_dog256"))
    assert (make().classes, make().labels.tolist(), make("test").labels.tolist()) == (
        ["cat", "dog", "wild"],
        [0, 0, 1, 2],
        [1],
    )
    assert (cats().names, cats().num_classes) == (["cat/1.png", "cat/2.png"], 0)
    assert dogs("test").names == ["dog/1.png"]
    with pytest.raises(ValueError, match=r"afhq_cat256 at .* has 2 images of split train, expected 5153"):
        cats(expected={"train": 5153})
    assert len(cats(expected={"train": 2, "test": 0, "all": 2})) == 2
    one = tmp_path / "afhq/train"  # without splits: the images of one, or of both
    assert len(cats(path=one, expected={"train": 2, "test": 7})) == len(
        cats(path=one, expected={"train": 1, "test": 1})
    )
    with pytest.raises(ValueError, match=r"has 2 images, expected 3 or 7 or 10: it is incomplete"):
        cats(path=one, expected={"train": 3, "test": 7})
    with pytest.raises(ValueError, match="expected counts images of train, test or all; got val"):
        cats(expected={"val": 3})


def test_imagenet_and_a_list_of_a_thousand(tmp_path):
    names = ["n01440764/ILSVRC2012_val_00000293.JPEG", "n01443537/ILSVRC2012_val_00000236.JPEG"]
    picture(tmp_path / "imagenet/train/n01440764/n01440764_1.JPEG")
    for i, name in enumerate(names):
        picture(tmp_path / "imagenet/val" / name, 150, 131 + i, i)
    (tmp_path / "list.txt").write_text("ILSVRC2012_val_00000236 1\n")
    _, make = dataset("imagenet64", tmp_path)
    assert (make("test").classes, make("test").labels.tolist(), len(make())) == (["n01440764", "n01443537"], [0, 1], 1)
    listed = make("test", only=tmp_path / "list.txt")
    assert (listed.names, listed.labels.tolist()) == ([names[1]], [1])
    with Image.open(tmp_path / "imagenet/val" / names[1]) as file:  # 150x132 > 128: a halving, then 75x66 to 73x64
        expected = file.resize((75, 66), Image.Resampling.BOX).resize((73, 64), Image.Resampling.BICUBIC)
    assert torch.equal(listed[0][0], pixels(expected.crop((4, 0, 68, 64))))
    (tmp_path / "list.txt").write_text("ILSVRC2012_val_00000236\nILSVRC2012_val_00000237\n")
    with pytest.raises(ValueError, match=r"lists 2 images, 1 of which are not there: \['ILSVRC2012_val_00000237'\]"):
        make("test", only=tmp_path / "list.txt")
    picture(tmp_path / "imagenet/val" / names[1].replace("n01443537", "n01440764"), 150, 132)
    (tmp_path / "list.txt").write_text("ILSVRC2012_val_00000236\n")
    with pytest.raises(ValueError, match=r"00000236, which is both n01440764/.* and n01443537/.*; remove one"):
        make("test", only=tmp_path / "list.txt")


def test_cifar10_as_edm_zips_it(tmp_path):
    images = [picture(tmp_path / f"{i}.png", 32, 32, i) for i in range(3)]
    names = [f"00000/img{i:08d}.png" for i in range(3)]
    with zipfile.ZipFile(tmp_path / "cifar10-32x32.zip", "w") as file:
        for i, name in enumerate(names):
            file.write(tmp_path / f"{i}.png", name)
        file.writestr("dataset.json", json.dumps({"labels": list(zip(names, [6, 9, 0]))}))
    _, make = dataset("cifar10_edm", tmp_path)
    data = make()
    assert (data.labels.tolist(), data.num_classes) == ([6, 9, 0], 10)
    assert all(torch.equal(x, pixels(image)) for (x, _), image in zip(data, images))
    assert data.fingerprint != make(class_json=False).fingerprint
    with zipfile.ZipFile(tmp_path / "cifar10-32x32.zip", "w") as file:
        file.write(tmp_path / "0.png", names[0])
    with pytest.raises(ValueError, match=r"no dataset\.json with a class for 00000/img00000000\.png; set .*=false"):
        make()


def test_lsun_from_lmdb_is_lsun_from_a_folder(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    (tmp_path / "lsun").mkdir()
    with lmdb.open(str(tmp_path / "lsun/bedroom_val_lmdb"), map_size=2**20) as base, base.begin(write=True) as edit:
        for i in range(3):
            picture(tmp_path / f"as_files/val/{i}.webp", 30, 20 + i, i)
            edit.put(f"{i}".encode(), (tmp_path / f"as_files/val/{i}.webp").read_bytes())
    _, make = dataset("lsun_bedroom", tmp_path)
    keyed, files = make("test", size=16), make("test", size=16, path=tmp_path / "as_files")
    assert keyed.names == ["0", "1", "2"]
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(keyed, files, strict=True))
    loaded = torch.cat([x for x, _ in DataLoader(keyed, 2, num_workers=1)])  # the parent has it open already
    assert torch.equal(loaded, torch.stack([x for x, _ in keyed]))
    assert len(keyed.fingerprint) == 64
    with pytest.raises(FileNotFoundError, match=r"bedroom has a split test and no train"):
        make()


def test_without_lmdb_its_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    (tmp_path / "church_train_lmdb").mkdir()
    (tmp_path / "church_train_lmdb/data.mdb").write_bytes(b"")
    _, make = dataset("lsun_church", tmp_path, f"dataset.path={tmp_path}/church")
    with pytest.raises(ValueError, match=r"is an lmdb database, .* pip install 'steadyflow\[lmdb\]'"):
        make()


def test_the_real_cifar10_as_images():
    if not (SHARED / "cifar10_jpeg").exists():
        pytest.skip(f"no real images at {SHARED / 'cifar10_jpeg'}")
    config, make = dataset("cifar10_zip", SHARED, f"dataset.path={SHARED}/cifar10_jpeg")
    test = make("test", expected=config.expected)
    assert torch.bincount(test.labels).tolist() == [1000] * 10
    assert test.classes[3] == "cat"
