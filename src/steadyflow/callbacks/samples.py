"""A run's samples on disk: written batch by batch, found again when the run is continued, drawn."""

import json
import zipfile
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from steadyflow.data.image_files import open_images
from steadyflow.data.image_writing import save_grid, whole_file, write_png_zip, write_shard
from steadyflow.data.npz import Npz
from steadyflow.modules.sampling import Samples

FORMATS = ("npz", "png")


class SampleFiles:
    """The folder of a run's samples: a file a batch, so that what is finished is what is there.

    Images go to npz shards (`images` uint8 (n, H, W, C), `index` int64, `label` int64 where there are labels) or, as
    `png`, to zips of <index>.png, joined at the end into one `images.zip` with the labels in its `dataset.json`.
    Vectors go to npz shards with `samples` float32 (n, D) in place of `images`.

    Args:
        directory: of the run.
        format: npz or png.
        vector: whether the samples are vectors, which have no png.
        name: of the folder.

    Raises:
        ValueError: an unknown format, or png for vectors.
    """

    def __init__(self, directory: Path, format: str = "npz", vector: bool = False, name: str = "samples"):
        if format not in FORMATS or (vector and format == "png"):
            raise ValueError(f"format must be {'npz for vectors' if vector else 'npz or png'}, got {format!r}")
        self.directory, self.folder, self.format, self.vector = directory, directory / name, format, vector

    def tidy(self) -> None:
        """Removes what a killed process left: temporary files, and the parts of a zip that is whole already."""
        for file in [*self.directory.glob(".*.tmp"), *self.folder.glob(".*.tmp")]:
            file.unlink(missing_ok=True)
        if (self.folder / "images.zip").exists():
            for part in self._parts():
                part.unlink(missing_ok=True)

    def index(self) -> np.ndarray:
        """The numbers of the samples there are, sorted, int64.

        Raises:
            ValueError: a damaged file, by its name.
        """
        if not any(self.folder.glob("*.npz")) and not any(self.folder.glob("*.zip")):
            return np.empty(0, np.int64)
        return np.sort(self.vectors()[0] if self.vector else open_images(self.folder).index)

    def write(self, samples: Samples) -> None:
        """Writes a batch, whole or not at all."""
        if self.vector:
            arrays = {"samples": samples.x, "index": samples.indices}
            arrays |= {} if samples.label is None else {"label": samples.label}
            self.folder.mkdir(parents=True, exist_ok=True)
            file = self.folder / f"{int(samples.indices[0]):08d}.npz"
            with whole_file(file) as temporary, temporary.open("wb") as out:
                np.savez(out, **{name: array.numpy() for name, array in arrays.items()})  # type: ignore[arg-type]
        elif self.format == "png":
            write_png_zip(self.folder, samples.indices, samples.x)
        else:
            write_shard(self.folder, samples.indices, samples.x, samples.label)

    def vectors(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(index (N,), samples (N, D), label (N,) or None) of vector samples, sorted by index."""
        parts: list[dict[str, np.ndarray]] = []
        for file in sorted(self.folder.glob("*.npz")):
            with Npz(file, "; remove it and start the run again") as arrays:
                parts.append(dict(arrays))
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.argsort(whole["index"])
        label = whole["label"][order] if "label" in whole else None
        return whole["index"][order], whole["samples"][order], label

    def first_images(self, count: int) -> Tensor:
        """The images of the `count` lowest numbers, (count, C, H, W) uint8 in the order of their numbers."""
        files = open_images(self.folder)
        return files.read(np.sort(files.index)[:count])

    def join(self, label: Tensor | Mapping[int, int] | None) -> None:
        """Joins the zips of a finished run into images.zip; sample i has label[i]."""
        whole, parts = self.folder / "images.zip", self._parts()
        if self.format != "png" or not parts:
            return
        members: dict[str, Path] = {}
        for part in parts:
            with zipfile.ZipFile(part) as file:
                members |= dict.fromkeys(file.namelist(), part)
        with whole_file(whole) as temporary, zipfile.ZipFile(temporary, "w") as out:
            for part, names in groupby(sorted(members), members.__getitem__):
                with zipfile.ZipFile(part) as file:
                    for name in names:
                        out.writestr(zipfile.ZipInfo(name), file.read(name))
            if label is not None:
                labels = [(name, int(label[int(Path(name).stem)])) for name in sorted(members)]
                out.writestr(zipfile.ZipInfo("dataset.json"), json.dumps({"labels": labels}))
        for part in parts:
            part.unlink()

    def _parts(self) -> list[Path]:
        return sorted(file for file in self.folder.glob("*.zip") if file.name != "images.zip")

    def draw(self, file: Path, columns: int | None = None, reference: Tensor | None = None) -> None:
        """Draws the samples: the first 64 images, or 8 rows of `columns`; or all vectors over the reference (M, D)."""
        if not self.vector:
            save_grid(file, self.first_images(8 * columns if columns else 64), columns)
            return
        _, x, label = self.vectors()
        figure = Figure(figsize=(5, 5), dpi=120, layout="constrained")
        axes = figure.subplots()
        size = max(0.5, min(8.0, 4000 / len(x)))
        if reference is not None:
            r = reference[:10000].numpy()
            axes.scatter(r[:, 0], r[:, 1 % r.shape[1]], s=size, c="0.8", linewidths=0, label="data")
        colours = "C0" if label is None else [f"C{i % 10}" for i in label]
        axes.scatter(x[:, 0], x[:, 1 % x.shape[1]], s=size, c=colours, linewidths=0, label="samples")
        axes.set(aspect="equal", title="" if x.shape[1] <= 2 else f"the first two of {x.shape[1]} coordinates")
        with whole_file(file) as temporary:
            figure.savefig(temporary, format="png")


class SampleWriter(L.Callback):
    """Writes each batch of samples as it is finished; at the end waits for all processes. First in the list.

    Args:
        files: where to.
        label: label[i] is the class of sample i, for the zip of png; None: there are no classes.
    """

    def __init__(self, files: SampleFiles, label: Tensor | Mapping[int, int] | None = None):
        self.files, self.label = files, label

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if len(outputs.indices):
            self.files.write(outputs)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier("samples written")
        if trainer.is_global_zero:
            self.files.join(self.label)
        trainer.strategy.barrier("samples joined")
