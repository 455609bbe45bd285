"""`steadyflow restore`: images from incomplete, noisy measurements, by a checkpoint that was trained without them."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from steadyflow.callbacks.evaluation import Evaluation
from steadyflow.callbacks.results import SampleResults
from steadyflow.callbacks.samples import SampleFiles
from steadyflow.checkpoints import Checkpoint
from steadyflow.data import from_uint8, open_images, save_grid, to_uint8
from steadyflow.data.image_writing import pillow, whole_file
from steadyflow.data.images import content_of
from steadyflow.jobs import record
from steadyflow.jobs.pictures import chosen_images, condition_labels
from steadyflow.jobs.sample import check_null, make, sampler_on
from steadyflow.metrics import Consistency
from steadyflow.modules.restoring import Measurements, Restoration
from steadyflow.modules.sampling import Sampling
from steadyflow.restorers import Restorer

log = logging.getLogger(__name__)
DRAWN = 16  # images of the grid


def run(cfg: DictConfig) -> dict[str, Any]:
    """Restores the images that are not restored yet and writes

        restored/       npz shards (images uint8 (n, H, W, C), index, label) or, format=png, one zip; restored.png of
                        `input`
        grid.png        reference | measurement | restoration of the first 16; with samples_per_image > 1, of the first
                        8, reference | measurement | samples | their mean | their standard deviation, whitest where it
                        is the picture's largest
        posterior.npz   of each image then mean and std (n, C, H, W) of its samples, in [-1, 1], and its index
        per_image.csv   psnr, ssim, lpips ... of each image
        metrics.json    their means and standard deviations, fid, kid, consistency (|A x - y| / |y|), nfe,
                        seconds_per_image ... with their protocol; null with a reason where one cannot be had
        run.json        config, versions, git state, hardware, precision; logs/ the logger's

    The images are measured here, image i with noise that is a function of (seed, i) alone (with K = samples_per_image
    its restorations are K i to K i + K - 1); or, as `input`, degraded already, with no reference to compare with. A
    start in the directory of a killed run makes what is missing.

    Returns:
        What metrics.json holds.

    Raises:
        ValueError: images, a task or a checkpoint that do not fit one another, a sampler that restores nothing, a
            directory used otherwise.
        FileNotFoundError: no images there.
        FloatingPointError: a state that is not finite: of which images, at which step, and how many are kept.
    """
    cfg = record.resumed(cfg)
    directory = Path(HydraConfig.get().runtime.output_dir)
    dataset = instantiate(cfg.dataset) if cfg.input is None and cfg.images is None else None
    checkpoint: Checkpoint = instantiate(cfg.checkpoint)
    if len(checkpoint.shape) != 3:
        raise ValueError(f"checkpoint {checkpoint.name} makes vectors {checkpoint.shape}; choose one of images")
    denoiser = checkpoint.denoiser.requires_grad_(False)
    restorer = sampler_on(cfg.sampler, checkpoint)
    if not isinstance(restorer, Restorer):
        raise ValueError(
            f"{type(restorer).__name__} draws samples and reads no measurement; use it with steadyflow sample, or "
            "choose a restorer, e.g. sampler=ot_ode"
        )
    if cfg.input is not None and cfg.images is not None:
        raise ValueError("input is degraded already and images are to be degraded here; give one of them")
    if cfg.input is None:
        images, source = chosen_images(cfg, dataset)
        checkpoint.check(images.shape, source)
    else:
        images, source = open_images(cfg.input), str(cfg.input)
        images = images.only(np.sort(images.index))
    samples = cfg.samples_per_image
    if not (isinstance(samples, int) and samples >= 1):
        raise ValueError(f"samples_per_image must be at least 1, got {samples}")
    images = images.repeated(samples) if samples > 1 else images
    operator = instantiate(cfg.task.operator, shape=checkpoint.shape)
    measurements = Measurements(images, operator, cfg.task.sigma_y, cfg.seed, cfg.input is not None, samples)
    if cfg.input is not None and images.shape[1:] != operator.measured_shape[1:]:
        sizes = " of ".join("{2}x{1}".format(*shape) for shape in (operator.measured_shape, images.shape))
        log.warning("%s: the middle %s pixels are taken, as this checkpoint and task need", source, sizes)

    index, own = torch.from_numpy(images.index), None if images.label is None else torch.from_numpy(images.label)
    label = condition_labels(cfg.label, own, len(images), checkpoint.num_classes)
    check_null(checkpoint, label, cfg.guidance_scale)
    files = SampleFiles(directory, cfg.format, name="restored")
    module = Sampling(
        denoiser,
        Restoration(restorer, measurements),
        checkpoint.shape,
        cfg.seed,
        index,
        label,
        batch_size=cfg.batch_size,
        guidance_scale=cfg.guidance_scale,
        num_classes=checkpoint.num_classes,
    )
    choices = HydraConfig.get().runtime.choices
    protocol = {"sampler": choices["sampler"], "task": choices["task"], "sigma_y": cfg.task.sigma_y, "images": source}
    results = SampleResults(files, partial(draw, files, measurements), protocol)
    callbacks = [*(instantiate(cfg.callbacks) or {}).values()]
    for callback in callbacks:
        if isinstance(callback, Evaluation):
            callback.paired_with = None if measurements.degraded else images
            callback.metrics["consistency"] = Consistency(measurements)
    content = content_of(Path(source).expanduser()) if dataset is None else dataset.fingerprint
    inputs = {"checkpoint": checkpoint.sha256, "images": content}
    return make(cfg, module, files, [*callbacks, results], inputs, inference_mode=False)  # methods differentiate


def draw(files: SampleFiles, measurements: Measurements, grid: Path) -> None:
    """Draws reference | measurement | restoration, or measurement | restoration of what was degraded already.

    Of several samples of an image, their mean and standard deviation too (posterior.npz). Of one picture that was
    degraded already, the restoration goes to restored.png.
    """
    number = np.sort(open_images(files.folder).index)
    if measurements.samples > 1:
        return draw_posterior(files, measurements, number[:: measurements.samples] // measurements.samples, grid)
    index, restored = number[:DRAWN], files.first_images(DRAWN)
    measured, reference = measurements.drawn(torch.from_numpy(index)), measurements.images
    columns = [measured, restored] if measurements.degraded else [reference.read(index), measured, restored]
    blocks = -(-len(restored) // 8)  # rows of at most 8 images one below another, then beside them
    save_grid(grid, torch.stack(columns, 1).flatten(0, 1), len(columns) * blocks)
    if measurements.degraded and len(reference) == 1:
        with whole_file(files.directory / "restored.png") as temporary:
            pillow(restored[0]).save(temporary, format="PNG")


def draw_posterior(files: SampleFiles, measurements: Measurements, index: np.ndarray, grid: Path) -> None:
    """Writes posterior.npz: mean and standard deviation of the samples of each image; draws them of the first 8."""
    made, count = open_images(files.folder), measurements.samples
    groups = [from_uint8(made.read(i * count + np.arange(count))) for i in index]
    mean, std = torch.stack([x.mean(0) for x in groups]), torch.stack([x.std(0) for x in groups])
    with whole_file(files.directory / "posterior.npz") as temporary, temporary.open("wb") as out:
        np.savez(out, mean=mean.numpy(), std=std.numpy(), index=index)
    first, spread = index[:8] * count, std[:8].mean(1, keepdim=True).expand_as(mean[:8])
    columns = [] if measurements.degraded else [measurements.images.read(first)]
    columns += [measurements.drawn(torch.from_numpy(first))]
    columns += [made.read(first + k) for k in range(min(count, 4))]
    columns += [to_uint8(mean[:8]), to_uint8(2 * spread / spread.max().clamp(min=1e-6) - 1)]
    save_grid(grid, torch.stack(columns, 1).flatten(0, 1), len(columns))
