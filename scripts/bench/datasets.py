"""Images per second out of a data set: encoded files, the same as shards, and as one tensor in memory.

Two sets: as many images of 32x32 as there are (CIFAR-10 as JPEG, of the folder or zip that is named, else digits as
PNG), and 512 of 256x256 cut from one photograph of scikit-image's, as JPEG. Batches of 64 in random order, one process;
each way three times, alternating, the fastest counts, CPU time.

python scripts/bench/datasets.py [IMAGES]
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from skimage.data import astronaut

from steadyflow.data import Digits, ImageFolder, InMemoryImages, Shards, write_shards
from steadyflow.data.image_writing import pillow

BATCH, BATCHES = 64, 24


def main() -> int:
    torch.set_num_threads(1)
    table = Table(title="images per CPU second, batches of 64 in random order", title_justify="left")
    for column in ("set", "files", "shards", "in memory", "shards / files"):
        table.add_column(column, justify="left" if column == "set" else "right")
    with tempfile.TemporaryDirectory() as folder:
        for name, files in sets(Path(folder), Path(sys.argv[1]) if sys.argv[1:] else None):
            for _ in write_shards(files, Path(folder) / "shards" / name):
                pass
            shards = Shards(Path(folder) / "shards" / name)
            memory = InMemoryImages(name, "train", shards.pixels(range(len(shards))), shards.labels)
            assert torch.equal(files[7][0], shards[7][0])
            ways = [files, shards, memory]
            seconds = np.min([[measured(way) for way in ways] for _ in range(3)], axis=0)
            rates = BATCH * BATCHES / seconds
            table.add_row(name, *[f"{rate:,.0f}" for rate in rates], f"{rates[1] / rates[0]:.1f}x")
    Console().print(table)
    return 0


def measured(dataset: ImageFolder | Shards | InMemoryImages) -> float:
    """CPU seconds of the batches."""
    order = np.random.RandomState(0).randint(0, len(dataset), (BATCHES, BATCH)).tolist()
    start = time.process_time()
    for indices in order:
        torch.stack([x for x, _ in dataset.__getitems__(indices)])
    return time.process_time() - start


def sets(folder: Path, images: Path | None) -> list[tuple[str, ImageFolder]]:
    """(name, set of encoded files)."""
    if images is None:
        (folder / "digits").mkdir()
        for i, image in enumerate(Digits().images):
            pillow(image).save(folder / "digits" / f"{i:05d}.png")
    (folder / "photographs").mkdir()
    photograph, random = astronaut(), np.random.RandomState(0)
    for i in range(512):
        top, left = random.randint(0, 257, 2)
        Image.fromarray(photograph[top : top + 256, left : left + 256]).save(
            folder / "photographs" / f"{i:05d}.jpg", quality=90
        )
    small = images or folder / "digits"
    return [
        (f"{small.stem} 32x32", ImageFolder(small, size=32, resize=None, cache_dir=folder / "cache")),
        ("photographs 256x256", ImageFolder(folder / "photographs", size=256, resize=None, cache_dir=folder / "cache")),
    ]


if __name__ == "__main__":
    sys.exit(main())
