"""A run's inversions on disk: written batch by batch, found again when the run is continued, drawn and summed up."""

import csv
import json
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from steadyflow.callbacks.results import log
from steadyflow.data.image_writing import save_grid, whole_file
from steadyflow.data.images import to_uint8
from steadyflow.data.npz import Npz
from steadyflow.metrics.paired import PSNR
from steadyflow.modules.inversion import Inverted, Inverting

Arrays = dict[str, np.ndarray]


class InversionFiles:
    """The folder `inversions` of a run: a folder a method, a file a batch, so that what is finished is what is there.

    METHOD/<first number, 8 digits>.npz holds, each leading with the n images of the batch:

        images uint8 (n, H, W, C)   the image that the method's sampler makes of the latent
        index, label int64 (n,)     the image's number and class (label where there are classes)
        latent (n, C, H, W)         x_T; of EDICT the pair (n, 2, C, H, W)
        loss, seconds, nfe (n,)     float64: |image - target|^2, and each image's share of time and evaluations
        epochs int64 (n,)
        curve, clock (n, E)         float64: loss and seconds at each epoch, NaN after the image has left

    so the folder of a method is a folder of images for `steadyflow evaluate` too.
    """

    def __init__(self, directory: Path, methods: list[str]):
        self.directory, self.folder, self.methods = directory, directory / "inversions", methods

    def tidy(self) -> None:
        """Removes what a killed process left."""
        for file in [*self.directory.glob(".*.tmp"), *self.folder.glob("*/.*.tmp")]:
            file.unlink(missing_ok=True)

    def index(self) -> dict[str, Tensor]:
        """The numbers of the images that are finished, by method.

        Raises:
            ValueError: a damaged file, by its name.
        """
        found = {method: self._parts(method) for method in self.methods}
        return {
            method: torch.from_numpy(np.concatenate([part["index"] for part in parts]))
            if parts
            else torch.empty(0).long()
            for method, parts in found.items()
        }

    def write(self, done: Inverted, index: Tensor, label: Tensor | None) -> None:
        """Writes a batch, whole or not at all."""
        assert done.found is not None
        of = {name: value.numpy() for name, value in vars(done.found).items()}
        images = to_uint8(done.image).permute(0, 2, 3, 1).contiguous().numpy()
        arrays = {"images": images, "index": index.numpy()} | ({} if label is None else {"label": label.numpy()})
        arrays |= {name: of[name] for name in ("latent", "epochs", "seconds")}
        arrays |= {
            "loss": done.loss.numpy(),
            "nfe": np.full(len(index), done.nfe),
            "curve": of["curve"].T,
            "clock": of["clock"].T,
        }
        folder = self.folder / done.method
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / f"{int(index[0]):08d}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    def read(self, method: str) -> Arrays:
        """All batches of a method as one, sorted by index; curves are as long as the longest, NaN where they ended."""
        parts = self._parts(method)
        longest = max(part["curve"].shape[1] for part in parts)
        for part in parts:
            for name in ("curve", "clock"):
                gap = longest - part[name].shape[1]
                part[name] = np.pad(part[name], ((0, 0), (0, gap)), constant_values=np.nan)
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.argsort(whole["index"])
        return {name: array[order] for name, array in whole.items()}

    def _parts(self, method: str) -> list[Arrays]:
        parts = []
        for file in sorted((self.folder / method).glob("*.npz")):
            with Npz(file, "; remove it and start the run again") as arrays:
                parts.append(dict(arrays))
        return parts


class InversionResults(L.Callback):
    """Writes each batch as it is finished; at the end, in the first process, what the whole run has found:

        grid.png            a row of images each: original | method | method ...
        losses.csv, .png    the loss of every image at every epoch, against epochs and against time
        metrics.json        METHOD/loss (mean of the least losses), METHOD/loss_std, METHOD/minutes_per_image and _std,
                            METHOD/epochs, METHOD/nfe (forward evaluations, backward passes not counted), METHOD/psnr;
                            the same without METHOD/ where there is one method

    Args:
        files: where to.
        protocol: what to say of the run itself.
    """

    def __init__(self, files: InversionFiles, protocol: dict[str, Any]):
        self.files, self.protocol = files, protocol
        self.results: dict[str, Any] = {}

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Lightning would go on to the end; files are whole or absent

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, Inverting)
        if len(outputs.rows):
            label = None if pl_module.label is None else pl_module.label[outputs.rows]
            self.files.write(outputs, pl_module.index[outputs.rows], label)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Inverting)
        trainer.strategy.barrier("inversions written")
        if not trainer.is_global_zero:
            return
        found = {method: self.files.read(method) for method in self.files.methods}
        target, directory = to_uint8(pl_module.images), self.files.directory
        made = [torch.from_numpy(of["images"]).permute(0, 3, 1, 2) for of in found.values()]
        columns = len(made) + 1
        rows = torch.stack([target, *made], 1)[:64]
        save_grid(directory / "grid.png", rows.flatten(0, 1), columns * max(1, round((len(rows) / columns) ** 0.5)))
        with whole_file(directory / "losses.csv") as temporary, temporary.open("w", newline="") as file:
            write_losses(file, found)
        with whole_file(directory / "losses.png") as temporary:
            draw_losses(temporary, found)
        self.results = self._metrics(found, target)
        with whole_file(directory / "metrics.json") as temporary:
            temporary.write_text(json.dumps(self.results, indent=2) + "\n")
        numbers = {k: v for k, v in self.results.items() if isinstance(v, int | float)}
        log(trainer, numbers, directory / "grid.png")

    def _metrics(self, found: Mapping[str, Arrays], target: Tensor) -> dict[str, Any]:
        results: dict[str, Any] = {}
        reason: dict[str, str] = {}
        for method, of in found.items():
            psnr = PSNR().compare(torch.from_numpy(of["images"]).permute(0, 3, 1, 2), target).mean().item()
            several = len(target) > 1
            numbers = {
                "loss": of["loss"].mean(),
                "loss_std": of["loss"].std(ddof=1) if several else None,
                "minutes_per_image": of["seconds"].mean() / 60,
                "minutes_per_image_std": of["seconds"].std(ddof=1) / 60 if several else None,
                "epochs": of["epochs"].mean(),
                "nfe": of["nfe"].mean(),
                "psnr": psnr if np.isfinite(psnr) else None,
            }
            for prefix in [f"{method}/"] + ([""] if len(found) == 1 else []):
                results |= {prefix + name: None if v is None else float(v) for name, v in numbers.items()}
                if not np.isfinite(psnr):
                    reason[f"{prefix}psnr"] = "infinite: an image came back byte for byte"
        return results | {"protocol": self.protocol | {"count": len(target)}, "reason": reason}


def write_losses(file: Any, found: Mapping[str, Arrays]) -> None:
    """A line for each method, image and epoch; of a method without epochs one, at epoch 0."""
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", "index", "epoch", "seconds", "loss"])
    for method, of in found.items():
        for i, index in enumerate(of["index"]):
            if of["curve"].shape[1] == 0:
                writer.writerow([method, index, 0, f"{of['seconds'][i]:.6g}", f"{of['loss'][i]:.8g}"])
            for k in range(of["epochs"][i]):
                writer.writerow([method, index, k + 1, f"{of['clock'][i, k]:.6g}", f"{of['curve'][i, k]:.8g}"])


def draw_losses(file: Path, found: Mapping[str, Arrays]) -> None:
    """Mean, least and largest loss over the images, against epochs and against each image's share of the time.

    An image that has left keeps its last loss. A method without epochs is a line across, and a point in time. The axis
    ends at 1e-12: smaller losses, 0 among them, are drawn there.
    """
    figure = Figure(figsize=(10, 4), dpi=130)
    left, right = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.1, right=0.985, bottom=0.13, top=0.97, wspace=0.05)  # a layout engine takes 1 s
    for n, (method, of) in enumerate(found.items()):
        colour, curve, clock = f"C{n}", np.maximum(of["curve"], 1e-12), of["clock"]
        if curve.shape[1] == 0:
            loss = max(of["loss"].mean(), 1e-12)
            left.axhline(loss, color=colour, ls="--", label=method)
            right.plot(of["seconds"].mean(), loss, "o", color=colour, label=method)
            continue
        times = np.linspace(np.nanmax(clock[:, 0]), np.nanmax(clock), 400)
        at = [np.searchsorted(c[np.isfinite(c)], times, "right") - 1 for c in clock]
        epochs = np.minimum(np.arange(curve.shape[1]), of["epochs"][:, None] - 1)
        for axes, x, y in (
            (left, 1 + np.arange(curve.shape[1]), np.take_along_axis(curve, epochs, 1)),
            (right, times, np.stack([c[i] for c, i in zip(curve, at, strict=True)])),
        ):
            axes.plot(x, y.mean(0), color=colour, label=method)
            axes.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.2, lw=0)
    left.set(xlabel="epoch", ylabel=r"$\|x_0 - x_0^*\|^2$", yscale="log")
    right.set(xlabel="seconds for an image")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend(frameon=False)
    figure.savefig(file, format="png")
