"""The ADM format and flow_matching's: every weight of theirs has one place in ours, and the indices their times."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steadyflow.checkpoints.formats import adm, adm_classifier, consistency, flow_matching
from steadyflow.checkpoints.nodes import build
from steadyflow.networks import NoisyClassifier, UNet

COMMON: dict[str, Any] = {"image_size": 16, "model_channels": 32, "norm_groups": 32, "time_scale": 1.0}
COMMON |= {"time_endpoint": False, "attention_resolutions": (8,)}
STRUCTURES: dict[str, dict[str, Any]] = {
    "adm": {"channel_mult": (1, 2, 3), "num_res_blocks": 2, "resblock_updown": True, "scale_shift_norm": True}
    | {"learned_sigma": True, "num_classes": 3, "null_label": False, "head_channels": 16},
    "convolutions": {"channel_mult": (1, 1), "num_res_blocks": 1, "num_heads": 4, "attention_resolutions": (16,)},
    "half first": {"channel_mult": (2, 3, 3), "num_res_blocks": 1, "resblock_updown": True, "num_heads": 2},
    "means": {"channel_mult": (2, 2, 2), "num_res_blocks": 3, "conv_resample": False, "scale_shift_norm": True},
    "null": {"channel_mult": (1, 2), "num_res_blocks": 1, "resblock_updown": True, "num_classes": 4},
}


def ours(name: str) -> UNet:
    torch.manual_seed(0)
    network = UNet(**COMMON | STRUCTURES[name]).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network


def theirs(network: UNet | NoisyClassifier, new_order: bool) -> dict[str, Tensor]:
    """The weights in guided-diffusion's names, order and layouts, walked block by block as its constructor does."""
    state: dict[str, Tensor] = {}

    def put(name: str, module: Any, weight: Any = lambda w: w) -> None:
        if isinstance(module, nn.Module) and not isinstance(module, nn.Identity):
            state.update({f"{name}.{k}": weight(v) for k, v in module.state_dict().items()})

    def block(name: str, b: Any) -> None:
        if hasattr(b, "norm1"):
            names = {"in_layers.0": b.norm1, "in_layers.2": b.conv1, "emb_layers.1": b.condition}
            names |= {"out_layers.0": b.norm2, "out_layers.3": b.conv2, "skip_connection": b.skip}
            for key, module in names.items():
                put(f"{name}.{key}", module)
        elif b.conv is not None:
            put(f"{name}.{'conv' if b.up else 'op'}", b.conv)

    def attention(name: str, a: Any) -> None:
        if a is None:
            return

        def by_heads(w: Tensor) -> Tensor:  # (q, k, v) within each head
            w = (
                w
                if new_order
                else torch.stack(w.chunk(3)).unflatten(1, (a.num_heads, -1)).transpose(0, 1).flatten(0, 2)
            )
            return w.unsqueeze(-1) if w.ndim == 2 else w

        put(f"{name}.norm", a.norm)
        put(f"{name}.qkv", a.qkv, by_heads)
        put(f"{name}.proj_out", a.out, lambda w: w.unsqueeze(-1) if w.ndim == 2 else w)

    half = 16  # cosines first
    put(
        "time_embed.0",
        network.conditioning.first,
        lambda w: torch.cat([w[:, half:], w[:, :half]], 1) if w.ndim > 1 else w,
    )
    put("time_embed.2", network.conditioning.second)
    put("label_emb", network.conditioning.table)
    put("input_blocks.0.0", network.stem)
    for n, stage in enumerate(network.down, 1):
        block(f"input_blocks.{n}.0", stage.block)
        attention(f"input_blocks.{n}.1", stage.attention)
    block("middle_block.0", network.middle[0].block)
    attention("middle_block.1", network.middle[0].attention)
    block("middle_block.2", network.middle[1].block)
    put("out.0", network.norm)
    if isinstance(network, NoisyClassifier):
        state["out.2.positional_embedding"] = network.pool.position.detach().T
        put("out.2.qkv_proj", network.pool.qkv, lambda w: w.unsqueeze(-1) if w.ndim == 2 else w)
        put("out.2.c_proj", network.pool.out, lambda w: w.unsqueeze(-1) if w.ndim == 2 else w)
        return state
    n, m = -1, 0
    for stage, joins in zip(network.up, network.joins, strict=True):
        n, m = (n + 1, 0) if joins else (n, m)
        block(f"output_blocks.{n}.{m}", stage.block)
        attention(f"output_blocks.{n}.1", stage.attention)
        m = 2 if stage.attention is not None else 1
    put("out.2", network.head)
    return state


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("name", ["adm", "convolutions", "half first"])
def test_structure_and_weights_come_back(name: str, new_order: bool, tmp_path: Path) -> None:
    network = ours(name)
    torch.save(theirs(network, new_order), tmp_path / "model.pt")
    heads = {k: STRUCTURES[name][k] for k in ("num_heads", "head_channels") if k in STRUCTURES[name]}
    converted = adm.read(tmp_path / "model.pt", 16, new_attention_order=new_order, **heads)
    again = build(converted.nodes["network"], "test")
    again.load_state_dict(converted.state)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in network.state_dict().items())
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0])
    label = torch.tensor([0, 2]) if converted.num_classes else None
    assert torch.equal(again.eval()(x, t, label), network(x, t, label))
    assert converted.num_classes == STRUCTURES[name].get("num_classes", 0)
    if converted.num_classes:
        with pytest.raises(ValueError, match=r"no unconditional model: give each sample a class, 0\.\.2"):
            again(x, t)
        with pytest.raises(ValueError, match=r"label 3 is out of range: .* and there is no null label"):
            again(x, t, label + 1)


def test_a_classifier_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = NoisyClassifier(3, 32, (1, 2), 2, (8,), 16, num_classes=5, head_channels=16)
    torch.save(theirs(network, False), tmp_path / "classifier.pt")
    converted = adm_classifier.read(tmp_path / "classifier.pt", 16, head_channels=16)
    again = build(converted.nodes["network"], "test")
    again.load_state_dict(converted.state)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in network.state_dict().items())
    torch.save(theirs(ours("convolutions"), False), tmp_path / "classifier.pt")
    with pytest.raises(ValueError, match=r"no classifier of guided-diffusion: it has no out\.2\.positional_embedding"):
        adm_classifier.read(tmp_path / "classifier.pt", 16)


def averaged(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield "num_updates", torch.tensor(5)
    yield from ((f"model.{k}", torch.zeros_like(v)) for k, v in state.items())
    yield from ((f"shadow_params.{i}", v) for i, v in enumerate(state.values()))


@pytest.mark.parametrize("name", ["means", "null"])
def test_flow_matching_time_and_velocity_run_to_the_noise(name: str, tmp_path: Path) -> None:
    network = ours(name)
    state = theirs(network, True)
    torch.save({"model": dict(averaged(state)) if name == "means" else state, "epoch": 1}, tmp_path / "checkpoint.pth")
    converted = flow_matching.read(tmp_path / "checkpoint.pth", 16)
    again, path = build(converted.nodes["network"], "test"), build(converted.nodes["path"], "test")
    again.load_state_dict(converted.state)
    denoiser = build(converted.nodes["denoiser"], "test", network=again.eval(), path=path)
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.25, 0.75], dtype=torch.float64)
    label = {"label": torch.tensor([1, 4])} if name == "null" else {}
    with torch.no_grad():
        velocity = network(x, (1 - t).float(), **label)  # of theirs, x_0 - eps: x_0 = x + t velocity
        torch.testing.assert_close(denoiser(x, 1 - t, t, **label), x + t.float()[:, None, None, None] * velocity)


def test_a_consistency_model_is_the_identity_at_its_least_noise_and_its_teacher_is_edm(tmp_path: Path) -> None:
    network = ours("adm")
    network.load_state_dict(network.state_dict() | {"head.weight": network.head.weight[:3].repeat(2, 1, 1, 1)})
    state = theirs(network, True)
    for key in ("out.2.weight", "out.2.bias"):
        state[key] = state[key][:3]
    torch.save(state, tmp_path / "model.pt")
    x, label = torch.randn(2, 3, 16, 16), torch.tensor([2, 0])
    rho, alpha = torch.tensor([0.002, 3.0], dtype=torch.float64), torch.tensor([1.0, 1.0], dtype=torch.float64)
    made = {}
    for distilled in (True, False):
        converted = consistency.read(tmp_path / "model.pt", 16, head_channels=16, distilled=distilled)
        again, path = (build(converted.nodes[part], "test") for part in ("network", "path"))
        again.load_state_dict(converted.state)
        denoiser = build(converted.nodes["denoiser"], "test", network=again.eval(), path=path)
        with torch.no_grad():
            made[distilled] = denoiser(x, alpha, rho, label=label)
            output = again(x / torch.sqrt(rho**2 + 0.25).float()[:, None, None, None], rho.log().float() / 4, label)
    assert torch.equal(made[True][0], x[0])
    skip, out = 0.25 / (2.998**2 + 0.25), 2.998 * 0.5 / math.sqrt(9.25)
    torch.testing.assert_close(made[True][1], skip * x[1] + out * output[1])
    skip, out = 0.25 / 9.25, 3 * 0.5 / math.sqrt(9.25)
    torch.testing.assert_close(made[False][1], skip * x[1] + out * output[1])
    assert again.conditioning.features.scale == 1000


def test_indices_are_the_networks_times_and_its_schedules_the_originals(tmp_path: Path) -> None:
    torch.save(theirs(ours("convolutions"), False), tmp_path / "model.pt")
    index = torch.tensor([0, 1, 500, 998, 999])
    cosine = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    betas = {
        "linear": torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64),
        "cosine": torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(cosine)], dtype=torch.float64),
    }
    for schedule, beta in betas.items():
        converted = adm.read(tmp_path / "model.pt", 16, num_heads=4, schedule=schedule)
        path = build(converted.nodes["path"], "test")
        denoiser = build(converted.nodes["denoiser"], "test", network=nn.Identity(), path=path)
        alpha_bar = torch.cumprod(1 - beta, 0)[index]
        ratio = torch.sqrt((1 - alpha_bar) / alpha_bar)
        keep = slice(None, -1 if schedule == "cosine" else None)  # the last beta is clipped there
        _, time = denoiser.inputs(ratio, path.time_at(ratio))
        torch.testing.assert_close(time[keep], index.double()[keep], rtol=0, atol=1e-9)
        torch.testing.assert_close(path(path.time_at(ratio))[0][keep] ** 2, alpha_bar[keep], rtol=1e-10, atol=0)
        assert denoiser.inputs(ratio, torch.tensor(1e-4))[1] == 0  # before the first index: the first


def test_imagenet_256_has_its_554_million_parameters() -> None:
    # Dhariwal & Nichol 2021, Table 4: 554M; and of the unconditional one, without 1000 rows of 1024, 552,814,086.
    options = {"model_channels": 256, "channel_mult": (1, 1, 2, 2, 4, 4), "image_size": 256, "head_channels": 64}
    options |= {"attention_resolutions": (32, 16, 8), "scale_shift_norm": True, "resblock_updown": True}
    with torch.device("meta"):
        network = UNet(**options, learned_sigma=True)
    assert sum(p.numel() for p in network.parameters()) == 552_814_086


def test_another_network_is_refused_in_one_line(tmp_path: Path) -> None:
    state = theirs(ours("convolutions"), False)
    torch.save({k.replace("time_embed", "time_embedding"): v for k, v in state.items()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"no weight time_embed.0.weight; did you mean time_embedding.0.weight\?"):
        adm.read(tmp_path / "model.pt", 16)
    torch.save({k: v for k, v in state.items() if not k.startswith("output_blocks.3.")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="4 blocks down and 3 up make no 2 levels"):
        adm.read(tmp_path / "model.pt", 16)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="schedule is linear or cosine, got sigmoid"):
        adm.read(tmp_path / "model.pt", 16, schedule="sigmoid")
