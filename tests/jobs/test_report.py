"""`steadyflow report`: what it gathers, marks and draws, and what it says about folders it cannot read."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from steadyflow import cli
from steadyflow.jobs import record


def fid(sampler: str, steps: int, seed: int) -> float:
    return {"ddim": 10.0, "ddpm": 40.0, "heun": 5.0}[sampler] * 10 / steps + 0.25 * seed


def leave(directory: Path, overrides: list[str], metrics: dict[str, object] | None, **extra: object) -> None:
    """What a run leaves."""
    (directory / ".hydra").mkdir(parents=True)
    (directory / ".hydra" / "overrides.yaml").write_text("".join(f"- {word}\n" for word in overrides))
    values = dict(word.split("=") for word in overrides)
    sampler = {"_target_": values.get("sampler", "ddim").upper(), "steps": int(values.get("sampler.steps", 20))}
    config = {
        "seed": int(values.get("seed", 0)),
        "sampler": sampler,
        "num_samples": 8,
        "trainer": {"devices": 1},
        **extra,
    }
    text = {"format": record.FORMAT, "composed": config, "config": config, "overrides": overrides}
    (directory / "run.json").write_text(json.dumps(text))
    if metrics is not None:
        (directory / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A 3 x 3 x 2 multirun whose numbers are known."""
    monkeypatch.chdir(tmp_path)
    n = 0
    for sampler in ("ddim", "ddpm", "heun"):
        for steps in (10, 20, 50):
            for seed in (0, 1):
                words = [f"sampler={sampler}", f"sampler.steps={steps}", f"seed={seed}", "num_samples=8", "logger=none"]
                found = {"fid": fid(sampler, steps, seed), "fid_std": 0.1, "accuracy": steps / 50, "nfe": float(steps)}
                leave(
                    tmp_path / "sweep" / str(n),
                    words,
                    found | {"lpips": None, "protocol": {}, "reason": {"lpips": "-"}},
                )
                n += 1
    return tmp_path / "sweep"


def report(*argv: str) -> int:
    return cli.main(["report", *argv, "hydra.run.dir=out"])


def mistake(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert report(*argv) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    return said[0].removeprefix("steadyflow report: error: ")


def test_a_line_a_run_with_the_swept_parameters(sweep: Path) -> None:
    assert report("dir=sweep") == 0
    with Path("out/report.csv").open() as file:
        lines = list(csv.DictReader(file))
    parameters = ["sampler", "sampler.steps", "seed"]  # num_samples is the same in all
    assert list(lines[0]) == ["run", *parameters, "fid", "accuracy", "nfe", "fid_std", "best_in"]
    assert [line["run"] for line in lines] == [str(n) for n in range(18)]  # 10 after 9
    for line in lines:
        assert float(line["fid"]) == fid(line["sampler"], int(line["sampler.steps"]), int(line["seed"]))
    assert [line["run"] for line in lines if "fid" in line["best_in"]] == ["16"]  # heun, 50 steps, seed 0: 1.0
    page = Path("out/report.md").read_text()
    assert "| 16 | heun | 50 | 0 | **1.00 ± 0.10** | 1 | 50 |" in page
    assert page.count("**") == 4  # the best fid and the first of the best accuracies
    assert page.startswith("# 18 runs below sweep\n")


def test_pivot_with_its_heat_map(sweep: Path) -> None:
    assert report("dir=sweep", "metric=fid", "rows=sampler.steps", "columns=sampler") == 0
    lines = Path("out/pivot_fid.md").read_text().splitlines()
    assert lines[0] == "| fid: sampler.steps \\ sampler | ddim | ddpm | heun |"
    assert lines[2] == "| 10 | 10.12 ± 0.18 | 40.12 ± 0.18 | 5.12 ± 0.18 |"  # over seeds 0 and 1: 10 and 10.25
    assert lines[4].endswith("| **1.12 ± 0.18** |")
    picture = np.asarray(Image.open("out/heat_fid.png").convert("RGB")).astype(int)
    assert 400 < picture.shape[1] < 1200
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 100  # a colour a cell, and the bar
    assert not Path("out/pivot_accuracy.md").exists()


def test_lines(sweep: Path) -> None:
    assert report("dir=sweep", "metric=[fid,accuracy]", "x=sampler.steps", "lines=sampler") == 0
    assert {file.name for file in Path("out").glob("*.png")} == {"lines_fid.png", "lines_accuracy.png"}
    picture = np.asarray(Image.open("out/lines_fid.png").convert("RGB")).astype(int)
    colours = [(31, 119, 180), (255, 127, 14), (44, 160, 44)]  # matplotlib's first three: a line a sampler
    for colour in colours:
        assert (np.abs(picture - colour).sum(2) < 30).sum() > 200


def test_against_a_metric_and_by_two_parameters(sweep: Path) -> None:
    over = ["rows=nfe", "columns=[sampler,seed]", "x=nfe", "lines=[sampler,seed]"]
    assert report("dir=sweep", *over) == 0
    lines = Path("out/pivot_fid.md").read_text().splitlines()
    assert lines[0] == "| fid: nfe \\ sampler,seed | ddim 0 | ddim 1 | ddpm 0 | ddpm 1 | heun 0 | heun 1 |"
    assert lines[3] == "| 20.0 | 5 | 5.25 | 20 | 20.25 | 2.5 | 2.75 |"
    assert {file.name for file in Path("out").glob("lines_*.png")} == {"lines_fid.png", "lines_accuracy.png"}


def test_a_sweep_that_still_runs_and_runs_of_several_folders(sweep: Path) -> None:
    leave(sweep / "18", ["sampler=ddim", "sampler.steps=100", "seed=0"], None)
    leave(sweep / "single" / "run", [], {"fid": 3.0})  # 20 steps by default, no override
    assert report("dir=sweep", "metric=fid") == 0
    page = Path("out/report.md").read_text()
    assert page.startswith("# 19 runs below sweep; 1 more are not finished\n")
    assert "| single/run | None | 20 | 0 | 3 |" in page  # what was not overridden is the config's


def test_runs_that_differ_without_an_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for n in (1, 2):
        leave(tmp_path / "runs" / str(n), ["seed=3"], {"fid": float(n)}, lr=0.1 * n)
    assert report("dir=runs") == 0
    assert Path("out/report.csv").read_text().splitlines()[0] == "run,lr,fid,best_in"


@pytest.mark.slow
def test_the_same_table_in_tensorboard(sweep: Path) -> None:
    assert report("dir=sweep", "metric=fid", "rows=sampler", "columns=sampler.steps", "logger=tensorboard") == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path("out/tensorboard")))
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["heat_fid"]
    (text,) = events.Tensors("report/text_summary")
    assert "**1.12 ± 0.18**" in text.tensor_proto.string_val[0].decode()


def test_mistakes(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert mistake(capsys, "dir=sweep", "metric=fit") == (
        "metric=fit: no run below sweep has it. Did you mean fid? There are fid, accuracy, nfe"
    )
    assert mistake(capsys, "dir=sweep", "rows=sampler.step") == (
        "rows=sampler.step: no run has such a parameter. Did you mean sampler.steps or sampler? "
        "The runs differ in sampler, sampler.steps, seed"
    )
    assert mistake(capsys, "dir=nowhere").startswith("dir=nowhere: no such folder")
    Path("empty").mkdir()
    assert mistake(capsys, "dir=empty").startswith("dir=empty: no run below it")
    leave(Path("begun/run"), [], None)
    assert mistake(capsys, "dir=begun").startswith("dir=begun: 1 runs are begun below it, none is finished yet")
    assert "Missing mandatory value: dir" in mistake(capsys)


@pytest.mark.parametrize("change", [{"format": 0}, {"format": None}, "absent"])
def test_a_run_of_an_older_version(sweep: Path, capsys: pytest.CaptureFixture[str], change: object) -> None:
    file = sweep / "7" / "run.json"
    if change == "absent":
        file.unlink()
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))  # type: ignore[operator]
    said = mistake(capsys, "dir=sweep")
    assert said.startswith("sweep/7 holds a run of an incompatible version (")
    assert f"this one reads format {record.FORMAT}): run it again" in said
