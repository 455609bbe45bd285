"""diffusers' folders: our U-Net gives what UNet2DModel gives; what ours cannot be runs as diffusers' own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from steadyflow.checkpoints import Running, load
from steadyflow.checkpoints.formats import diffusers
from steadyflow.checkpoints.nodes import build

library = pytest.importorskip("diffusers")

SMALL: dict[str, Any] = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1}
SMALL |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
GOOGLE = {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "google/ddpm-*": ("UNet", {**SMALL, **GOOGLE, "attention_head_dim": None}),
    "defaults": ("UNet", SMALL),
    "classes": (
        "UNet",
        {**SMALL, "num_class_embeds": 5, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32}
        | {"out_channels": 6},
    ),
    "middle without norm": ("DiffusersUNet", {**SMALL, "resnet_time_scale_shift": "scale_shift"}),
    "foreign": (
        "DiffusersUNet",
        {**SMALL, "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D")}
        | {"up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D"), "num_class_embeds": 5},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_equal_the_librarys(name: str, tmp_path: Path) -> None:
    kind, config = MODELS[name]
    torch.manual_seed(0)
    theirs = library.UNet2DModel(**config).eval()
    theirs.save_pretrained(tmp_path / "unet")
    library.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction").save_pretrained(
        tmp_path / "scheduler"
    )
    converted = diffusers.read(tmp_path)
    network = build(converted.nodes["network"], "test")
    network.load_state_dict(converted.state)
    assert type(network).__name__ == kind
    assert network.null_label == (converted.num_classes == 0)
    assert {k: v["_target_"].rpartition(".")[2] for k, v in converted.nodes.items() if k != "network"} == {
        "path": "Cosine",
        "denoiser": "VDenoiser",
    }
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0, 731])
    label = torch.tensor([4, 1]) if converted.num_classes else None
    with torch.no_grad():
        expected = theirs(x, t, class_labels=label).sample
        found = network.eval()(x, t.float(), label)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_table_of_times_takes_the_nearest_and_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = {**SMALL, "time_embedding_type": "learned", "num_train_timesteps": 10}
    library.UNet2DModel(**config).save_pretrained(tmp_path)
    library.DDPMScheduler(num_train_timesteps=10).save_pretrained(tmp_path)
    checkpoint = load(tmp_path, format="diffusers", running=Running(checkpoint_activations=True))
    network = checkpoint.denoiser.network
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    whole, between = torch.tensor([3.0, 7.0]), torch.tensor([3.0, 6.7])
    expected = network(x, whole + 1e-5)
    assert not caplog.records
    assert torch.equal(network(x, between), expected)
    network(x, between)
    assert [record.getMessage() for record in caplog.records] == [
        "this network's time embedding is a table: times between its indices are rounded to the nearest"
    ]
    (slope,) = torch.autograd.grad(expected.square().sum(), x)
    network.checkpoint_activations = False
    assert torch.allclose(slope, torch.autograd.grad(network(x, whole).square().sum(), x)[0], rtol=1e-4, atol=1e-6)


def test_what_is_missing_or_unknown_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json: diffusers' weights are read beside their config"):
        diffusers.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(FileNotFoundError, match=r"no weights in .*diffusion_pytorch_model\.safetensors"):
        diffusers.read(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="is of UNet2DConditionModel; this format reads UNet2DModel"):
        diffusers.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"sample_size": 16}))
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"beta_schedule": "sigmoid"}))
    with pytest.raises(ValueError, match="found sigmoid, and epsilon"):
        diffusers.read(tmp_path)
    library.DDPMScheduler(rescale_betas_zero_snr=True).save_config(tmp_path)
    with pytest.raises(ValueError, match="found linear with rescale_betas_zero_snr, and epsilon"):
        diffusers.read(tmp_path)
    library.ScoreSdeVeScheduler().save_config(tmp_path)
    with pytest.raises(ValueError, match="is of ScoreSdeVeScheduler, which without a beta_schedule is no chain"):
        diffusers.read(tmp_path)
