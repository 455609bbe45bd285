"""`steadyflow table`: what it runs, what it keeps, what it says, with a job that only writes numbers."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import steadyflow.jobs
from steadyflow import cli
from steadyflow.jobs import cell_runs
from steadyflow.tables.cells import read

PROBE = """
import json
from pathlib import Path
from hydra.core.hydra_config import HydraConfig
from steadyflow.jobs import record
from steadyflow.mistakes import Mistake

def run(cfg):
    directory = Path(HydraConfig.get().runtime.output_dir)
    record.claim(directory, cfg, ignore=("batch_size",))
    with open("ran.txt", "a") as file:
        file.write(f"{cfg.steps} {cfg.seed} {cfg.batch_size}\\n")
    if cfg.steps == 13:
        raise Mistake("13 steps bring bad luck")
    if cfg.steps == 14:
        raise KeyError("a bug")
    metrics = {"fid": cfg.steps + 0.5 * cfg.seed, "nfe": cfg.steps, "kid": None, "reason": {"kid": "no weights"}}
    record.write_text(directory / "metrics.json", json.dumps(metrics))
    return metrics
"""
CONFIG = """
defaults: [common, _self_]
steps: 1
batch_size: 1
num_samples: 2
trainer: {precision: 32-true, devices: 1}
"""
TABLE = """
title: A table
source: {work: "000", table: "9.9"}
job: probe
set: "batch_size=4"
seeds: [0, 1]
scale: {mini: "num_samples=1"}
columns:
  FID: {metric: fid, set: "num_samples=2"}
  x2: {metric: fid, set: "steps=0 num_samples=2", factor: 2}
rows:
  two: {set: "steps=2"}
  three: {set: "steps=3", scale: {mini: "steps=5"}}
  never: {set: "steps=4", needs: time_machine}
published:
  two: [2.0, "<= 9"]
  three: ["4.0 +- 0.1", none]
  never: [1.5, null]
"""


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job `probe` and a table of it, outside the package, in an empty working directory."""
    files = {"jobs/probe.py": PROBE, "conf/probe.yaml": CONFIG, "conf/table/mine.yaml": TABLE}
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    monkeypatch.setattr(steadyflow.jobs, "__path__", [*steadyflow.jobs.__path__, str(tmp_path / "jobs")])
    monkeypatch.setitem(cli.JOBS, "probe", "a test")
    monkeypatch.delitem(sys.modules, "steadyflow.jobs.probe", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(*argv: str) -> int:
    return cli.main(["table", "--config-dir", "conf", "table=mine", *argv])


def ran() -> list[str]:
    file = Path("ran.txt")
    return file.read_text().splitlines() if file.exists() else []


def rows(scale: str = "full") -> dict[tuple[str, str], dict[str, str]]:
    with Path(f"outputs/table/mine/{scale}/table.csv").open() as file:
        return {(line["row"], line["column"]): line for line in csv.DictReader(file)}


def mistake(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert cli.main(["table", "--config-dir", "conf", *argv]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, said
    return said[0].removeprefix("steadyflow table: error: ")


def test_runs_what_is_missing_and_compares(probe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table("scale=full") == 0
    assert ran() == ["2 0 4", "2 1 4", "3 0 4", "3 1 4"]  # columns of one row share a run, in any order of words
    found = rows()
    assert len(found) == 5  # `none` is no cell
    two = found["two", "FID"]
    assert (float(two["ours"]), float(two["published"]), float(two["difference"])) == (2.25, 2.0, 0.25)
    assert float(two["spread"]) == pytest.approx(0.5 / 2**0.5)  # of seeds 0 and 1: 2 and 2.5
    assert (two["seeds"], two["stale"], two["metric"]) == ("2", "False", "fid")
    doubled = found["two", "x2"]
    assert (float(doubled["ours"]), doubled["bound"], doubled["difference"]) == (4.5, "<=", "")
    assert (found["three", "FID"]["published_spread"], float(found["three", "FID"]["difference"])) == ("0.1", -0.75)
    assert found["never", "FID"]["state"] == "needs"
    assert found["never", "FID"]["note"] == "needs time_machine: not in this version"
    page = Path("outputs/table/mine/full/table.md").read_text()
    assert "| two | 2.25 ± 0.35 (2.0, +0.25) | 4.50 ± 0.71 (≤ 9) |" in page
    assert "| three | 3.25 ± 0.35 (4.0 ± 0.1, -0.75) |  |" in page
    assert "| never | –[1] (1.5) | –[1] |" in page
    assert "[1] needs time_machine: not in this version" in page
    assert "Pokle 2025, Table 9.9." in page
    tex = Path("outputs/table/mine/full/table.tex").read_text()
    assert r"two & $2.25 \pm 0.35$ ($2.0$, $+0.25$) & $4.50 \pm 0.71$ ($\le 9$) \\" in tex
    with Image.open("outputs/table/mine/full/table.png") as picture:
        width, height = picture.size
    assert 500 < width < 1500
    assert 200 < height < 900
    said = capsys.readouterr().out
    assert said.index("needs time_machine") < said.index("0 of 4 runs stand; 4 to run")

    assert table("scale=full") == 0  # nothing is left to run
    assert len(ran()) == 4
    assert rows() == found
    assert "to run" not in capsys.readouterr().out


def test_a_column_s_own_job_and_numbers_relative_to_a_row(
    probe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("jobs/other.py").write_text(PROBE.replace("0.5 * cfg.seed", "100"))
    Path("conf/other.yaml").write_text(CONFIG)
    monkeypatch.setitem(cli.JOBS, "other", "a test")
    monkeypatch.delitem(sys.modules, "steadyflow.jobs.other", raising=False)
    text = TABLE.replace("seeds: [0, 1]", "seeds: [0]").replace("factor: 2}", "job: other}")
    Path("conf/table/mine.yaml").write_text(text)
    assert table("scale=full") == 0
    found = rows()
    assert [float(found["two", column]["ours"]) for column in ("FID", "x2")] == [2, 102]
    Path("conf/table/mine.yaml").write_text(f"{text}relative_to: two\n")
    assert table("scale=full") == 0
    assert len(ran()) == 3  # in all
    found = rows()
    assert [float(found[row, "FID"]["ours"]) for row in ("two", "three")] == [1, 1.5]
    Path("conf/table/mine.yaml").write_text(f"{text}relative_to: never\n")
    assert table("scale=full") == 0
    assert (rows()["two", "FID"]["state"], rows()["two", "FID"]["note"]) == ("absent", "no number to divide by")
    Path("conf/table/mine.yaml").write_text(f"{text}relative_to: three\n")  # which has one cell
    assert table("scale=full") == 0
    assert (float(rows()["two", "FID"]["ours"]), rows()["two", "x2"]["state"]) == (pytest.approx(2 / 3), "absent")
    Path("conf/table/mine.yaml").write_text(f"{text}relative_to: one\n")
    assert "relative_to says one, and no row is called so" in mistake(capsys, "table=mine")


def test_what_a_table_is_made_from_is_run_first(
    probe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []
    others = subprocess.run

    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        if command[1] != "-m":  # git
            return others(command, **kwargs)
        assert ran() == []  # before the cells
        commands.append(command[2:])
        Path("made/net").mkdir(parents=True)
        (Path("made/net/metrics.json") if good else Path("made/net/error")).write_text("{}")
        return subprocess.CompletedProcess(command, 0 if good else 2)

    monkeypatch.setattr(subprocess, "run", run)
    Path("conf/table/mine.yaml").write_text(TABLE + "first: {made/net: train +experiment=some}\n")
    good, words = False, ["steadyflow", "train", "+experiment=some", "hydra.run.dir=made/net"]
    assert table("scale=full", "seeds=[0]") == 1
    assert "the table is made from made/net, and 'steadyflow train +experiment=some" in capsys.readouterr().err
    Path("made/net/error").unlink()
    Path("made/net").rmdir()
    good = True
    for _ in range(2):  # once is enough
        assert table("scale=full", "seeds=[0]") == 0
    assert commands == [words, words]
    content = yaml.safe_load(Path("conf/table/mine.yaml").read_text())
    content["scale"]["mini"] = {"set": "num_samples=1", "first": {"made/small": "train max_steps=1"}}
    assert read("mine", content, "mini").first == {"made/small": "train max_steps=1"}  # a scale's own in their place
    assert read("mine", content, "full").first == {"made/net": "train +experiment=some"}


def test_what_a_result_is_made_by(probe: Path) -> None:
    assert table("scale=full", "seeds=[0]") == 0
    assert ran() == ["2 0 4", "3 0 4"]
    same = ["trainer.devices=2", "data_dir=elsewhere", "objective=fid"]
    for word in same:
        assert table("scale=full", "seeds=[0]", f"set='{word}'") == 0
    assert len(ran()) == 2
    for word in ("num_samples=3", "trainer.precision=bf16", "batch_size=5"):  # this table sets its batch size itself
        before = len(ran())
        assert table("scale=full", "seeds=[0]", f"set='{word}'") == 0
        assert len(ran()) == before + 2, word
    text = Path("conf/table/mine.yaml").read_text()
    Path("conf/table/mine.yaml").write_text(text.replace("batch_size=4", ""))
    before = len(ran())
    for word in ("batch_size=1", "batch_size=7"):  # and here it does not
        assert table("scale=full", "seeds=[0]", f"set='{word}'") == 0
    assert len(ran()) == before + 2


def test_scales(probe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table() == 0  # mini where there is one
    assert {line["difference"] for line in rows("mini").values()} == {""}
    assert "no difference is given" in Path("outputs/table/mine/mini/table.md").read_text()
    assert not Path("outputs/table/mine/full").exists()
    assert {line.split()[0] for line in ran()} == {"2", "5"}  # a row may have a scale of its own
    assert "table mine has no scale 'huge'; it has full, mini" in mistake(capsys, "table=mine", "scale=huge")


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_failed_cell_is_told_and_the_table_stands(
    probe: Path, capsys: pytest.CaptureFixture[str], launcher: str
) -> None:
    if launcher == "joblib" and not find_spec("hydra_plugins.hydra_joblib_launcher"):
        pytest.skip("hydra-joblib-launcher is not installed")
    text = TABLE.replace("steps=2", "steps=13").replace("steps=4", "steps=14").replace(", needs: time_machine", "")
    Path("conf/table/mine.yaml").write_text(text)
    backend = ["hydra.launcher.backend=threading", "hydra.launcher.n_jobs=1"] if launcher == "joblib" else []
    assert table("scale=full", "seeds=[0]", f"hydra/launcher={launcher}", *backend) == 1
    err = capsys.readouterr().err
    assert "steadyflow table: 4 of 5 cells failed; their errors stand in " in err
    assert "Traceback" not in err
    found = rows()
    assert (found["two", "FID"]["state"], found["two", "FID"]["note"]) == ("failed", "13 steps bring bad luck")
    assert found["never", "FID"]["note"] == "KeyError: 'a bug'"
    assert float(found["three", "FID"]["ours"]) == 3
    assert "| two | failed[1] (2.0) |" in Path("outputs/table/mine/full/table.md").read_text()
    (kept,) = [file for file in Path("outputs/table/cells/probe").glob("*/error.txt") if "a bug" in file.read_text()]
    assert 'raise KeyError("a bug")' in kept.read_text()  # the traceback is not lost


def test_a_key_that_reads_as_a_number_is_a_name(probe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = cell_runs.digest
    monkeypatch.setattr(cell_runs, "digest", lambda *a, **k: f"{int(whole(*a, **k)[:8], 16)}e400")
    assert table("scale=full") == 0
    assert float(rows()["two", "FID"]["ours"]) == 2.25


def test_a_number_that_the_run_does_not_have(probe: Path) -> None:
    text = TABLE.replace('metric: fid, set: "steps=0 num_samples=2", factor: 2', 'metric: kid, set: "steps=0"').replace(
        "metric: fid", "metric: psnr"
    )
    Path("conf/table/mine.yaml").write_text(text)
    assert table("scale=full", "seeds=[0]") == 0
    assert rows()["two", "FID"]["note"] == "the run has no psnr; it has fid, nfe"
    assert rows()["two", "x2"]["note"] == "kid: no weights"


def test_older_cells_are_marked_and_run_again_with_force(probe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table("scale=full", "seeds=[0]") == 0
    (file,) = [
        f
        for f in Path("outputs/table/cells/probe").glob("*/run.json")
        if json.loads(f.read_text())["config"]["steps"] == 2
    ]
    record = json.loads(file.read_text())
    record["starts"][-1] |= {"git": {"revision": "0" * 40, "modified": False}}
    file.write_text(json.dumps(record))
    assert table("scale=full", "seeds=[0]") == 0
    assert {at: line["stale"] for at, line in rows().items() if line["stale"] == "True"}.keys() == {
        ("two", "FID"),
        ("two", "x2"),
    }
    page = Path("outputs/table/mine/full/table.md").read_text()
    assert "| two | 2† (2.0, +0) |" in page
    assert "force=true runs it again" in page
    assert len(ran()) == 2
    assert table("scale=full", "seeds=[0]", "force=true") == 0
    assert ran()[2:] == ["2 0 4"]
    assert "†" not in Path("outputs/table/mine/full/table.md").read_text()


def test_dry_run_times_the_first_cell(probe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert table("scale=full", "dry=true") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert ran() == ["2 0 4"]
    assert "3 of 4 runs are missing: about " in said
    assert not Path("outputs/table/mine/full").exists()
    assert table("scale=full", "dry=true") == 0  # the time is known now
    assert len(ran()) == 1
    assert table("scale=full") == 0
    assert ran()[1:] == ["2 1 4", "3 0 4", "3 1 4"]
    capsys.readouterr()
    assert table("scale=full", "dry=true") == 0
    assert "0 of 4 runs are missing: nothing; cells that cannot be run, see above: 2" in " ".join(
        capsys.readouterr().out.split()
    )


def test_missing_files_are_listed_before_anything_runs(probe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("conf/table/real.yaml").write_text(
        """
title: Real
job: sample
columns: {FID: {metric: fid, set: ""}}
rows:
  a: {set: "dataset=celebs checkpoint=net", needs: [celebs, net]}
  b: {set: "dataset=mnist checkpoint=analytic"}
published: {a: [1], b: [2]}
"""
    )
    assert cli.main(["table", "--config-dir", "conf", "table=real", "data_dir=nowhere"]) == 0
    said = capsys.readouterr().out
    assert "missing dataset celebs: describe it in DIR/dataset/celebs.yaml" in said
    assert (
        f"checkpoint net: put its directory (model.safetensors, config.yaml) at {probe / 'checkpoints' / 'net'}" in said
    )
    assert "missing dataset: " in said
    assert "nowhere" in said
    page = Path("outputs/table/real/full/table.md").read_text()
    assert "| a | –[1] (1) |" in page
    assert not Path("outputs/table/cells").exists()


def test_mistakes(probe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = mistake(capsys, "table=ddim_digit")
    assert said.startswith("no option 'ddim_digit' in the group table. Did you mean ddim_digits")
    assert "Options" not in said  # 70 names
    for change, line in [
        (('metric: fid, set: "num_samples=2"', 'set: "num_samples=2"'), "table mine, column FID: no metric"),
        (("metric: fid", "metrik: fid"), "table mine, columns, FID: found metrik, expected the keys columns, factor,"),
        (
            ('two: {set: "steps=2"}', "two: steps=2"),
            "table mine, rows, two: found 'steps=2', expected the keys needs, r",
        ),
        (
            ('two: {set: "steps=2"}', "two: {rows: }"),
            "table mine, rows of two: expected {LABEL: {set: key=value}, ...}",
        ),
        (('two: {set: "steps=2"}', 'two: {set: "steps=2", rows: {a: {}}}'), "table mine: the rows of `published` must"),
        (("[2.0, ", "["), "table mine, row two: 1 published values for 2 columns"),
        (("2.0", "about 2"), "published value 'about 2': expected a number, null"),
        (("steps=2", "steps"), "'steps' in 'steps' is no override"),
        (("title:", "titel:"), "table mine: titel, no title; a table has the keys"),
        (("job: probe", "job: dance"), None),
    ]:
        Path("conf/table/mine.yaml").write_text(TABLE.replace(*change))
        if line is None:
            assert table("scale=full") == 0
            assert rows()["two", "FID"]["note"] == "needs dance: not in this version"
        else:
            assert line in mistake(capsys, "table=mine")


def test_groups_are_their_rows_written_out() -> None:
    """A group's words, needs, factor and scale hold for its rows, whose own win; anchors and merges are YAML's."""
    head = "title: A table\njob: probe\nscale: {mini: b=0}\n"
    grouped = """
columns:
  noisy: {set: noise=1, factor: 2, columns: &scores {FID: {metric: fid}, KID: {metric: kid, factor: 3}}}
  clean: {set: noise=0, columns: *scores}
rows:
  one:
    set: task=one a=1
    needs: one
    scale: {mini: c=1}
    rows: &steps
      few: {set: steps=2, where: {noisy: d=1}}
      many: {set: steps=9 a=2, needs: [nine], scale: {mini: steps=3}}
  two: {set: task=two, rows: {<<: *steps, many: {set: steps=8}, "third, last": {}}}
"""
    flat = """
columns:
  "noisy, FID": {metric: fid, set: noise=1, factor: 2}
  "noisy, KID": {metric: kid, set: noise=1, factor: 3}
  "clean, FID": {metric: fid, set: noise=0}
  "clean, KID": {metric: kid, set: noise=0, factor: 3}
rows:
  "one, few": {set: task=one a=1 steps=2, needs: one, scale: {mini: c=1}, where: {noisy: d=1}}
  "one, many": {set: task=one a=2 steps=9, needs: [one, nine], scale: {mini: c=1 steps=3}}
  "two, few": {set: task=two steps=2, where: {noisy: d=1}}
  "two, many": {set: task=two steps=8}
  "two, third, last": {set: task=two}
"""
    for scale in ("mini", "full"):
        tables = [read("mine", yaml.safe_load(head + text), scale) for text in (grouped, flat)]
        assert tables[0].cells == tables[1].cells
        assert [c.overrides for c in tables[0].cells] == [c.overrides for c in tables[1].cells]
    assert tables[0].rows["two, third, last"] == ("two", "third, last")
    twice = grouped.replace('"third, last": {}', '"third, last": {}, third: {rows: {last: {}}}')
    with pytest.raises(ValueError, match="table mine, rows of two, third: two, third, last is there twice"):
        read("mine", yaml.safe_load(head + twice))


def test_lists_all_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    begin = time.process_time()
    assert cli.main(["table"]) == 0
    assert time.process_time() - begin < 5
    said = capsys.readouterr().out
    lines = {words[1]: words for line in said.splitlines() if len(words := [w.strip() for w in line.split("│")]) > 5}
    lines.pop("", None)  # second lines of long titles
    assert (
        len(lines) == len([*(Path(__file__).parents[2] / "configs" / "table").glob("*.yaml")]) - 1
    )  # all.yaml is none
    assert lines["ddim_digits"][4:6] == ["36", "36"]
    assert lines["deis_6_2"][2:6] == ["Zhang 2023, Table 6.2", "DEIS on CIFAR-10 with few network calls", "50", "50"]
    assert lines["diffcollage_4_3"][5] == "0"
    assert "Tables 4.4, 4.7, 4.8, 7.3" in said


KILLED = """
title: A tiny table
job: sample
set: "dataset=gaussian_mixture checkpoint=analytic num_samples=4 callbacks=none logger=none"
columns: {NFE: {metric: nfe, set: ""}}
rows:
  "2": {set: "sampler.steps=2"}
  "3": {set: "sampler.steps=3"}
  "4": {set: "sampler.steps=4"}
  "5": {set: "sampler.steps=5"}
  "6": {set: "sampler.steps=6"}
published: {"2": [2], "3": [3], "4": [4], "5": [5], "6": [6]}
"""


@pytest.mark.slow
def test_killed_after_the_third_cell_it_runs_only_the_rest(tmp_path: Path) -> None:
    (tmp_path / "conf/table").mkdir(parents=True)
    (tmp_path / "conf/table/killed.yaml").write_text(KILLED)
    store = tmp_path / "outputs/table/cells/sample"
    command = [sys.executable, "-m", "steadyflow", "table", "--config-dir", "conf", "table=killed"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while len(done := list(store.glob("*/metrics.json"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = list(store.glob("*/metrics.json"))
    assert 3 <= len(done) < 5
    before = {file: file.stat().st_mtime_ns for file in done}
    assert not (tmp_path / "outputs/table/killed/full").exists()

    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"{len(done)} of 5 runs stand; {5 - len(done)} to run" in again.stdout
    assert len(list(store.glob("*/metrics.json"))) == 5
    assert {file: file.stat().st_mtime_ns for file in done} == before
    assert all(len(json.loads((file.parent / "run.json").read_text())["starts"]) == 1 for file in done)
    page = (tmp_path / "outputs/table/killed/full/table.md").read_text()
    assert all(f"| {n} | {n} ({n}, +0) |" in page for n in range(2, 7))
