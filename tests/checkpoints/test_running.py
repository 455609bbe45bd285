"""How a network runs changes its rounding, its memory and its speed, and not what it computes."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import steadyflow.networks
from steadyflow.checkpoints import Running, embedded, load, save
from steadyflow.checkpoints.files import assembled
from steadyflow.checkpoints.nodes import build
from steadyflow.denoisers import EpsDenoiser
from steadyflow.networks import MLP, UNet
from steadyflow.paths import VariancePreserving

UNET: dict[str, Any] = {"in_channels": 1, "model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1}
UNET |= {"attention_resolutions": [4], "image_size": 8, "num_classes": 3}
NODES = {
    "network": {"_target_": "steadyflow.networks.UNet"} | UNET,
    "path": {"_target_": "steadyflow.paths.VariancePreserving"},
    "denoiser": {"_target_": "steadyflow.denoisers.EpsDenoiser"},
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = UNet(**UNET)
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    folder = tmp_path_factory.mktemp("checkpoint")
    save(folder, EpsDenoiser(network, VariancePreserving()), NODES, (1, 8, 8), 3, {}, dtype=torch.float16)
    return folder


def outputs(file: Path, **running: Any) -> tuple[Tensor, Tensor]:
    """x_0 and a gradient through the denoiser."""
    torch.manual_seed(1)
    model = load(file, running=Running(**running)).denoiser.requires_grad_(False)
    x = torch.randn(5, 1, 8, 8, requires_grad=True)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    x0 = model(x, *model.path(t), label=torch.arange(5) % 4)
    x0.square().sum().backward()
    assert x0.dtype == torch.float32
    assert x.grad is not None
    return x0.detach(), x.grad


@pytest.mark.parametrize(("precision", "within"), [("fp64", 1e-5), ("fp16", 2e-2), ("bf16", 1e-1)])
def test_a_half_precision_file_runs_in_any_precision(precision: str, within: float, file: Path) -> None:
    expected, gradient = outputs(file)
    found, slope = outputs(file, precision=precision)
    assert 0 < (found - expected).abs().max() < within * expected.abs().max()
    assert (slope - gradient).abs().max() < 3 * within * gradient.abs().max()
    assert torch.equal(outputs(file, precision="fp32")[0], expected)


@pytest.mark.parametrize("running", [{"max_batch": 2}, {"checkpoint_activations": True}, {"channels_last": True}])
def test_memory_and_layout_change_nothing(running: dict[str, Any], file: Path) -> None:
    for found, expected in zip(outputs(file, **running), outputs(file), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_max_batch_is_what_the_network_sees(file: Path) -> None:
    rows: list[int] = []
    model = load(file, running=Running(max_batch=2)).denoiser
    model.network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    half = torch.tensor(0.5, dtype=torch.float64)
    model(torch.randn(5, 1, 8, 8), half, half)
    model(torch.randn(0, 1, 8, 8), half, half)
    assert rows == [2, 2, 1, 0]


@pytest.mark.parametrize("holds", [0, 2])
def test_an_automatic_batch_is_halved_until_it_fits_and_remembered(holds: int, file: Path) -> None:
    rows: list[int] = []

    def full(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows.append(len(args[0]))
        if rows[-1] > holds:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model, half = load(file, running=Running(max_batch="auto")).denoiser, torch.tensor(0.5, dtype=torch.float64)
    x = torch.randn(5, 1, 8, 8)
    expected = model(x, half, half)
    model.network.register_forward_pre_hook(full)
    if holds:
        assert torch.allclose(model(x, half, half), expected, atol=1e-4)
        assert torch.allclose(model(x[:1], half, half), expected[:1], atol=1e-4)
        assert torch.allclose(model(x, half, half), expected, atol=1e-4)
        assert rows == [5, 3, 2, 2, 1, 1, 2, 2, 1]
    else:
        with pytest.raises(torch.OutOfMemoryError):
            model(x, half, half)
        assert rows == [5, 3, 2, 1]


def test_compile_is_asked_for_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda network: compiled.append(network))
    model = load(file, running=Running(compile=True)).denoiser
    assert compiled == [model.network]


def test_what_cannot_be_is_refused() -> None:
    batch = "max_batch must be at least 1, auto or null"
    known = {
        "precision": "precision must be fp32, bf16",
        "max_batch": batch,
        "compile": "compile must be true or false",
    }
    wrong = [("precision", "fp8"), ("precision", ["fp16"]), ("compile", "maybe")]
    for key, value in (*wrong, ("max_batch", 0), ("max_batch", "all"), ("max_batch", True)):
        with pytest.raises(ValueError, match=known[key]):
            Running(**{key: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no way to run a network: 'cuda'; choose checkpoint/running="):
        embedded("digits32", running="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="MLP cannot recompute activations"):
        Running(checkpoint_activations=True)(MLP(2, 8))


@pytest.mark.parametrize(
    "options",
    [
        {"_target_": "steadyflow.networks.NCSNpp", "model_channels": 8, "fourier": True, "attention_resolutions": []},
        {"_target_": "steadyflow.networks.EDM2UNet", "model_channels": 64, "attention_resolutions": []},
    ],
)
def test_half_precision_is_of_weights_and_never_of_frequencies(options: dict[str, Any], tmp_path: Path) -> None:
    options |= {"channel_mult": [1], "num_res_blocks": 1, "image_size": 8}
    torch.manual_seed(0)
    network = build(options, "test")
    denoiser = EpsDenoiser(network, VariancePreserving())
    save(tmp_path, denoiser, NODES | {"network": options}, (3, 8, 8), 0, {}, dtype=torch.float16)
    found = load(tmp_path, running=Running(precision="fp32")).denoiser.network.state_dict()
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    assert buffers
    assert all(torch.equal(found[name], value) for name, value in buffers.items())
    assert all(torch.equal(found[name], p.half().float()) for name, p in network.named_parameters())
    network.half()
    assert all(torch.equal(network.get_buffer(name), value) for name, value in buffers.items())


def test_a_network_takes_the_weights_of_its_file_themselves(file: Path) -> None:
    """No copy: a float32 parameter is the tensor it was given; a tensor outside the state dict is made all the same."""

    class Odd(UNet):
        def __init__(self, **options: Any):
            super().__init__(**options)
            self.register_buffer("ramp", torch.arange(3.0), persistent=False)

    Odd.__module__, Odd.__signature__ = "steadyflow.networks", inspect.signature(UNet)  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steadyflow.networks, "Odd", Odd, raising=False)
        state = load(file).denoiser.network.state_dict()
        for target in ("UNet", "Odd"):
            nodes = NODES | {"network": {"_target_": f"steadyflow.networks.{target}"} | UNET}
            network = assembled(nodes, state, "test").network
            assert network.get_parameter("stem.weight").data_ptr() == state["stem.weight"].data_ptr()
        assert torch.equal(network.ramp, torch.arange(3.0))


def test_no_code_is_ever_fetched_with_a_checkpoint() -> None:
    package = Path(steadyflow.__file__).parent
    texts = {file: file.read_text() for file in package.rglob("*.py")}
    assert not [file for file, text in texts.items() if "trust_remote_code" in text]
    loading = "".join(text for file, text in texts.items() if "checkpoints" in file.parts)
    assert not re.search(r"torch\.load\((?![^)]*weights_only=True)", loading)
    assert not re.search(r"pickle\.loads?\(|(?<!\.)\b(exec|eval)\(", loading)
