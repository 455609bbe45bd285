import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from steadyflow.data import open_images, write_png_zip, write_shard
from steadyflow.data.archive import ImageArchive

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def noise_images(n, channels=3, size=(6, 5), seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, (n, channels, *size)).astype(np.uint8))


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)


def everything(files, batch_size=4, ranks=(0, 1)):
    batches = list(files.batches(batch_size, ranks))
    assert all(len(index) == len(images) == batch_size for index, images in batches[:-1])
    return torch.cat([index for index, _ in batches]), torch.cat([images for _, images in batches])


@pytest.mark.parametrize("write", [write_shard, write_png_zip])
@pytest.mark.parametrize("channels", [1, 3])
def test_shards_come_back_bit_for_bit_over_shard_borders(tmp_path, write, channels):
    images, index = noise_images(23, channels), torch.arange(100, 123)
    for start in (0, 7, 8, 20):
        stop = {0: 7, 7: 8, 8: 20, 20: 23}[start]
        write(tmp_path / "samples", index[start:stop], images[start:stop])
    for path in (tmp_path, tmp_path / "samples"):
        files = open_images(path)
        read_index, read = everything(files, 5)
        assert torch.equal(read_index, index)
        assert torch.equal(read, images)
        assert np.array_equal(files.index, index.numpy())
        assert files.shape == (channels, 6, 5)
        assert len(files) == 23


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_the_images_out_without_overlap(tmp_path, world):
    images = noise_images(23)
    for start in range(0, 23, 4):
        write_shard(tmp_path, torch.arange(start, min(start + 4, 23)), images[start : start + 4])
    parts = [everything(open_images(tmp_path), 3, (rank, world)) for rank in range(world)]
    for rank, (index, _) in enumerate(parts):
        assert index.tolist() == list(range(rank, 23, world))
    index, read = torch.cat([i for i, _ in parts]), torch.cat([x for _, x in parts])
    assert torch.equal(read[index.argsort()], images)


def test_more_ranks_than_images_leave_some_with_none(tmp_path):
    write_shard(tmp_path, torch.arange(2), noise_images(2))
    assert [len(list(open_images(tmp_path).batches(8, (rank, 4)))) for rank in range(4)] == [1, 1, 0, 0]


def test_a_folder_and_a_zip_of_it_are_read_alike_recursively_and_sorted(tmp_path):
    images = noise_images(5).permute(0, 2, 3, 1).numpy()
    names = ["b/x.png", "a/10.png", "a/9.PNG", "c.png", "a/deep/1.png"]
    for name, image in zip(names, images, strict=True):
        save(tmp_path / "in" / name, image)
    (tmp_path / "in" / "notes.txt").write_text("not an image, and not named like one")
    save(tmp_path / "in" / ".hidden.png", images[0, :2])
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as file:
        for name in names:
            file.write(tmp_path / "in" / name, f"top/{name}")
        file.writestr("__MACOSX/top/._c.png", b"resource fork")
    order = sorted(range(5), key=names.__getitem__)
    for path in (tmp_path / "in", tmp_path / "in.zip"):
        index, read = everything(open_images(path), 2)
        assert index.tolist() == [0, 1, 2, 3, 4]
        assert np.array_equal(read.permute(0, 2, 3, 1).numpy(), images[order])


def test_numbered_files_keep_their_numbers_and_repeated_numbers_do_not(tmp_path):
    image = noise_images(1)[0].permute(1, 2, 0).numpy()
    for name in ("00000041.png", "7.png"):
        save(tmp_path / "a" / name, image)
    assert sorted(open_images(tmp_path / "a").index.tolist()) == [7, 41]
    for name in ("x/1.png", "y/1.png"):
        save(tmp_path / "b" / name, image)
    assert open_images(tmp_path / "b").index.tolist() == [0, 1]


def test_grey_stays_single_channel_and_one_colour_image_makes_all_rgb(tmp_path):
    grey = noise_images(3, 1)[:, 0].numpy()
    save(tmp_path / "0.png", grey[0])
    save(tmp_path / "1.png", grey[1], "LA")
    Image.fromarray(grey[2]).convert("1").save(tmp_path / "2.png")
    _index, read = everything(open_images(tmp_path))
    assert read.shape[1] == 1
    assert np.array_equal(read[:2, 0].numpy(), grey[:2])
    assert set(read[2].unique().tolist()) <= {0, 255}
    colour = noise_images(1, 3, seed=4)[0].permute(1, 2, 0).numpy()
    alpha = np.dstack([colour, np.zeros(colour.shape[:2], np.uint8)])
    save(tmp_path / "3.png", alpha)
    _, read = everything(open_images(tmp_path))
    assert read.shape[1] == 3
    assert np.array_equal(read[0].numpy(), np.stack([grey[0]] * 3))
    assert np.array_equal(read[3].permute(1, 2, 0).numpy(), colour)  # the alpha channel is dropped, not blended


def test_palette_with_transparency(tmp_path):
    image = Image.fromarray(noise_images(1)[0].permute(1, 2, 0).numpy()).quantize(8)
    expected = np.asarray(image.convert("RGB"))
    image.save(tmp_path / "p.png", transparency=bytes([0, 128, 255]))
    _, read = everything(open_images(tmp_path))
    assert np.array_equal(read[0].permute(1, 2, 0).numpy(), expected)


def test_an_npz_without_index_in_the_layout_of_published_batches(tmp_path):
    images = noise_images(5)
    np.savez(tmp_path / "batch.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    index, read = everything(open_images(tmp_path / "batch.npz"), 2)
    assert index.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(read, images)


def test_labels_are_there_if_every_file_has_them(tmp_path):
    write_shard(tmp_path / "a", torch.tensor([4, 5]), noise_images(2), torch.tensor([7, 1]))
    write_shard(tmp_path / "a", torch.tensor([6]), noise_images(1), torch.tensor([3]))
    assert open_images(tmp_path / "a").label.tolist() == [7, 1, 3]
    write_shard(tmp_path / "a", torch.tensor([9]), noise_images(1))
    assert open_images(tmp_path / "a").label is None
    path = write_png_zip(tmp_path / "b", torch.tensor([4, 5]), noise_images(2))
    assert open_images(path).label is None
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("dataset.json", '{"labels": [["00000005.png", 8], ["00000004.png", 2]]}')
    assert open_images(path).label.tolist() == [2, 8]


def test_different_sizes_are_refused_with_both_names(tmp_path):
    save(tmp_path / "x" / "first.png", np.zeros((4, 6, 3), np.uint8))
    save(tmp_path / "x" / "second.png", np.zeros((6, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"first\.png is 6x4 and .*second\.png 4x6"):
        open_images(tmp_path / "x")
    write_shard(tmp_path / "s", torch.tensor([0]), noise_images(1))
    write_shard(tmp_path / "s", torch.tensor([1]), noise_images(1, size=(5, 5)))
    with pytest.raises(ValueError, match=r"00000000\.npz is 5x6 and .*00000001\.npz 5x5"):
        open_images(tmp_path / "s")


def test_the_same_index_twice_is_refused(tmp_path):
    write_shard(tmp_path, torch.tensor([0, 9]), noise_images(2))
    write_shard(tmp_path, torch.tensor([9]), noise_images(1))
    with pytest.raises(ValueError, match=r"image 9 is there twice, in .*00000000\.npz and .*00000009\.npz"):
        open_images(tmp_path)


def png_16_bit_rgb():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    data = zlib.compress(b"\0" + bytes(range(12)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_sixteen_bit_images_are_refused_by_name(tmp_path):
    save(tmp_path / "grey" / "deep.png", np.arange(12, dtype=np.uint16).reshape(3, 4))
    with pytest.raises(ValueError, match=r"deep\.png has more than 8 bits"):
        open_images(tmp_path / "grey")
    (tmp_path / "rgb").mkdir()
    (tmp_path / "rgb" / "deep.png").write_bytes(png_16_bit_rgb())
    with Image.open(tmp_path / "rgb" / "deep.png") as image:
        assert image.mode == "RGB"  # Pillow alone would not notice
    with pytest.raises(ValueError, match=r"deep\.png has more than 8 bits"):
        open_images(tmp_path / "rgb")


def test_files_that_are_no_images_are_refused_by_name(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "page.png").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match=r"page\.png is not an image"):
        open_images(tmp_path / "a")
    save(tmp_path / "b" / "cut.png", np.random.RandomState(0).randint(0, 256, (40, 40, 3)).astype(np.uint8))
    file = tmp_path / "b" / "cut.png"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.png is a damaged image"):
        everything(open_images(tmp_path / "b"))


def test_damaged_or_foreign_npz_files_are_refused_by_name(tmp_path):
    file = write_shard(tmp_path / "a", torch.arange(4), noise_images(4, size=(64, 64)))
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"00000000\.npz cannot be read"):
        open_images(tmp_path / "a")
    file.write_bytes(whole[:30_000] + bytes([whole[30_000] ^ 1]) + whole[30_001:])
    with pytest.raises(ValueError, match=r"00000000\.npz is no npz file, or a damaged one \(Bad CRC"):
        everything(open_images(tmp_path / "a"))
    for name, arrays, message in [
        ("float", {"images": np.zeros((2, 3, 3, 3), np.float32)}, "float32"),
        ("planes", {"images": np.zeros((2, 3, 8, 8), np.uint8)}, r"uint8 \(2, 3, 8, 8\)"),
        ("other", {"weights": np.zeros(3)}, "arrays weights and no"),
        ("index", {"images": np.zeros((2, 3, 3, 3), np.uint8), "index": np.arange(3)}, r"int64 \(3,\) for 2 images"),
        ("pickle", {"images": np.array([{}], object)}, "object"),
    ]:
        np.savez(tmp_path / f"{name}.npz", **arrays)
        with pytest.raises(ValueError, match=rf"{name}\.npz cannot be read as images: .*{message}"):
            open_images(tmp_path / f"{name}.npz")


def test_missing_empty_and_mixed_places_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"holds no image .*notes\.txt"):
        open_images(tmp_path)
    with pytest.raises(ValueError, match=r"notes\.txt is no zip"):
        open_images(tmp_path / "notes.txt")
    write_shard(tmp_path, torch.arange(1), noise_images(1))
    write_png_zip(tmp_path, torch.arange(1), noise_images(1))
    with pytest.raises(ValueError, match="holds npz and zip files"):
        open_images(tmp_path)


def test_bad_batch_size_or_rank(tmp_path):
    write_shard(tmp_path, torch.arange(2), noise_images(2))
    for arguments in [(0, (0, 1)), (1, (2, 2)), (1, (-1, 2))]:
        with pytest.raises(ValueError, match="need batch_size >= 1 and 0 <= rank < world"):
            list(open_images(tmp_path).batches(*arguments))


def test_a_forked_reader_has_its_own_place_in_the_zip(tmp_path):
    archive = open_images(write_png_zip(tmp_path, torch.arange(4), noise_images(4))).parts[0].files
    before = archive.files._opened()
    archive.files._owner = os.getpid() + 1  # as a child sees it
    assert archive.read(0)[:4] == b"\x89PNG"
    assert archive.files._opened() is not before


def test_cifar_jpegs_match_pillow():
    path = SHARED / "cifar10_jpeg" / "test.zip"
    if not path.exists():
        pytest.skip(f"no real images at {path}")
    files = open_images(path)
    index, images = next(files.batches(4, (3, 1000)))
    with zipfile.ZipFile(path) as file:
        names = sorted(file.namelist())
        assert len(files) == len(names) == 10_000
        assert files.shape == (3, 32, 32)
        for i, image in zip(index.tolist(), images, strict=True):
            expected = np.asarray(Image.open(file.open(names[i])))
            assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_a_folder_of_runs_is_no_folder_of_images(tmp_path):
    for run in ("a/run1", "a/run2"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "run.json").write_text("{}")
        Image.new("L", (4, 4)).save(tmp_path / run / "grid.png")
    with pytest.raises(ValueError, match=r" holds 2 runs; give one of them, such as .*a/run2"):
        open_images(tmp_path)


@pytest.mark.parametrize("damage", ["absurd sides", "short header", "broken stream", "broken member"])
def test_damage_that_pillow_and_zlib_raise_in_their_own_ways_is_named(tmp_path, damage):
    file = tmp_path / ("x.zip" if "broken" in damage else "x.png")
    if damage == "absurd sides":
        save(tmp_path / "x.bmp", np.zeros((8, 8, 3), np.uint8))
        data = (tmp_path / "x.bmp").read_bytes()
        file.write_bytes(data[:18] + struct.pack("<ii", 2**30, 2**30) + data[26:])
        (tmp_path / "x.bmp").unlink()
    elif damage == "short header":
        chunk = b"IHDR" + bytes(5)
        file.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 5) + chunk + struct.pack(">I", zlib.crc32(chunk)))
    else:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as members:
            members.writestr("x.png", bytes(500))
        data = file.read_bytes()
        at = 0 if damage == "broken member" else 35  # 30 bytes of header and the name; then no such kind of block
        file.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    archive = ImageArchive(file)
    for read in (archive.header, archive.pixels):
        with pytest.raises(ValueError, match=r"x\.png (is not an image|cannot be read) \("):
            read(0)
