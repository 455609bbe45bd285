import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from steadyflow.data import ImageFolder, from_uint8
from steadyflow.data.archive import ImageArchive
from steadyflow.data.images import content_of

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def picture(height, width, seed=0):
    """A smooth picture, so that kernels differ by more than rounding but a shift by one pixel shows."""
    coarse = np.random.RandomState(seed).randint(0, 256, (5, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def folder(path, names, size=(9, 11)):
    for i, name in enumerate(names):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(*size, seed=i).save(path / name)
    return path


def zipped(path):
    """A zip of a folder, beside it."""
    with zipfile.ZipFile(path.with_suffix(".zip"), "w") as file:
        for name in path.rglob("*.*"):
            file.write(name, name.relative_to(path))
    return path.with_suffix(".zip")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear", "lanczos", "box", "nearest"])
def test_resize_and_crop_are_torchvisions(tmp_path, kernel):
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    expected = Compose([Resize(16, InterpolationMode[kernel.upper()]), CenterCrop(16)])
    for i, (height, width) in enumerate([(40, 57), (57, 40), (16, 33), (17, 16), (9, 13), (16, 16), (95, 31)]):
        image = picture(height, width, i)
        (tmp_path / f"{i}").mkdir()
        image.save(tmp_path / f"{i}" / "x.png")
        x, label = ImageFolder(tmp_path / f"{i}", size=16, resize=kernel)[0]
        pixels = torch.from_numpy(np.array(expected(image))).permute(2, 0, 1)
        assert torch.equal(x, from_uint8(pixels))
        assert label == 0


def test_without_resize_the_centre_is_cut_out(tmp_path):
    image = picture(10, 14)
    image.save(tmp_path / "x.png")
    x, _ = ImageFolder(tmp_path, size=6, resize=None)[0]
    assert torch.equal(x, from_uint8(torch.from_numpy(np.array(image)[2:8, 4:10])).permute(2, 0, 1))
    with pytest.raises(ValueError, match=r"x\.png is 14x10, smaller than 12; set dataset\.resize"):
        ImageFolder(tmp_path, size=12, resize=None)[0]


def test_grey(tmp_path):
    image = picture(8, 8)
    image.save(tmp_path / "x.png")
    x, _ = ImageFolder(tmp_path, size=8, channels=1)[0]
    assert torch.equal(x, from_uint8(torch.from_numpy(np.array(image.convert("L")))[None]))


def test_a_zip_is_the_folder_it_was_made_of(tmp_path, cache):
    files = folder(tmp_path / "set", ["cat/1.png", "cat/2.png", "ape/1.png"])
    one = ImageFolder(files, size=8, class_folders=True, cache_dir=cache)
    two = ImageFolder(zipped(files), size=8, class_folders=True, cache_dir=cache)
    assert one.names == two.names == ["ape/1.png", "cat/1.png", "cat/2.png"]
    assert one.classes == ["ape", "cat"]
    assert one.labels.tolist() == two.labels.tolist() == [0, 1, 1]
    assert one.fingerprint == two.fingerprint
    for (x, label), (y, other) in zip(one, two, strict=True):
        assert torch.equal(x, y)
        assert label == other


def test_worker_processes_read_what_one_process_reads(tmp_path):
    files = zipped(folder(tmp_path / "set", [f"{i}.png" for i in range(20)], size=(32, 32)))
    data = ImageFolder(files)
    expected = torch.stack([x for x, _ in data])  # the zip is open here when the workers are forked
    found = torch.cat([x for x, _ in DataLoader(data, 3, num_workers=2)])
    assert torch.equal(found, expected)


def test_in_memory_is_the_same_set(tmp_path, cache):
    files = folder(tmp_path / "set", [f"{i}.png" for i in range(5)])
    lazy = ImageFolder(files, size=8, cache_dir=cache)
    held = ImageFolder(files, size=8, in_memory=True, cache_dir=cache)
    assert not hasattr(lazy, "images")
    assert torch.equal(from_uint8(held.images), torch.stack([x for x, _ in lazy]))
    assert torch.equal(held[3][0], lazy[3][0])
    assert held.fingerprint == lazy.fingerprint


def test_the_splits_that_a_folder_brings_share_their_classes(tmp_path):
    folder(tmp_path / "set" / "train", ["cat/1.png", "dog/1.png", "ape/1.png"])
    zipped(folder(tmp_path / "set" / "test", ["dog/7.png"]))
    for file in sorted((tmp_path / "set" / "test").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    (tmp_path / "set" / "test").rmdir()
    train, test = (ImageFolder(tmp_path / "set", split, class_folders=True) for split in ("train", "test"))
    assert (train.names, train.labels.tolist()) == (["ape/1.png", "cat/1.png", "dog/1.png"], [0, 1, 2])
    assert (test.names, test.labels.tolist(), test.num_classes) == (["dog/7.png"], [2], 3)
    (tmp_path / "set" / "test.zip").unlink()
    with pytest.raises(FileNotFoundError, match=r"set has a split train and no test \(a folder or test\.zip\)"):
        ImageFolder(tmp_path / "set", "test")


def test_splits_further_inside_are_not_mixed(tmp_path):
    """AFHQ's own zip holds train and test: read as one archive, its test images would be trained on."""
    zipped(folder(tmp_path / "set", ["afhq/train/cat/1.png", "afhq/val/cat/2.png"]))
    for path in (tmp_path / "set", tmp_path / "set.zip"):
        with pytest.raises(ValueError, match=r"set.* holds the folders train and val further inside, .* dataset\.path"):
            ImageFolder(path, class_folders=True)
    assert ImageFolder(tmp_path / "set/afhq").names == ["cat/1.png"]
    assert ImageFolder(tmp_path / "set.zip", folder="train").names == ["afhq/train/cat/1.png"]


def test_linked_class_folders_are_read_and_are_of_the_content(tmp_path):
    folder(tmp_path / "all", ["cat/1.png", "dog/1.png", "ape/1.png"])
    some = tmp_path / "some"
    some.mkdir()
    for name in ("cat", "dog"):
        (some / name).symlink_to(tmp_path / "all" / name)
    (some / "up").symlink_to(some)  # not walked again
    assert ImageFolder(some, class_folders=True).names == ["cat/1.png", "dog/1.png"]
    (tmp_path / "all/cat/dog").symlink_to(tmp_path / "all/dog")
    (tmp_path / "all/dog/cat").symlink_to(tmp_path / "all/cat")  # each is in the other, once
    assert ImageFolder(some).names == ["cat/1.png", "cat/dog/1.png", "dog/1.png", "dog/cat/1.png"]
    before = content_of(some)
    picture(3, 5).save(tmp_path / "all/cat/1.png")
    assert content_of(some) != before


@pytest.mark.parametrize("mode", ["CMYK", "L", "LA", "RGBA", "P", "1"])
def test_every_8_bit_mode_is_read_as_pillow_converts_it(tmp_path, mode):
    picture(9, 9).convert(mode).save(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"))
    with Image.open(next(tmp_path.iterdir())) as image:
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(ImageFolder(tmp_path, size=9, resize=None)[0][0], from_uint8(expected))


def test_held_out_images_are_chosen_by_name_alone(tmp_path):
    files = folder(tmp_path / "set", [f"{i}.png" for i in range(30)])
    train, test = (ImageFolder(files, split, held_out=10) for split in ("train", "test"))
    assert len(test) == 10
    assert sorted(train.names + test.names) == sorted(f"{i}.png" for i in range(30))
    (files / "3.png").unlink()
    folder(files, [f"{i}.png" for i in range(30, 33)])
    later = ImageFolder(files, "test", held_out=10)
    assert len(set(later.names) & set(test.names)) >= 6  # each image added or removed moves at most one over the border
    last = ImageFolder(files, "test", held_out=10, hold_last=True)
    assert last.names == sorted(f"{i}.png" for i in range(33) if i != 3)[-10:]
    assert not {*last.names} & {*ImageFolder(files, held_out=10, hold_last=True).names}
    with pytest.raises(FileNotFoundError, match=r"split test is empty: 32 images, 0 of them held out"):
        ImageFolder(files, "test")
    with pytest.raises(FileNotFoundError, match=r"split train is empty: 32 images, 40 of them held out"):
        ImageFolder(files, held_out=40)


def test_fingerprint_follows_content_and_settings(tmp_path, cache):
    files = folder(tmp_path / "set", ["a/1.png", "b/2.png"])

    def fingerprint(**settings):
        return ImageFolder(files, **{"size": 8, "cache_dir": cache, **settings}).fingerprint

    first = fingerprint()
    others = {fingerprint(**s) for s in ({"size": 9}, {"resize": "box"}, {"channels": 1}, {"class_folders": True})}
    others.add(fingerprint(held_out=1))
    assert len(others) == 5
    picture(9, 11, seed=50).save(files / "b/2.png")
    others.add(fingerprint())
    (files / "b/2.png").rename(files / "b/3.png")
    others.add(fingerprint())
    assert len(others) == 7
    assert first not in others


def test_unchanged_content_is_hashed_once(tmp_path, cache, monkeypatch):
    files, reads = folder(tmp_path / "set", ["1.png", "2.png"]), []
    read = ImageArchive.read
    monkeypatch.setattr(ImageArchive, "read", lambda self, i: reads.append(i) or read(self, i))
    prints = [ImageFolder(files, size=size, cache_dir=cache).fingerprint for size in (8, 8, 16)]
    assert prints[0] == prints[1] != prints[2]
    assert reads == [0, 1]
    (tmp_path / "file").write_text("")
    assert ImageFolder(files, size=8, cache_dir=tmp_path / "file").fingerprint == prints[0]  # no cache: hashed again
    assert reads == [0, 1, 0, 1]


def test_bad_places_and_settings_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder or zip of images at .*nowhere; .*dataset\.path=PATH"):
        ImageFolder(tmp_path / "nowhere")
    files = folder(tmp_path / "set", ["cat/1.png", "stray.png"])
    with pytest.raises(ValueError, match=r"stray\.png in .* lies in no class folder"):
        ImageFolder(files, class_folders=True)
    for settings, message in [
        ({"size": 0}, "need size >= 1 and resize adm, bicubic, .* got 0"),
        ({"resize": "cubic"}, "got 32 and cubic"),
        ({"crop": "round"}, r"crop must be null, square, or \[left, top, width, height\]"),
        ({"crop": [1, 2, 3]}, r"got \[1, 2, 3\]"),
        ({"channels": 2}, "need channels 1 or 3"),
        ({"held_out": -1}, "held_out >= 0"),
        ({"class_folders": True, "class_json": True}, "at most one of class_folders and class_json"),
    ]:
        with pytest.raises(ValueError, match=message):
            ImageFolder(files, **settings)
    (files / "broken.png").write_text("?")
    with pytest.raises(ValueError, match=r"broken\.png is not an image"):
        ImageFolder(files, in_memory=True)


def test_cifar_jpegs():
    if not (SHARED / "cifar10_jpeg").exists():
        pytest.skip(f"no real images at {SHARED / 'cifar10_jpeg'}")
    data = ImageFolder(SHARED / "cifar10_jpeg", "test", class_folders=True)
    assert data.classes == ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    assert torch.bincount(data.labels).tolist() == [1000] * 10
    i = data.names.index("frog/0005.jpg")
    with zipfile.ZipFile(SHARED / "cifar10_jpeg" / "test.zip") as file, file.open("frog/0005.jpg") as image:
        expected = from_uint8(torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1))
    x, label = data[i]
    assert torch.equal(x, expected)
    assert label == 6


def test_kodak_photographs_of_both_orientations():
    if not (SHARED / "kodak").exists():
        pytest.skip(f"no photographs at {SHARED / 'kodak'}")
    data = ImageFolder(SHARED / "kodak", size=512, resize=None)
    for name, top, left in [("01.png", 0, 128), ("04.png", 128, 0)]:
        pixels = np.array(Image.open(SHARED / "kodak" / name))[top : top + 512, left : left + 512]
        assert torch.equal(data[data.names.index(name)][0], from_uint8(torch.from_numpy(pixels).permute(2, 0, 1)))
