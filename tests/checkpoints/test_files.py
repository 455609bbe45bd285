"""Checkpoints on disk: what is saved comes back bit for bit, and whatever is damaged or hostile is refused by name."""

import datetime
import hashlib
import json
import pickle
import resource
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

from steadyflow.checkpoints import load, save
from steadyflow.denoisers import EDMDenoiser, EpsDenoiser, NetworkDenoiser, VelocityDenoiser
from steadyflow.networks import MLP, UNet
from steadyflow.paths import ConditionalOT, VariancePreserving

UNET = {
    "_target_": "steadyflow.networks.UNet",
    "in_channels": 1,
    "model_channels": 8,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [4],
    "image_size": 8,
    "num_classes": 3,
}
NODES = {
    "network": UNET,
    "path": {"_target_": "steadyflow.paths.VariancePreserving", "beta_max": 12.5},
    "denoiser": {"_target_": "steadyflow.denoisers.EpsDenoiser"},
}
CARD = {"steps": 10, "seed": 3, "git": "abc", "metrics": {"fid": 1.25, "kid": None}, "config": {"lr": 1e-4, "a": [1]}}
VP = {"_target_": "steadyflow.paths.VariancePreserving"}
PHOTOGRAPHS = {"_target_": "steadyflow.denoisers.Photographs", "shape": [1, 60000, 60000]}


def denoiser() -> NetworkDenoiser:
    torch.manual_seed(0)
    network = UNet(**{k: v for k, v in UNET.items() if k != "_target_"})
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return EpsDenoiser(network, VariancePreserving(beta_max=12.5))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "it", denoiser(), NODES, (1, 8, 8), 3, CARD)
    return tmp_path / "it"


def edit(directory: Path, rehash: bool = True, **entries: object) -> None:
    """Changes entries of config.yaml (None removes one); with `rehash` as somebody would who knows of the hash."""
    config = yaml.safe_load((directory / "config.yaml").read_text())
    config = {k: v for k, v in (config | entries).items() if v is not None}
    if rehash:
        rest = {k: v for k, v in config.items() if k != "config_sha256"}
        config["config_sha256"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (directory / "config.yaml").write_text(yaml.safe_dump(config))


def replace_weights(directory: Path, data: bytes) -> None:
    """Other weights, with their hash where it belongs."""
    (directory / "model.safetensors").write_bytes(data)
    edit(directory, sha256=hashlib.sha256(data).hexdigest())


def test_round_trip_is_bit_exact_and_complete(saved: Path) -> None:
    original, checkpoint = denoiser().eval(), load(saved)
    for key, value in original.network.state_dict().items():
        assert torch.equal(checkpoint.denoiser.network.state_dict()[key], value)
    x = torch.randn(2, 1, 8, 8)
    alpha, sigma = original.path(torch.tensor([0.2, 0.7]))
    label = torch.tensor([0, 3])
    assert torch.equal(checkpoint.denoiser(x, alpha, sigma, label=label), original(x, alpha, sigma, label=label))
    assert checkpoint.card == CARD
    assert (checkpoint.shape, checkpoint.num_classes, checkpoint.name) == ((1, 8, 8), 3, str(saved))
    assert checkpoint.sha256 == hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()
    assert checkpoint.path is checkpoint.denoiser.path
    assert not any(module.training for module in checkpoint.denoiser.modules())
    assert sorted(p.name for p in saved.iterdir()) == ["card.md", "config.yaml", "model.safetensors"]


def test_a_saved_checkpoint_saves_to_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = load(saved)
    save(tmp_path / "it2", again.denoiser, NODES, again.shape, again.num_classes, again.card)
    for name in ("model.safetensors", "config.yaml"):
        assert (saved / name).read_bytes() == (tmp_path / "it2" / name).read_bytes()


def test_half_precision_weights_halve_the_file_and_come_back_as_rounded(saved: Path, tmp_path: Path) -> None:
    save(tmp_path / "half", denoiser(), NODES, (1, 8, 8), 3, CARD, dtype=torch.float16)
    half, full = load(tmp_path / "half").denoiser.network.state_dict(), denoiser().network.state_dict()
    assert all(torch.equal(half[key], full[key].half().float()) for key in full)
    sizes = [(d / "model.safetensors").stat().st_size for d in (saved, tmp_path / "half")]
    assert 0.5 < sizes[1] / sizes[0] < 0.6  # the header stays


@pytest.mark.parametrize("kind", [EDMDenoiser, VelocityDenoiser])
def test_vectors_arguments_of_the_denoiser_and_float64(kind: type, tmp_path: Path) -> None:
    extra = {"sigma_data": 0.25} if kind is EDMDenoiser else {}
    torch.manual_seed(0)
    original = kind(MLP(2, 8, 1).double(), ConditionalOT(), **extra).eval()
    torch.nn.init.normal_(original.network.head.weight)
    nodes = {
        "network": {"_target_": "steadyflow.networks.MLP", "dim": 2, "width": 8, "blocks": 1},
        "path": {"_target_": "steadyflow.paths.ConditionalOT"},
        "denoiser": {"_target_": f"steadyflow.denoisers.{kind.__name__}", **extra},
    }
    save(tmp_path, original, nodes, (2,), 0, {})
    x, t = torch.randn(3, 2, dtype=torch.float64), torch.tensor([0.1, 0.5, 0.9])
    assert torch.equal(load(tmp_path).denoiser(x, *original.path(t)), original(x, *original.path(t)))


def test_loading_and_saving_leave_the_random_numbers_alone(saved: Path) -> None:
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    save(saved, load(saved).denoiser, NODES, (1, 8, 8), 3, CARD)
    assert torch.equal(torch.randn(3), expected)


def test_a_train_run_is_its_model(saved: Path, tmp_path: Path) -> None:
    saved.rename(tmp_path / "model")
    assert load(tmp_path).sha256 == load(tmp_path / "model").sha256


def test_the_card_is_readable(saved: Path) -> None:
    text = (saved / "card.md").read_text()
    assert "\n# Model card\n" in text
    assert "- steps: 10\n" in text
    assert "| fid | 1.25 |" in text
    (saved / "card.md").write_text("# nothing\n---\na: 1\n---\n")
    assert load(saved).card == {}


def test_a_truncated_file_is_refused_with_both_hashes(saved: Path) -> None:
    file = saved / "model.safetensors"
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_bytes(file.read_bytes()[:-4])
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(
        ValueError, match=f"model.safetensors is truncated or edited.*expects sha256 {expected}, found {found}"
    ):
        load(saved)


def test_one_flipped_bit_is_refused(saved: Path) -> None:
    file = saved / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"found {hashlib.sha256(data).hexdigest()}"):
        load(saved)


def test_the_callers_hash_is_checked_too(saved: Path) -> None:
    assert load(saved, sha256=load(saved).sha256).num_classes == 3
    with pytest.raises(ValueError, match=f"the caller expects sha256 {'0' * 64}, found"):
        load(saved, sha256="0" * 64)


def test_an_edited_config_is_refused_with_both_hashes_and_taken_when_the_hash_is_put_in(saved: Path) -> None:
    before = yaml.safe_load((saved / "config.yaml").read_text())["config_sha256"]
    edit(saved, rehash=False, path={"_target_": "steadyflow.paths.Cosine"})
    with pytest.raises(
        ValueError, match=rf"config.yaml is truncated or edited: its config_sha256 is {before}, found \w+"
    ):
        load(saved)
    edit(saved)
    assert type(load(saved).path).__name__ == "Cosine"


def test_a_truncated_config_is_refused(saved: Path) -> None:
    text = (saved / "config.yaml").read_text()
    for length in range(0, len(text) - 1, 37):
        (saved / "config.yaml").write_text(text[:length])
        with pytest.raises(ValueError, match=r"config\.yaml"):
            load(saved)


def test_a_pickle_under_a_false_name_is_never_opened(saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"

    class Hostile:
        def __reduce__(self) -> tuple:
            return Path.touch, (mark,)

    torch.save({"a": Hostile()}, tmp_path / "zip.pt")
    for data in (pickle.dumps(Hostile()), (tmp_path / "zip.pt").read_bytes()):
        replace_weights(saved, data)
        with pytest.raises(ValueError, match=r"model.safetensors is no safetensors file: a pickle.*never loaded"):
            load(saved)
    assert not mark.exists()
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert mark.exists()  # the trap was live


def test_other_bytes_are_no_safetensors(saved: Path) -> None:
    replace_weights(saved, b"hello, world, these are no weights")
    with pytest.raises(ValueError, match=r"model\.safetensors is no safetensors file"):
        load(saved)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os.system", r"_target_ os.system is outside steadyflow.networks.*trusted=\['os'\]"),
        ("subprocess.Popen", "_target_ subprocess.Popen is outside"),
        ("steadyflow.networks_evil.UNet", "outside"),
        ("steadyflow.jobs.train.run", "outside"),
        ("eval", "_target_ eval is outside"),
        ("steadyflow.network.UNet", r"did you mean steadyflow.networks.UNet\?"),
        ("steadyflow.networks.Unet", r"steadyflow.networks has no class 'Unet'; did you mean UNet\?"),
        ("steadyflow.networks.unet.checkpoint", "steadyflow.networks.unet has no class 'checkpoint'"),
        ("steadyflow.networks.unet.Tensor", "steadyflow.networks.unet has no class 'Tensor'"),
        ("steadyflow.networks.unit.UNet", "_target_ steadyflow.networks.unit.UNet cannot be found"),
        ("steadyflow.paths.Cosine", "steadyflow.paths.Cosine is no Module"),
    ],
)
def test_a_target_names_a_trusted_class_or_nothing_runs(saved: Path, target: str, message: str) -> None:
    edit(saved, network=UNET | {"_target_": target})
    with pytest.raises(ValueError, match=message) as caught:
        load(saved)
    assert f"{saved / 'config.yaml'}: network" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_nested_target_is_held_to_the_same_rule(saved: Path) -> None:
    edit(saved, network=UNET | {"in_channels": {"_target_": "os.getpid"}})
    with pytest.raises(ValueError, match=r"network.in_channels: _target_ os.getpid is outside"):
        load(saved)


def test_a_class_of_ones_own_is_built_when_trusted(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_networks.py").write_text("from steadyflow.networks import UNet\n\nclass Mine(UNet):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import my_networks  # type: ignore[import-not-found]

    mine = my_networks.Mine(**{k: v for k, v in UNET.items() if k != "_target_"})
    nodes = NODES | {"network": UNET | {"_target_": "my_networks.Mine"}}
    save(tmp_path / "mine", EpsDenoiser(mine, VariancePreserving(beta_max=12.5)), nodes, (1, 8, 8), 3, {})
    with pytest.raises(ValueError, match=r"load with trusted=\['my_networks'\]"):
        load(tmp_path / "mine")
    with pytest.raises(ValueError, match="outside"):
        load(tmp_path / "mine", trusted=["my_net"])
    for trusted in ("my_networks", ["other", "my_networks"]):
        assert isinstance(load(tmp_path / "mine", trusted=trusted).denoiser.network, my_networks.Mine)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"shape": None}, "lacks 'shape'"),
        (
            {"shape": [1, 2**40, 8]},
            r"config.yaml: a shape is of numbers from 1 to 16384, .* \[1, 1099511627776, 8\]",
        ),
        ({"shape": None, "shap": [1, 8, 8]}, "lacks 'shape', and has 'shap' instead"),
        ({"chape": 1}, r"has the unknown entry 'chape'; did you mean shape\?"),
        ({"network": "steadyflow.networks.UNet"}, "network must be a mapping with a _target_"),
        ({"network": UNET | {"modelchannels": 8}}, r"takes no 'modelchannels' here; did you mean model_channels\?"),
        ({"network": UNET | {"image_size": 7}}, "refuses its arguments: image_size 7 is not a multiple of 2"),
        ({"network": UNET | {"model_channels": "x"}}, "refuses its arguments"),
        ({"network": UNET | {"model_channels": 16}}, r"has shape \(.*\), the network of config.yaml has"),
        ({"network": UNET | {"num_classes": 0}}, "1 weights are unexpected, first conditioning.table.weight"),
        ({"network": UNET | {"num_res_blocks": 2}}, r"\d+ weights are missing, first"),
        ({"network": {"_target_": "steadyflow.networks.MLP"}}, "steadyflow.networks.MLP needs dim"),
        (
            {"path": {"_target_": "steadyflow.networks.MLP", "dim": 2}},
            "path: steadyflow.networks.MLP is no GaussianPath",
        ),
        (
            {"denoiser": {"_target_": "steadyflow.denoisers.EpsDenoiser", "clock": PHOTOGRAPHS}},
            "denoiser.clock: steadyflow.denoisers.Photographs is no NetworkDenoiser",  # it takes 14 GB
        ),
        (
            {"path": {"_target_": "steadyflow.diffusions.BDM", "path": VP, "size": 10**5}},
            "refuses its arguments: need images of a size from 1 to 4096",
        ),
        (
            {"path": {"_target_": "steadyflow.paths.DiscreteVariancePreserving", "steps": 10**12}},
            "refuses its arguments: need .* steps from 1 to a million",
        ),
        ({"denoiser": {"_target_": "steadyflow.denoisers.EpsDenoiser", "path": 1}}, "takes no 'path' here"),
        ({"denoiser": {"_target_": "steadyflow.denoisers.NetworkDenoiser"}}, "refuses its arguments"),
    ],
)
def test_a_wrong_config_is_one_line_with_the_nearest_name(saved: Path, entries: dict, message: str) -> None:
    edit(saved, **entries)
    with pytest.raises(ValueError, match=message) as caught:
        load(saved)
    assert "\n" not in str(caught.value)


LISTS = "x0: &x0 [1]\n" + "".join(f"x{k + 1}: &x{k + 1} [{9 * f'*x{k}, '}]\n" for k in range(9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LISTS, "repeats its parts, or itself, until it holds more than 65536"),
        ("a: &a [*a]", "repeats its parts, or itself"),
        ("a: &a {b: 1}\nc: {<<: [*a, *a]}", "is no YAML: could not determine .*:merge"),
        ("a: " + "[" * 1000, "is no YAML: maximum recursion depth"),
        ("a: 2001-99-99", "is no YAML: month must be in"),
        ("a: 1\n" * 10**5, "50000. characters, which is no YAML of a checkpoint's: 131072 at most"),
        ("a: !!python/name:os.system", "is no YAML: could not determine"),
    ],
)
@pytest.mark.parametrize("name", ["config.yaml", "card.md"])
def test_yaml_that_takes_all_memory_or_time_is_one_line(text: str, message: str, name: str, saved: Path) -> None:
    (saved / name).write_text(text if name == "config.yaml" else f"---\n{text}\n---\n")
    with pytest.raises(ValueError, match=message) as caught:
        load(saved)
    assert str(caught.value).startswith(str(saved / name))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("value", [datetime.date(2026, 1, 1), {1: 2, "a": 3}, {"a"}])
def test_a_config_is_plain_data(value: object, saved: Path) -> None:
    edit(saved, rehash=False, num_classes=value)
    with pytest.raises(ValueError, match=r"config.yaml must hold plain data \("):
        load(saved)


def test_a_config_does_not_build_without_end(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steadyflow.checkpoints.files.CALLS", 1000)
    edit(saved, network=UNET | {"num_res_blocks": 10**9})
    with pytest.raises(ValueError, match="UNet refuses its arguments: a network of more than 10000 layers"):
        load(saved)


def test_whole_numbers_are_no_weights(saved: Path) -> None:
    state = safetensors.torch.load_file(saved / "model.safetensors")
    replace_weights(saved, safetensors.torch.save(state | {"stem.weight": state["stem.weight"].int()}))
    with pytest.raises(ValueError, match=r"stem.weight is of torch.int32, the network .* has torch.float32"):
        load(saved)


def test_renamed_weights_are_named_with_the_nearest(saved: Path) -> None:
    state = safetensors.torch.load_file(saved / "model.safetensors")
    state["steam.weight"] = state.pop("stem.weight")
    replace_weights(saved, safetensors.torch.save(state))
    with pytest.raises(ValueError, match=r"1 weights are missing, first stem.weight; did you mean steam.weight\?"):
        load(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no checkpoint in .*: {name} is missing"):
        load(saved)


def test_save_refuses_nodes_of_another_denoiser(tmp_path: Path) -> None:
    wrong = [
        ({"network": UNET | {"model_channels": 16}}, "weight .* has shape"),
        ({"path": {"_target_": "steadyflow.paths.VariancePreserving"}}, "with other settings"),
        ({"denoiser": {"_target_": "steadyflow.denoisers.VDenoiser"}}, "nodes build VDenoiser of UNet"),
        ({"network": None}, "network must be a mapping"),
        ({"nettwork": UNET}, r"no node 'nettwork'; did you mean network\?"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            save(tmp_path / "it", denoiser(), NODES | change, (1, 8, 8), 3, CARD)
    with pytest.raises(ValueError, match="must be plain data"):
        save(tmp_path / "it", denoiser(), NODES, (1, 8, 8), 3, {"fid": torch.tensor(1.0)})
    assert not (tmp_path / "it").exists()


def test_a_failed_write_leaves_the_earlier_checkpoint(saved: Path) -> None:
    before, other = load(saved).sha256, denoiser()
    torch.nn.init.zeros_(other.network.stem.weight)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            save(saved, other, NODES, (1, 8, 8), 3, CARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load(saved).sha256 == before
    assert len(list(saved.iterdir())) == 3
