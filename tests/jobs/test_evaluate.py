"""`steadyflow evaluate`: from the command line to metrics.json, and what it says about mistakes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from steadyflow import cli
from steadyflow.data import Digits, write_png_zip, write_shard
from steadyflow.launch import config_dir
from steadyflow.metrics import DigitsNet, EvaluationMetric, Inception
from steadyflow.metrics.reference import gaussian


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 60 held-out digits as a run leaves them."""
    directory, test = tmp_path_factory.mktemp("run"), Digits("test")
    write_shard(directory / "samples", torch.arange(60), test.images[:60], test.labels[:60])
    return directory


def evaluate(directory: Path, *overrides: str) -> int:
    cache = f"callbacks.evaluation.cache_dir={directory.parent}/stats"
    return cli.main(["evaluate", f"hydra.run.dir={directory}", cache, *overrides])


def done(directory: Path, *overrides: str) -> dict[str, Any]:
    assert evaluate(directory, *overrides) == 0
    found: dict[str, Any] = json.loads((directory / "metrics.json").read_text())
    return found


def mistake(capsys: pytest.CaptureFixture[str], directory: Path, *overrides: str) -> str:
    """The one line said about a run that has to end with exit code 2."""
    assert evaluate(directory, *overrides) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line.removeprefix("steadyflow evaluate: error: ")


def test_a_run_against_its_dataset(held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = done(tmp_path / "a", f"images={held_out}", "callbacks=[default,accuracy]", "reference=test")
    assert 0 < found["fid"] < 1.5
    assert found["accuracy"] > 0.95
    assert found["protocol"]["kid"]["reference"] == "digits test (200)"
    assert set(found) == {"fid", "fid_std", "kid", "kid_std", "accuracy", "protocol", "reason"}
    shown = capsys.readouterr().out
    assert f"{found['fid']:.4g} +- {found['fid_std']:.2g}" in shown
    assert (tmp_path / "a/.hydra/config.yaml").exists()
    assert json.loads((tmp_path / "a/run.json").read_text())["starts"][0]["versions"]["torch"]


def test_a_statistics_file_gives_fid_and_says_why_not_kid(held_out: Path, tmp_path: Path) -> None:
    mean, covariance = gaussian(DigitsNet()(Digits("test").images[:60])[0])
    np.savez(tmp_path / "stats.npz", mu=mean.numpy(), sigma=covariance.numpy())
    found = done(tmp_path / "b", f"images={held_out}", f"reference={tmp_path}/stats.npz")
    assert abs(found["fid"]) < 1e-4
    assert found["kid"] is None
    assert "holds a mean and a covariance only" in found["reason"]["kid"]


def test_pairs(held_out: Path, tmp_path: Path) -> None:
    images = Digits("test").images[:60]
    write_png_zip(tmp_path / "pairs", torch.arange(60), (images // 2 + 50).to(torch.uint8))
    found = done(
        tmp_path / "c", f"images={held_out}", f"paired_with={tmp_path}/pairs", "callbacks=[psnr,ssim,lpips_digits]"
    )
    error = (images.double() - (images // 2 + 50).double()).square().flatten(1).mean(1)
    assert abs(found["psnr"] - float((10 * (255**2 / error).log10()).mean())) < 1e-9
    assert found["ssim"] < 0.95
    assert found["protocol"]["lpips_digits"]["features_sha256"] == DigitsNet().sha256


def test_mistakes(held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, x = f"images={held_out}", tmp_path / "x"
    (tmp_path / "empty").mkdir()
    assert "empty holds no image" in mistake(capsys, x, f"images={tmp_path}/empty")
    assert "images" in mistake(capsys, x)  # not given
    write_shard(tmp_path / "one", torch.tensor([0]), Digits("test").images[:1])
    assert "at least 2 images" in mistake(capsys, x, f"images={tmp_path}/one")
    line = mistake(capsys, tmp_path / "y", run, "callbacks.evaluation.metrics.kid.subset_size=61")
    assert "kid: subset_size 61 needs as many images on both sides (at least 2), got 60 images and 1597" in line
    assert cli.main(["evaluate", f"hydra.run.dir={x}", run, "callbacks=none"]) == 2
    assert "no metric is chosen; set callbacks" in capsys.readouterr().err
    assert "add one, e.g. callbacks=paired" in mistake(capsys, x, run, f"paired_with={held_out}")
    small = Digits("test", size=16).images[:60]
    write_shard(tmp_path / "small", torch.arange(60), small)
    line = mistake(capsys, tmp_path / "z", f"images={tmp_path}/small")
    assert line.startswith("digits features need uint8 images (B, 1, 32, 32), got torch.uint8 (1, 1, 16, 16)")
    line = mistake(capsys, tmp_path / "w", run, f"paired_with={tmp_path}/small", "callbacks=psnr")
    assert "pairs of different sizes: images are (1, 32, 32), their pairs (1, 16, 16)" in line
    write_shard(tmp_path / "small", torch.arange(60, 62), Digits("test").images[:2])
    assert "images of different sizes" in mistake(capsys, x, f"images={tmp_path}/small")
    absent = f"features.weights={tmp_path}/absent.pt"
    line = mistake(capsys, tmp_path / "v", run, "features=inception", absent)
    assert line.startswith(f"no metric could be had: fid, kid: no weights at {tmp_path}/absent.pt; fetch https://")
    assert line.count("fetch https://") == 1


def test_likelihood(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """metrics=nll: of the exact model of a mixture, against its own log-density; killed, it goes on."""
    from steadyflow.samplers import Likelihood

    words = ["metrics=nll", "checkpoint=analytic", "dataset=gaussian_mixture", "num_images=6", "batch_size=4"]
    words += ["dataset.means=[[0.5,-0.5],[-0.5,0.5]]", "dataset.covariances=0.2"]
    run, measure = [f"hydra.run.dir={tmp_path}/a", *words], Likelihood.__call__

    def killed(self: Likelihood, model: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(x) == 2:  # the second batch
            raise KeyboardInterrupt
        return measure(self, model, x, *args, **kwargs)

    monkeypatch.setattr(Likelihood, "__call__", killed)
    assert cli.main(["evaluate", *run]) == 130
    assert len((tmp_path / "a/per_image.csv").read_text().splitlines()) == 5
    monkeypatch.setattr(Likelihood, "__call__", measure)
    assert cli.main(["evaluate", f"resume={tmp_path}/a"]) == 0
    found = json.loads((tmp_path / "a/metrics.json").read_text())
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose("evaluate", words)
    data, exact = instantiate(cfg.dataset), instantiate(cfg.checkpoint).denoiser
    x = torch.stack([data[i][0] for i in range(6)])
    bits = -exact.log_prob(x, torch.tensor(1.0), torch.tensor(0.0)) / 2 / np.log(2)
    assert abs(found["nll"] - float(bits.mean())) < 2e-3  # alpha(1) is not quite 0
    assert abs(found["nll_std"] - float(bits.std()) / 6**0.5) < 2e-3
    capsys.readouterr()
    assert cli.main(["evaluate", "metrics=nll", "dataset.size=16", f"hydra.run.dir={tmp_path}/b"]) == 2
    assert "checkpoint digits32 makes samples of shape (1, 32, 32)" in capsys.readouterr().err


def test_the_variational_bound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of few steps a loose one: more bits than the flow's. It takes the images' levels as they are."""
    words = ["evaluate", "num_images=2"]
    bound = ["metrics=elbo", "likelihood.steps=20", f"hydra.run.dir={tmp_path}/a"]
    flow = ["metrics=nll", "likelihood.rtol=0.1", "likelihood.atol=0.1", f"hydra.run.dir={tmp_path}/b"]
    found = []
    for own in (bound, flow):
        assert cli.main([*words, *own]) == 0
        found.append(json.loads((tmp_path / own[-1][-1] / "metrics.json").read_text()))
    assert 8 > found[0]["nll"] > found[1]["nll"] > 0
    protocol = found[0]["protocol"]["nll"]
    assert (protocol["bound"], protocol["steps"], protocol["dequantisation"]) == ("variational", 20, None)
    capsys.readouterr()
    learned = [*words, *bound[:2], "likelihood.variance=learned", f"hydra.run.dir={tmp_path}/c"]
    assert cli.main(learned) == 2
    assert "predicts no variance; choose variance=small or large" in capsys.readouterr().err


def test_every_option_of_the_groups_composes_and_builds() -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for file in sorted((config_dir() / "callbacks").glob("*.yaml")):
            cfg = compose("evaluate", [f"callbacks={file.stem}", "images=x"])
            built = instantiate(cfg.callbacks.evaluation.get("metrics", {}))
            assert all(isinstance(metric, EvaluationMetric) for metric in built.values())
            assert (len(built) == 0) == (file.stem in ("none", "evaluation"))
        every = compose("evaluate", ["callbacks=all"]).callbacks.evaluation.metrics
        single = {f.stem for f in (config_dir() / "callbacks").glob("*.yaml")}
        assert single - {"all", "default", "evaluation", "none", "paired"} == set(every)


def test_the_default_features_follow_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steadyflow.metrics import inception

    monkeypatch.setattr(inception, "WEIGHTS", tmp_path)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        assert isinstance(instantiate(compose("evaluate").features)(), DigitsNet)
        for overrides in (["dataset=mnist"], ["features=inception"]):
            with pytest.raises(FileNotFoundError, match=inception.TORCHSCRIPT[0]):
                instantiate(compose("evaluate", overrides).features)()
        weights = tmp_path / "resnet.safetensors"
        with pytest.raises(FileNotFoundError, match=str(weights)):
            instantiate(compose("evaluate", ["features=resnet_cifar10", f"features.weights={weights}"]).features)()
    assert Inception.classes == 1008
