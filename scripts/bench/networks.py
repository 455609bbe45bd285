"""Milliseconds per image and call of the U-Nets, forward and forward + backward.

    python scripts/bench/networks.py [--threads 2] [--batch 64] [--repeat 7] [--only NAME ...] [--compile]

The embedded checkpoints' network (unet_digits: 32 channels, 2x2 patches, levels 1, 2, 2) and its rivals, in contiguous
and channels_last layout and, with --compile, compiled. The minimum over the repeats is printed: other work on the
machine only ever adds time.

Then (alone with --only diffusers) the 35.7M network of DDPM on CIFAR-10 beside diffusers' UNet2DModel with the same
weights, eight images a call, in turns: on the CPU in CPU time; where there is a CUDA device also there, in float32 and
in bfloat16 with channels_last.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from steadyflow.checkpoints.formats import diffusers as format_diffusers
from steadyflow.checkpoints.nodes import build
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


def pair() -> tuple[nn.Module, nn.Module]:
    """Our network and diffusers' with the same weights, both called as network(x, t)."""
    from diffusers import UNet2DModel

    options = {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "dropout": 0.1}
    torch.manual_seed(0)
    theirs = UNet2DModel(  # google/ddpm-cifar10-32
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        **options,
    )
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        converted = format_diffusers.read(Path(folder))
        ours = build(converted.nodes["network"], "bench")
        ours.load_state_dict(converted.state)
    return ours.eval(), theirs.eval()


def beside_diffusers(batch: int, repeat: int, compiled: bool) -> None:
    """The table of ours and theirs: medians of `repeat` rounds in turns, in each the faster of two calls.

    Eager networks are copied anew for each round: where their weights happen to lie in memory moves a call by 3%.
    """
    settings = [("cpu", torch.float32, False), ("cpu", torch.float32, True)]
    if torch.cuda.is_available():
        settings += [("cuda", torch.float32, False), ("cuda", torch.bfloat16, True)]
    print(f"{'beside diffusers':36}{'ours':>10}{'diffusers':>11}{'ratio':>8}{'|ours - theirs|':>17}   ms per call")
    for device, dtype, last in settings:
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.randn(batch, 3, 32, 32, device=device, dtype=dtype).to(memory_format=layout)
        t = torch.randint(0, 1000, (batch,), device=device)
        pairs = [net.to(device, dtype).to(memory_format=layout) for net in pair()]

        def call(network: nn.Module, x: torch.Tensor = x, t: torch.Tensor = t) -> torch.Tensor:
            return network(x, t.float()) if isinstance(network, UNet) else network(x, t, return_dict=False)[0]

        for mode in ("eager", *(["compiled"] if compiled else [])):
            if mode == "compiled":
                for network in pairs:
                    network.compile()
            spent: list[list[float]] = [[], []]
            with torch.inference_mode():
                ours, theirs = (call(network) for network in pairs)
                for i in range(repeat):
                    for k in (0, 1) if i % 2 else (1, 0):
                        network = pairs[k] if mode == "compiled" else copy.deepcopy(pairs[k])
                        spent[k].append(min(seconds(partial(call, network), device) for _ in range(2)))
            a, b = (statistics.median(s) for s in spent)
            name = f"{device} {str(dtype).removeprefix('torch.')} {'channels_last ' if last else ''}{mode}"
            apart = (ours - theirs).abs().max().item()
            print(f"{name:36}{1e3 * a:10.2f}{1e3 * b:11.2f}{b / a:8.3f}{apart:17.1e}", flush=True)


def seconds(call: Callable[[], object], device: str) -> float:
    """CPU time of a call, or the time of ten on a CUDA device, divided."""
    if device == "cpu":
        begin = time.process_time()
        call()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--only", nargs="*", default=[], help="candidates whose name contains one of these")
    parser.add_argument("--compile", action="store_true", help="also measure under torch.compile")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    if arguments.only == ["diffusers"]:
        beside_diffusers(8, arguments.repeat, arguments.compile)
        return
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
    if not arguments.only:
        beside_diffusers(8, arguments.repeat, arguments.compile)


if __name__ == "__main__":
    main()
