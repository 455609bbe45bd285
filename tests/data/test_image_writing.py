import numpy as np
import pytest
import torch
from PIL import Image

from steadyflow.data import save_grid, write_png_zip, write_shard
from steadyflow.data.image_writing import whole_file


def noise_images(n, channels):
    return torch.from_numpy(np.random.RandomState(1).randint(0, 256, (n, channels, 6, 5)).astype(np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_shard_is_a_plain_npz(tmp_path, channels):
    images = noise_images(3, channels)
    path = write_shard(tmp_path / "new", torch.tensor([12, 13, 20]), images)
    assert path == tmp_path / "new" / "00000012.npz"
    with np.load(path) as arrays:
        assert set(arrays.files) == {"images", "index"}
        assert arrays["images"].dtype == np.uint8
        assert arrays["index"].dtype == np.int64
        assert np.array_equal(arrays["images"], images.permute(0, 2, 3, 1).numpy())
        assert arrays["index"].tolist() == [12, 13, 20]


@pytest.mark.parametrize("write", [write_shard, write_png_zip])
def test_the_same_images_give_the_same_bytes_and_nothing_else_stays_behind(tmp_path, write):
    first = write(tmp_path / "a", torch.arange(3), noise_images(3, 3))
    second = write(tmp_path / "b", torch.arange(3, dtype=torch.int32), noise_images(3, 3))
    assert first.read_bytes() == second.read_bytes()
    assert [file.name for file in (tmp_path / "a").iterdir()] == [first.name]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted():
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_stands_in_its_place_of_the_grid(tmp_path, channels):
    images = noise_images(5, channels)
    save_grid(tmp_path / "grid.png", images, margin=1)
    grid = np.asarray(Image.open(tmp_path / "grid.png")).reshape(2 * 7 + 1, 3 * 6 + 1, channels)
    total = 0
    for i, image in enumerate(images):
        top, left = 1 + i // 3 * 7, 1 + i % 3 * 6
        assert np.array_equal(grid[top : top + 6, left : left + 5], image.permute(1, 2, 0).numpy())
        total += image.long().sum()
    assert grid.astype(np.int64).sum() == total  # the margins and the sixth place are black


@pytest.mark.parametrize(
    ("index", "images"),
    [
        (torch.arange(2), torch.zeros(2, 3, 4, 4)),
        (torch.arange(2), torch.zeros(2, 4, 4, 3, dtype=torch.uint8)),
        (torch.arange(3), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)),
        (torch.arange(0), torch.zeros(0, 3, 4, 4, dtype=torch.uint8)),
    ],
)
def test_what_is_no_batch_of_images_is_refused(tmp_path, index, images):
    with pytest.raises(ValueError, match=r"need images uint8 \(n, 1 or 3, H, W\)"):
        write_shard(tmp_path, index, images)
