"""`steadyflow restore`, from the command line to the files, with the exact denoiser of the digits to train on: held-out
images come near, not back."""

import csv
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from steadyflow import cli
from steadyflow.callbacks.samples import SampleFiles
from steadyflow.data import Digits, ImageFiles, from_uint8, open_images, to_uint8, write_png_zip
from steadyflow.data.image_files import DatasetPart
from steadyflow.denoisers import Empirical, Gaussian
from steadyflow.grids import Uniform
from steadyflow.guidance import PiGDM
from steadyflow.linear import Inpainting, SuperResolution, box_mask
from steadyflow.modules.restoring import Measurements, Restoration
from steadyflow.noise import NoiseSource
from steadyflow.paths import ConditionalOT
from steadyflow.restorers import GuidedSampler, Measurement
from steadyflow.samplers import Euler, Heun
from steadyflow.tables.outcomes import number

PRIOR = ["checkpoint=analytic", "checkpoint.dataset={_target_:steadyflow.data.Digits,split:train}"]
BASE = [*PRIOR, "sampler.steps=4", "logger=none", "+trainer.enable_progress_bar=false"]
DIGITS = Digits("test")
TRAIN = Digits("train")


def restore(directory, *overrides) -> int:
    return cli.main(["restore", *BASE, f"hydra.run.dir={directory}", *overrides])


def done(directory, *overrides) -> tuple[np.ndarray, dict]:
    """The restored images (N, C, H, W) in the order of their numbers, and the metrics."""
    assert restore(directory, *overrides) == 0
    files = open_images(directory)
    return files.read(np.sort(files.index)).numpy(), json.loads((Path(directory) / "metrics.json").read_text())


def mistake(capsys, directory, *overrides, job="restore") -> str:
    """The one line said about a run that has to end with exit code 2."""
    capsys.readouterr()
    assert cli.main([job, *BASE, f"hydra.run.dir={directory}", *overrides]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line.removeprefix(f"steadyflow {job}: error: ")


def same(x, y):
    """To the rounding of another batch size, which bytes can show as one level."""
    assert np.abs(x.astype(int) - y).max() <= 1
    assert (x != y).mean() < 1e-3


def test_what_a_run_leaves(tmp_path):
    x, metrics = done(tmp_path, "num_images=4", "first=3", "batch_size=2", "task.sigma_y=0.05", "seed=5")
    shards = sorted((tmp_path / "restored").iterdir())
    assert [shard.name for shard in shards] == ["00000003.npz", "00000005.npz"]
    with np.load(shards[1]) as shard:
        assert shard["index"].tolist() == [5, 6]
        assert shard["label"].tolist() == DIGITS.labels[5:7].tolist()  # each image's own

    # the same images from a restorer, a measurement and a denoiser that this test builds itself
    truth = DIGITS.images[3:7]
    operator, noise = SuperResolution((1, 32, 32), 4), NoiseSource(5, range(3, 7), (1, 32, 32))
    y = operator(from_uint8(truth)) + 0.05 * NoiseSource(5, range(3, 7), (1, 8, 8), stream=2**33 + 1)(0)
    restorer = GuidedSampler(Euler(ConditionalOT(), Uniform(0.8), 4), partial(PiGDM, weight=1.0))
    exact = Empirical(from_uint8(TRAIN.images), TRAIN.labels)
    expected = restorer(exact, Measurement(y, operator, 0.05), noise, label=DIGITS.labels[3:7])
    same(x, to_uint8(expected).numpy())

    again = operator(from_uint8(torch.from_numpy(x)))
    consistency = ((again - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).numpy()
    psnr = 10 * np.log10(255**2 / ((x.astype(float) - truth.numpy()) ** 2).mean((1, 2, 3)))
    with (tmp_path / "per_image.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["index"] for row in rows] == ["3", "4", "5", "6"]
    assert set(rows[0]) == {"index", "psnr", "ssim", "lpips_digits", "consistency"}
    for name, values in (("psnr", psnr), ("consistency", consistency)):
        np.testing.assert_allclose([float(row[name]) for row in rows], values, rtol=1e-4)
        assert metrics[name] == pytest.approx(values.mean(), rel=1e-4)
        assert metrics[f"{name}_std"] == pytest.approx(values.std(ddof=1), rel=1e-3)
    assert metrics["lpips"] is None
    assert "alexnet" in metrics["reason"]["lpips"]
    assert metrics["fid"] > 0
    assert metrics["kid"] is not None
    assert metrics["nfe"] == 4
    assert metrics["seconds_per_image"] > 0
    assert metrics["protocol"]["nfe"]["images"] == "digits test"
    assert metrics["protocol"]["seconds_per_image"]["count"] == 2  # the first batch is warm-up

    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (2 + 4 * 34, 2 + 3 * 34)  # a row each: reference | measurement | restoration
    assert np.array_equal(pixels[36:68, 2:34], truth[1, 0])
    assert np.array_equal(pixels[36:68, 36:68], to_uint8(y[1, 0]).numpy().repeat(4, 0).repeat(4, 1))
    assert np.array_equal(pixels[36:68, 70:102], x[1, 0])


def test_a_measurement_depends_on_seed_and_image_alone():
    files = ImageFiles([DatasetPart(DIGITS, np.arange(20))])
    operator = Inpainting((1, 32, 32), partial(box_mask, size=12))
    measure = Measurements(files, operator, 0.5, seed=1)
    y, x = measure(torch.arange(20)).y, from_uint8(DIGITS.images[:20])
    assert torch.equal(measure(torch.tensor([7, 3])).y, y[[7, 3]])
    known = operator.mask.bool().expand(20, 1, 32, 32)
    assert (y[~known] == 0).all()  # not measured, so without noise as well
    noise = ((y - x) / 0.5)[known]
    assert abs(noise.mean()) < 4 / len(noise) ** 0.5
    assert abs(noise.std() - 1) < 4 / (2 * len(noise)) ** 0.5
    other = Measurements(files, operator, 0.5, seed=2)(torch.arange(20)).y
    sampling = NoiseSource(1, range(20), (1, 32, 32))
    for independent in (((other - x) / 0.5)[known], sampling(0)[known], sampling(1)[known]):
        assert abs((noise * independent).mean()) < 4 / len(noise) ** 0.5


def test_the_same_for_any_batch_size_and_in_png(tmp_path):
    options = [
        "num_images=5",
        "task=inpaint_box",
        "task.size=14",
        "task.sigma_y=0.1",
        "sampler=pigdm",
        "callbacks=none",
    ]
    x, _ = done(tmp_path / "5", *options, "batch_size=5", "format=png")
    y, _ = done(tmp_path / "2", *options, "batch_size=2")
    same(x, y)
    assert open_images(tmp_path / "5").label.tolist() == DIGITS.labels[:5].tolist()


def test_interrupted_and_continued(tmp_path, monkeypatch, capsys):
    options = ["num_images=5", "batch_size=2", "callbacks=[psnr]", "task.sigma_y=0.1"]
    x, whole = done(tmp_path / "whole", *options)
    write, written = SampleFiles.write, []

    def interrupted(self, samples):
        if written:
            raise KeyboardInterrupt
        written.append(samples)
        write(self, samples)

    monkeypatch.setattr(SampleFiles, "write", interrupted)
    assert restore(tmp_path / "killed", *options) == 130
    monkeypatch.undo()
    assert open_images(tmp_path / "killed").index.tolist() == [0, 1]
    y, again = done(tmp_path / "killed", f"resume={tmp_path / 'killed'}", "batch_size=3")
    same(x, y)
    assert again["psnr"] == pytest.approx(whole["psnr"], abs=0.01)
    assert again["protocol"]["nfe"]["count"] == 3  # only what was missing
    said = mistake(capsys, tmp_path / "killed", *options, "task.factor=2")
    assert "holds a run with another config: task.factor (4 there, 2 here)" in said


def test_several_samples_of_each_posterior(tmp_path, capsys):
    options = [
        "num_images=2",
        "first=3",
        "samples_per_image=3",
        "sampler=pigdm",
        "task.sigma_y=0.3",
        "callbacks=[psnr]",
    ]
    x, metrics = done(tmp_path, *options, "batch_size=4")
    assert open_images(tmp_path).index.tolist() == [*range(9, 15)]
    assert metrics["protocol"]["nfe"]["count"] == 6
    groups = from_uint8(torch.from_numpy(x)).unflatten(0, (2, 3))
    with np.load(tmp_path / "posterior.npz") as found:
        assert found["index"].tolist() == [3, 4]
        np.testing.assert_allclose(found["mean"], groups.mean(1), atol=1e-6)
        np.testing.assert_allclose(found["std"], groups.std(1), atol=1e-6)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (2 + 2 * 34, 2 + 7 * 34)  # reference | measurement | three samples | mean | std
    assert np.array_equal(pixels[36:68, 2:34], DIGITS.images[4, 0])
    assert np.array_equal(pixels[36:68, 36 + 34 : 68 + 34], x[3, 0])
    assert np.array_equal(pixels[36:68, 172:204], to_uint8(groups.mean(1))[1, 0].numpy())
    assert pixels[:, 206:238].max() == 255
    assert "samples_per_image must be at least 1, got 0" in mistake(capsys, tmp_path / "x", "samples_per_image=0")


def test_samples_of_a_gaussian_posterior_have_its_mean_and_spread():
    """x_0 ~ N(m, I), the case in which guidance is exact: E[x_0 | y] and the standard deviation of each pixel."""
    count, shape, sigma_y = 2000, (1, 8, 8), 0.5
    dataset = Digits("test", size=8)
    operator = SuperResolution(shape, 2)
    images = ImageFiles([DatasetPart(dataset, np.arange(2, 4))]).repeated(count)
    measurements = Measurements(images, operator, sigma_y, seed=3, samples=count)
    y = measurements(torch.tensor([3 * count - 1, 3 * count])).y  # the last of image 2, the first of image 3
    alone = Measurements(ImageFiles([DatasetPart(dataset, np.arange(2, 4))]), operator, sigma_y, seed=3)
    assert torch.equal(alone(torch.tensor([2, 3])).y, y)
    restorer = GuidedSampler(Heun(ConditionalOT(), Uniform(1, 1e-3), 24), PiGDM, init="noise")
    index = range(3 * count, 4 * count)
    mean = torch.linspace(-1, 1, 64).reshape(shape)
    x = Restoration(restorer, measurements)(Gaussian(mean, 1.0), NoiseSource(3, index, shape)).double()
    eye = torch.eye(64, dtype=torch.float64)
    matrix = operator(eye.reshape(64, *shape)).flatten(1).T
    gain = matrix.T @ torch.linalg.inv(matrix @ matrix.T + sigma_y**2 * torch.eye(16, dtype=torch.float64))
    expected = mean.flatten() + gain @ (y[1].flatten().double() - matrix @ mean.flatten().double())
    std = (eye - gain @ matrix).diag().sqrt()
    assert ((x.flatten(1).mean(0) - expected).abs() < 4 * std / count**0.5).all()
    assert ((x.flatten(1).std(0) / std - 1).abs() < 4 / (2 * count) ** 0.5 + 0.01).all()


def test_labels_and_guidance(tmp_path):
    options = ["num_images=2", "callbacks=none", "task=sr8"]
    own, metrics = done(tmp_path / "own", *options)
    assert metrics["nfe"] == 4
    three, _ = done(tmp_path / "three", *options, "label=3")
    _, guided = done(tmp_path / "guided", *options, "guidance_scale=2")
    assert guided["nfe"] == 8
    assert open_images(tmp_path / "three").label.tolist() == [3, 3]
    for images, labels in ((own, DIGITS.labels[:2].tolist()), (three, [3, 3])):  # the exact denoiser ends on its items
        distance = ((images[:, None].astype(float) - TRAIN.images.numpy()) ** 2).mean((2, 3, 4))
        assert TRAIN.labels[distance.argmin(1)].tolist() == labels


def test_a_picture_that_is_degraded_already(tmp_path, capsys):
    x = from_uint8(TRAIN.images[4:5])
    small = to_uint8(SuperResolution((1, 32, 32), 4)(x))[0, 0].numpy()
    photo = np.zeros((12, 11, 3), np.uint8)  # in colour, and larger than 8 x 8
    photo[2:10, 1:9] = small[..., None]
    Image.fromarray(photo).save(tmp_path / "photo.png")
    options = [f"input={tmp_path / 'photo.png'}", f"label={int(TRAIN.labels[4])}"]
    capsys.readouterr()
    restored, metrics = done(tmp_path / "run", *options)
    assert metrics["psnr"] is metrics["lpips_digits"] is metrics["fid"] is None
    assert "no pairs" in metrics["reason"]["psnr"]
    assert metrics["consistency"] < 0.02
    assert np.abs(restored[0].astype(int) - TRAIN.images[4].numpy()).max() <= 2  # the exact denoiser knows this one
    with Image.open(tmp_path / "run/restored.png") as picture:
        assert np.array_equal(np.asarray(picture), restored[0, 0])
    pixels = np.asarray(Image.open(tmp_path / "run/grid.png"))
    assert pixels.shape == (2 + 34, 2 + 2 * 34)  # measurement | restoration
    assert np.abs(pixels[2:34, 2:34].astype(int) - small.repeat(4, 0).repeat(4, 1)).max() <= 1
    assert "the middle 8x8 of 11x12 pixels are taken" in (tmp_path / "run/restore.log").read_text()
    for overrides, message in (
        (["task=blur"], "input is 11x12 pixels, and this checkpoint and task take 32x32 or more"),
        (["task=cs_walsh"], "no picture; input takes pictures"),
        (["images=x"], "give one of them"),
    ):
        assert message in mistake(capsys, tmp_path / "x", *options, *overrides)


def test_images_of_a_zip(tmp_path, capsys):
    write_png_zip(tmp_path / "zip", torch.arange(2, 5), DIGITS.images[2:5])
    x, metrics = done(tmp_path / "a", f"images={tmp_path / 'zip'}", "num_images=2", "first=1", "callbacks=[psnr]")
    y, same_images = done(tmp_path / "b", "num_images=2", "first=3", "label=null", "callbacks=[psnr]")
    same(x, y)  # their numbers are the same, so their noise too; without a class of their own, the null label
    assert metrics["psnr"] == pytest.approx(same_images["psnr"], abs=0.01)
    assert open_images(tmp_path / "a").index.tolist() == [3, 4]
    write_png_zip(tmp_path / "small", torch.arange(2), DIGITS.images[:2, :, :16])
    said = mistake(capsys, tmp_path / "x", f"images={tmp_path / 'small'}", "num_images=2")
    assert "makes samples of shape (1, 32, 32), but dataset" in said
    assert "has (1, 16, 32)" in said


def test_the_grid_search_of_c_pigdm_ends_in_a_table_and_heat_maps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    swept = ["+sweep=c_pigdm_grid", "sampler.steps=2", "sampler.weight=0.1,8", "sampler.grid.start=0.4,0.6"]
    options = ["logger=none", "num_images=2", "callbacks=[psnr]", "hydra.sweep.dir=sweep"]
    assert cli.main(["restore", *PRIOR, *options, *swept]) == 0
    found = [json.loads(Path(f"sweep/{k}/metrics.json").read_text()) for k in range(4)]
    with Path("sweep/report/report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["sampler.weight"], row["sampler.grid.start"]) for row in rows] == [
        *(("0.1", "0.4"), ("0.1", "0.6"), ("8", "0.4"), ("8", "0.6"))
    ]
    for metric, choose in (("psnr", max), ("consistency", min)):
        values = [m[metric] for m in found]
        assert [float(row[metric]) for row in rows] == pytest.approx(values)
        assert metric in rows[values.index(choose(values))]["best_in"]
        assert f"**{number(choose(values))}**" in Path(f"sweep/report/pivot_{metric}.md").read_text()
        with Image.open(f"sweep/report/heat_{metric}.png") as picture:
            assert picture.size[0] > 200


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=sr44"], "no option 'sr44' in the group task. Did you mean sr4"),
        (["task=sr4", "task.factor=5"], "task.operator: the factor 5 does not divide an image of 32 x 32"),
        (["task.sigma_y=-0.1"], "sigma_y is a standard deviation, at least 0; got -0.1"),
        (["task=inpaint_box", "task.size=32"], "the mask is 0 everywhere: nothing is measured"),
        (["task=inpaint_box", "task.size=40"], "a box of 40 x 40 does not fit an image of 32 x 32"),
        (["task=inpaint_file"], "task.operator: file_mask() missing 1 required positional argument: 'file'"),
        (["task=inpaint_file", "task.file=mask.npy"], "the mask mask.npy is (16, 16), the image (32, 32)"),
        (["sampler=c_pigdm", "sampler.weight=1e6"], "w = 1e+06 damps the residual by e^"),
        (["sampler=c_pigdm", "sampler.grid.start=1.5"], "need 1 >= start > end >= 0, got start 1.5"),
        (["task=jpeg", "sampler=ddrm"], "DDRM needs singular values, and JPEG is not linear"),
        (
            ["task=jpeg", "sampler=dps"],
            "the gradient of JPEG is 0 everywhere: DPS learns nothing of it; use sampler=pigdm",
        ),
        (["task=jpeg", "task.sigma_y=0.1"], "JPEG is not linear, and this method knows it without noise alone"),
        (["sampler=ddim"], "DDIM draws samples and reads no measurement; use it with steadyflow sample"),
        (["sampler=ot_od"], "no option 'ot_od' in the group sampler. Did you mean ot_ode"),
        (["sampler.t0=1.5"], "need 1 >= start > end >= 0, got start 1.5"),
        (["sampler.weight=-1"], "the guidance weight must be positive, got -1"),
        (["num_images=201"], "digits test has 200 images, too few for 0 to 200; set num_images, first"),
        (["label=11"], "class 11, but this checkpoint's classes are 0..9"),
        (["dataset.size=16"], "makes samples of shape (1, 32, 32), but dataset digits test has (1, 16, 16)"),
        (["dataset=gaussian_mixture"], "gaussian_mixture test holds vectors (2,); images are needed"),
        (["input=nowhere.png"], "nowhere.png does not exist"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, overrides, message):
    monkeypatch.chdir(tmp_path)
    np.save("mask.npy", np.ones((16, 16)))
    said = mistake(capsys, tmp_path / "run", *overrides)
    assert message in said, said


def test_a_restorer_samples_nothing(tmp_path, capsys):
    said = mistake(capsys, tmp_path, "sampler=ot_ode", job="sample")
    assert said.startswith("GuidedSampler restores images from measurements; use it with steadyflow restore")
