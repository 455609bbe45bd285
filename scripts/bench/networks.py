"""Milliseconds per image and call of the U-Nets, forward and forward + backward, on the CPU.

    python scripts/bench/networks.py [--threads 2] [--batch 64] [--repeat 7] [--only NAME ...] [--compile]

The embedded checkpoints' network (unet_digits: 32 channels, 2x2 patches, levels 1, 2, 2) and its rivals, in contiguous
and channels_last layout and, with --compile, compiled. The minimum over the repeats is printed: other work on the
machine only ever adds time.
"""

import argparse
import time
from collections.abc import Callable

import torch

from steadyflow.networks import UNet

COMMON: dict = {
    "in_channels": 1,
    "image_size": 32,
    "num_classes": 10,
    "attention_resolutions": (8,),
    "scale_shift_norm": True,
}
CANDIDATES: dict[str, dict] = {
    "full w24 (1,2,3)": {"model_channels": 24, "channel_mult": (1, 2, 3), "num_res_blocks": 1},
    "full w32 (1,2,2)": {"model_channels": 32, "channel_mult": (1, 2, 2), "num_res_blocks": 1},
    "patch2 w32 (1,2)": {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "patch_size": 2},
    "patch2 w40 (1,2)": {"model_channels": 40, "channel_mult": (1, 2), "num_res_blocks": 1, "patch_size": 2},
    "patch2 w48 (1,2)": {"model_channels": 48, "channel_mult": (1, 2), "num_res_blocks": 1, "patch_size": 2},
    "patch2 w24 (1,2,4)": {"model_channels": 24, "channel_mult": (1, 2, 4), "num_res_blocks": 1, "patch_size": 2},
    "unet_digits": {"model_channels": 32, "channel_mult": (1, 2, 2), "num_res_blocks": 1, "patch_size": 2},
    "patch2 w32 (1,2,3)": {"model_channels": 32, "channel_mult": (1, 2, 3), "num_res_blocks": 1, "patch_size": 2},
    "patch2 w32 (1,2) x2": {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 2, "patch_size": 2},
}


def fastest(call: Callable[[], object], repeat: int) -> float:
    """Seconds of the fastest of `repeat` calls, after one to warm up."""
    call()
    seconds = []
    for _ in range(repeat):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=[], help="candidates whose name contains one of these")
    parser.add_argument("--compile", action="store_true", help="also measure under torch.compile")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    print(f"{'network':24}{'layout':16}{'parameters':>12}{'forward':>10}{'fwd + bwd':>11}   ms per image")
    for name, options in CANDIDATES.items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        for layout in ("contiguous", "channels_last", *(["compiled"] if arguments.compile else [])):
            torch.manual_seed(0)
            network = UNet(**COMMON, **options)
            x, t = torch.randn(arguments.batch, 1, 32, 32), torch.rand(arguments.batch)
            label = torch.randint(0, 10, (arguments.batch,))
            if layout != "contiguous":
                network, x = network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
            call = torch.compile(network) if layout == "compiled" else network

            def forward(call=call, x=x, t=t, label=label) -> None:
                with torch.inference_mode():
                    call(x, t, label)

            def both(call=call, x=x, t=t, label=label) -> None:
                call(x, t, label).square().mean().backward()

            size = sum(p.numel() for p in network.parameters())
            ms = [1e3 / arguments.batch * fastest(f, arguments.repeat) for f in (forward, both)]
            print(f"{name:24}{layout:16}{size:12,}{ms[0]:10.3f}{ms[1]:11.3f}", flush=True)


if __name__ == "__main__":
    main()
