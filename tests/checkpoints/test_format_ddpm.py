"""The DDPM format against diffusers' UNet2DModel, an implementation of that network independent of ours."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from steadyflow.checkpoints.formats import ddpm
from steadyflow.checkpoints.nodes import build

LAYERS = [  # diffusers -> pytorch_diffusion
    (r"time_embedding\.linear_([12])", lambda m: f"temb.dense.{int(m[1]) - 1}"),
    (r"conv_norm_out", "norm_out"),
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.attentions\.(\d+)", r"down.\1.attn.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{2 - int(m[1])}.block.{m[2]}"),
    (r"up_blocks\.(\d+)\.attentions\.(\d+)", lambda m: f"up.{2 - int(m[1])}.attn.{m[2]}"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{2 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"time_emb_proj", "temb_proj"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"group_norm", "norm"),
    (r"to_([qkv])", r"\1"),
    (r"to_out\.0", "proj_out"),
]


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
    ).eval()


def original(network: nn.Module) -> dict[str, Tensor]:
    """Its weights as pytorch_diffusion names and shapes them."""
    state = {}
    for key, value in network.state_dict().items():
        for pattern, name in LAYERS:
            key = re.sub(pattern, name, key)
        is_matrix = value.ndim == 2 and ".attn" in key
        state[key] = value[:, :, None, None] if is_matrix else value
    return state


def loaded(file: Path, **arguments: object) -> nn.Module:
    converted = ddpm.read(file, 16, **arguments)
    network = build(converted.nodes["network"], "test")
    network.load_state_dict(converted.state)  # strict: every weight has its place
    return network.eval()


def test_it_is_the_network_of_diffusers_and_its_index_the_time(theirs: nn.Module, tmp_path: Path) -> None:
    torch.save({f"module.{k}": v for k, v in original(theirs).items()}, tmp_path / "model.ckpt")
    converted = ddpm.read(tmp_path / "model.ckpt", 16)
    network = loaded(tmp_path / "model.ckpt").double()
    path = build(converted.nodes["path"], "test")
    denoiser = build(converted.nodes["denoiser"], "test", network=network, path=path)
    x, index = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 500, 999])
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[index]
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    with torch.no_grad():
        eps = theirs.float()(x.float(), index).sample.double()
        found = (x - alpha[:, None, None, None] * denoiser(x, alpha, sigma)) / sigma[:, None, None, None]
    scale = eps.abs().max().item()
    torch.testing.assert_close(found, eps, rtol=0, atol=1e-5 * scale)  # theirs is in single precision


def test_of_a_training_state_the_averages_are_taken(theirs: nn.Module, tmp_path: Path) -> None:
    averages = original(theirs)
    state = {f"module.{k}": torch.zeros_like(v) for k, v in averages.items()}
    torch.save([state, {"step": 1}, 3, 4, averages], tmp_path / "ckpt.pth")
    head = loaded(tmp_path / "ckpt.pth").head.weight
    assert torch.equal(head, averages["conv_out.weight"])
    assert not loaded(tmp_path / "ckpt.pth", ema=False).head.weight.any()
    torch.save([state, {"step": 1}, 3, 4], tmp_path / "ckpt.pth")
    with pytest.raises(ValueError, match="without EMA weights: load it with ema=false"):
        ddpm.read(tmp_path / "ckpt.pth", 16)
    torch.save({"conv_input.weight": torch.zeros(1)}, tmp_path / "ckpt.pth")
    with pytest.raises(ValueError, match=r"no DDPM U-Net: it has no weight temb.dense.0.weight"):
        ddpm.read(tmp_path / "ckpt.pth", 16)
