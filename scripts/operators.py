"""What every operator makes of photographs: the measurement and its pseudo-inverse, one row an operator, as one PNG.

    python scripts/operators.py IMAGE ... [--size 256] [--sigma-y 0] [--only NAME ...] [--out outputs/operators.png]

The operators are those of configs/task, but where one reads a file of the user's, and a few that no task has. Of each
image the middle size x size pixels are taken. Measurements that are no picture (Walsh-Hadamard, Fourier) are shown as
the logarithm of their size.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from steadyflow import linear
from steadyflow.linear import Fourier, NonlinearOperator, Operator, WalshHadamard

ROOT = Path(__file__).parents[1]
Measurement = Operator | NonlinearOperator
Maker = Callable[[tuple[int, int, int]], Measurement]
MORE: dict[str, Maker] = {
    "blur, zero boundary": partial(linear.Blur, boundary="zero"),
    "turned Gaussian": partial(linear.Convolution, kernel=linear.gaussian_kernel(31, (6.0, 1.0), 30.0)),
    "out of focus, reflect": partial(linear.Convolution, kernel=linear.disk_kernel(15, 6.0), boundary="reflect"),
    "grey, blur, average": partial(
        linear.Composition,
        parts=[linear.Colorization, partial(linear.Blur, std=1.5), partial(linear.SuperResolution, factor=4)],
    ),
    "two motions": partial(
        linear.Stack,
        parts=[partial(linear.Convolution, kernel=linear.motion_kernel(31, 20.0, angle)) for angle in (30.0, 120.0)],
    ),
}


def makers() -> dict[str, Maker]:
    files = sorted((ROOT / "configs" / "task").glob("*.yaml"))
    configs = {file.stem: OmegaConf.load(file) for file in files}
    tasks = {k: partial(instantiate, c.operator) for k, c in configs.items() if not OmegaConf.is_missing(c, "file")}
    return {name: lambda shape, make=make: make(shape=shape) for name, make in (tasks | MORE).items()}


def photograph(file: str, size: int) -> Tensor:
    """The middle of an image, (3, size, size) in [-1, 1]."""
    with Image.open(file) as image:
        pixels = torch.from_numpy(np.asarray(image.convert("RGB"), np.float32)).permute(2, 0, 1) / 127.5 - 1
    top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
    if min(top, left) < 0:
        raise SystemExit(f"{file} is smaller than {size} x {size}: choose a smaller --size")
    return pixels[:, top : top + size, left : left + size]


def shown(operator: Measurement, y: Tensor) -> Tensor:
    """A measurement (C, H, W) as a picture (H, W, 1 or 3) in [0, 1]."""
    if isinstance(operator, WalshHadamard | Fourier):
        if isinstance(operator, WalshHadamard):
            c, h, w = operator.shape
            y = y.new_zeros(c, h * w).index_copy(-1, operator.rows, y[:, 0]).reshape(c, h, w)
        else:
            y = torch.fft.fftshift(y, dim=-2)
        size = y.abs().mean(0, keepdim=True)
        return ((size + 1e-3).log() / np.log(1e3) + 1).div(1.7).clamp(0, 1).permute(1, 2, 0)
    return picture(y[: operator.shape[0]])  # of a stack, the first


def picture(x: Tensor) -> Tensor:
    """An image (C, H, W) in [-1, 1] as (H, W, C) in [0, 1]."""
    return ((x.clamp(-1, 1) + 1) / 2).permute(1, 2, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--sigma-y", type=float, default=0.0, help="noise of the measurements, images in [-1, 1]")
    parser.add_argument("--only", nargs="*", default=[], help="operators whose name contains one of these")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "operators.png")
    arguments = parser.parse_args()
    x = torch.stack([photograph(file, arguments.size) for file in arguments.images])

    chosen = {n: m for n, m in makers().items() if not arguments.only or any(part in n for part in arguments.only)}
    rows: dict[str, list[Tensor]] = {}
    for name, make in chosen.items():
        operator = make(tuple(x.shape[1:]))
        noise = torch.randn(len(x), *operator.measured_shape, generator=torch.Generator().manual_seed(0))
        y = operator(x) + arguments.sigma_y * noise
        back = operator.pinv(y)
        psnr = -10 * ((back.clamp(-1, 1) - x).square().mean((1, 2, 3)) / 4).log10()
        error = float((operator(back) - y).norm() / y.norm())
        label = f"{name}\n{psnr.mean():.1f} dB\n|A A$^+$y - y| / |y| = {error:.0e}"
        rows[label] = [p for i in range(len(x)) for p in (shown(operator, y[i]), picture(back[i]))]
        print(label.replace("\n", "   "), flush=True)

    columns = 2 * len(x) + 1
    figure = Figure(figsize=(2 * columns, 2 * (len(rows) + 1)), dpi=100)
    axes = figure.subplots(len(rows) + 1, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    axes[0, 0].text(1, 0.5, "image\nright of it: y, A$^+$y", ha="right", va="center", fontsize=9)
    for i, image in enumerate(x):
        axes[0, 1 + 2 * i].imshow(picture(image))
    for row, (label, pictures) in zip(axes[1:], rows.items(), strict=True):
        row[0].text(1, 0.5, label, ha="right", va="center", fontsize=9)
        for axis, pixels in zip(row[1:], pictures, strict=True):
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.02, hspace=0.02)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, format="png")
    print(arguments.out)


if __name__ == "__main__":
    main()
