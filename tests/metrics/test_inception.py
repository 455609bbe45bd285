"""Inception: resizing and network against clean-fid's own, and what is said where the weights are absent."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid import inception_pytorch, resize
from torch import Tensor, nn

from steadyflow.metrics import Inception
from steadyflow.metrics.inception import PYTORCH, TORCHSCRIPT, fid_inception, resized

SHAPES = [(3, 32, 32), (3, 500, 300), (3, 299, 299), (3, 64, 401)]


def images(shape: tuple[int, ...], n: int = 1) -> Tensor:
    return torch.randint(256, (n, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mode", ["clean", "legacy_pytorch"])
def test_resizing_equals_clean_fid(mode: str, shape: tuple[int, ...]) -> None:
    x = images(shape)
    theirs = resize.build_resizer(mode)(x[0].permute(1, 2, 0).numpy())
    ours = resized(x, mode)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - theirs).max() < 1e-4  # of 255
    assert ours.min() >= 0
    assert ours.max() <= 255


def test_grey_images_are_repeated() -> None:
    x = images((1, 40, 40))
    for mode in ("clean", "legacy_pytorch"):
        assert torch.allclose(resized(x, mode), resized(x.expand(-1, 3, -1, -1), mode), atol=1e-4)


class StandIn(nn.Module):
    """The interface of the TorchScript file, with a small network in place of the large."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, 2048), nn.Tanh())
        self.output = nn.Linear(2048, 1008)

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        theta = torch.eye(2, 3)
        theta[0, 2] += theta[0, 0] / img.shape[3] - theta[0, 0] / 299
        theta[1, 2] += theta[1, 1] / img.shape[2] - theta[1, 1] / 299
        grid = nn.functional.affine_grid(
            theta[None].repeat(len(img), 1, 1), [len(img), 3, 299, 299], align_corners=False
        )
        x = nn.functional.grid_sample(img, grid, mode="bilinear", padding_mode="border", align_corners=False)
        features = self.layers((x - 128) / 128)
        return features if return_features else self.output(features).softmax(1)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, StandIn]:
    path = tmp_path_factory.mktemp("inception") / TORCHSCRIPT[0]
    torch.manual_seed(0)
    net = StandIn().eval()
    torch.jit.save(torch.jit.script(net), str(path))
    return path, hashlib.sha256(path.read_bytes()).hexdigest(), net


pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
def test_modes_of_the_torchscript_network(stand_in: tuple[Path, str, StandIn]) -> None:
    path, sha256, net = stand_in
    x = images((3, 20, 31), 3)
    clean = Inception("clean", path, sha256)
    assert clean.sha256 == sha256
    features, probabilities = clean(x)
    theirs = np.stack([resize.build_resizer("clean")(i.permute(1, 2, 0).numpy()) for i in x])
    expected = net.layers((torch.from_numpy(theirs).permute(0, 3, 1, 2) - 128) / 128)
    assert torch.allclose(features, expected, atol=1e-5)
    unbiased = (expected @ net.output.weight.T).softmax(1)
    assert torch.allclose(probabilities, unbiased, atol=1e-6)

    inside = Inception("legacy_tf", path, sha256)(x)[0]
    assert torch.allclose(inside, net(x.float(), return_features=True), atol=1e-6)
    assert (inside - features).abs().max() > 1e-3  # the modes are not the same


@pytest.mark.filterwarnings("ignore:The parameter 'pretrained' is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:Arguments other than a weight enum:UserWarning")
def test_legacy_pytorch_is_clean_fids_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    source = fid_inception()
    for parameter in source.parameters():  # torchvision's default is not to initialise
        nn.init.normal_(parameter, std=0.05)
    state = source.state_dict()
    path = tmp_path / PYTORCH[0]
    torch.save(state, path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: state)
    theirs = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False).eval()

    x = images((3, 32, 32), 2)
    features, probabilities = Inception("legacy_pytorch", path, sha256)(x)
    expected = theirs(resized(x, "legacy_pytorch") / 255)[0].flatten(1)
    assert expected.std() > 0
    assert torch.allclose(features, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert torch.allclose(probabilities, (expected @ state["fc.weight"].T).softmax(1), atol=1e-4)


@pytest.mark.parametrize(("mode", "file"), [("clean", TORCHSCRIPT), ("legacy_pytorch", PYTORCH)])
def test_absent_weights_name_file_source_and_place(mode: str, file: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / file[0]
    with pytest.raises(FileNotFoundError) as error:
        Inception(mode, path)
    for part in (f"no weights at {path}", file[1], file[2], file[3], f"curl -L --create-dirs -o {path} {file[1]}"):
        assert part in str(error.value)


def test_an_unknown_file_is_refused_before_it_is_opened(stand_in: tuple[Path, str, StandIn]) -> None:
    path, sha256, _ = stand_in
    with pytest.raises(ValueError, match=re.escape(f"{path} has sha256 {sha256}, expected {TORCHSCRIPT[2]}")):
        Inception("clean", path)
    with pytest.raises(ValueError, match="resize must be one of clean, legacy_tensorflow, legacy_pytorch, got 'cubic'"):
        Inception("cubic", path)
