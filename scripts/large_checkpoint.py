"""Host memory of the largest public network: ADM of ImageNet 256 (552.8M parameters) from a file of random weights.

    python scripts/large_checkpoint.py [FOLDER]      each stage in a process of its own; minutes, and 5 GB of disk

    write      the file, as guided-diffusion saves it
    read       the file by format=adm; every weight is then touched, so that all pages count
    convert    the file to our form, as `steadyflow prepare` does
    load       our form, every weight touched
    restore    one step of PiGDM at 256 x 256, its gradient through the network with checkpoint_activations

Memory is the peak of what is resident beyond what Python and torch take, mapped pages of files included.
"""

import argparse
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

from steadyflow.checkpoints import Checkpoint, Running, load
from steadyflow.checkpoints.files import save_converted
from steadyflow.checkpoints.formats import convert
from steadyflow.grids import Uniform
from steadyflow.guidance import PiGDM
from steadyflow.linear import SuperResolution
from steadyflow.networks import UNet
from steadyflow.noise import NoiseSource
from steadyflow.restorers import GuidedSampler
from steadyflow.restorers.restorer import Measurement
from steadyflow.samplers import Euler

ADM = dict(image_size=256, model_channels=256, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2)  # noqa: C408
ADM |= dict(attention_resolutions=(32, 16, 8), head_channels=64, learned_sigma=True, scale_shift_norm=True)  # noqa: C408
ADM |= dict(resblock_updown=True, time_endpoint=False, time_scale=1.0, norm_groups=32)  # noqa: C408
ARGUMENTS = {"image_size": 256, "head_channels": 64}


def write(folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "checkpoints"))
    from test_format_adm import theirs

    network = UNet(**ADM)  # type: ignore[arg-type]
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.02)
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f}M parameters")
    torch.save(theirs(network, False), folder / "adm256.pt")


def touch(checkpoint: Checkpoint) -> None:
    for p in checkpoint.denoiser.parameters():
        p.detach().abs().max()


def read(folder: Path) -> None:
    touch(load(folder / "adm256.pt", format="adm", arguments=ARGUMENTS))


def convert_it(folder: Path) -> None:
    save_converted(folder / "adm256", convert(folder / "adm256.pt", "adm", ARGUMENTS))


def load_it(folder: Path) -> None:
    touch(load(folder / "adm256"))


def restore(folder: Path) -> None:
    checkpoint = load(folder / "adm256", running=Running(checkpoint_activations=True))
    denoiser = checkpoint.denoiser.requires_grad_(False)
    operator = SuperResolution(checkpoint.shape, 4)
    truth = torch.linspace(-1, 1, 3 * 256 * 256).reshape(1, 3, 256, 256)
    measurement = Measurement(operator(truth), operator, 0.05)
    sampler = GuidedSampler(Euler(checkpoint.path, Uniform(), steps=1), partial(PiGDM, weight=1.0), init="pinv")
    x = sampler(denoiser, measurement, NoiseSource(0, [0], checkpoint.shape))
    assert x.isfinite().all()


STAGES = {"write": write, "read": read, "convert": convert_it, "load": load_it, "restore": restore}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("outputs/large_checkpoint"))
    parser.add_argument("--stage", choices=STAGES, help="this one alone, in this process")
    arguments = parser.parse_args()
    if arguments.stage:
        before, start = resident(), time.process_time()
        STAGES[arguments.stage](arguments.folder)
        peak, size = resident() - before, (arguments.folder / "adm256.pt").stat().st_size
        seconds = time.process_time() - start
        print(f"{arguments.stage:8} {peak / 1e9:6.2f} GB  {peak / size:5.2f} of the file  {seconds:6.1f} s CPU")
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        if stage == "write" and (arguments.folder / "adm256.pt").exists():
            continue
        subprocess.run([sys.executable, __file__, str(arguments.folder), "--stage", stage], check=True)


def resident() -> int:
    """The largest resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
