"""The published tables: all there, every cell with its value, and composed where their methods exist."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import steadyflow.jobs.record  # noqa: F401 - the resolver of hydra.run.dir
from steadyflow.jobs.table import config_options, obstacle
from steadyflow.tables.cells import Cell, Table, files_needed, read

CONFIGS = Path(__file__).parents[1] / "configs"
RESULTS = {  # what the three works print as results, by table; and how many cells with a number or a bound
    "000": [*(f"3.{i}" for i in range(1, 5)), "3.12", "4.1", "4.2", "4.3", "4.5", "4.6"]
    + [*(f"5.{i}" for i in range(1, 31)), *(f"6.{i}" for i in range(1, 8)), "7.1", "7.2"],
    "001": "3.1 3.2 3.3 3.4 3.5 4.1 4.2 4.3 5.1 5.2 5.3 6.2 7.1 7.2 7.3".split(),
    "002": "1 2 3 4".split(),
}
# what the metrics.json of each job holds besides the metrics chosen
MADE = {
    "sample": {"nfe", "seconds_per_image", "parameters"},
    "restore": {"nfe", "seconds_per_image", "consistency"},
    "invert": {"loss", "minutes_per_image", "epochs", "nfe", "psnr"},
    "evaluate": {"nll"},
}
# public checkpoints and datasets, each of which composes by itself in test_configs.py
PUBLIC = "|".join(f.stem for f in (CONFIGS / "checkpoint").glob("*.yaml") if "checkpoints.public" in f.read_text())
# a few values of each work, looked up in it by hand
LOOKED_UP = [
    ("deq_ddim_3_1", "LSUN Church T=25", "DEQ-DDIM FID", 13.55),
    ("get_4_1", "GET-Base (2xBS)", "FID", 6.91),
    ("fno_deq_6_1", "S-FNO-DEQ (0.33 block)", "Noisy observations 0.001", 0.0136),
    ("deis_6_2", "NFE 10", "tAB3", 4.17),
    ("gddim_7_1", "K = R", "NFE 50", 2.26),
    ("pis_5_1", "PIS_RW-Grad", "LGCP, B", -1.94),
    ("c_pigdm_1", "ImageNet Blur, NFE 5, C-PiGDM", "KID", 3.89),
    ("c_pigdm_4", "Blur, NFE 1000, DPS", "FID", 142.26),
]


@cache
def config(name: str) -> dict[str, object]:
    return dict(yaml.safe_load((CONFIGS / "table" / f"{name}.yaml").read_text()))


NAMES = sorted(file.stem for file in (CONFIGS / "table").glob("*.yaml") if file.stem != "all")
PUBLISHED = [name for name in NAMES if isinstance(config(name)["source"], dict)]


@cache
def table(name: str, scale: str | None = None) -> Table:
    return read(name, config(name), scale)


def test_every_table_of_results_is_there() -> None:
    there: dict[str, list[str]] = {}
    for name in PUBLISHED:
        source = config(name)["source"]
        assert isinstance(source, dict)
        number = source.get("table") or source["figure"]
        there.setdefault(source["work"], []).append(number)
        assert name.endswith("_" + number.replace(".", "_")), name
    assert {work: sorted(numbers) for work, numbers in there.items()} == {w: sorted(n) for w, n in RESULTS.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_cell_has_a_value_or_an_explicit_null(name: str) -> None:
    published, columns = config(name)["published"], table(name).columns
    assert isinstance(published, dict)
    assert list(published) == list(table(name).rows)
    values = [value for row in published.values() for value in row]
    assert all(len(row) == len(columns) for row in published.values())
    assert all(value is None or isinstance(value, int | float | str) for value in values)
    cells = table(name).cells  # `read` refuses any text that is no number, spread or bound
    assert len(cells) == len(values) - values.count("none")
    assert sum(cell.published.value is not None for cell in cells) > len(cells) / 2


def test_the_number_of_published_values() -> None:
    values = [cell.published for name in PUBLISHED for cell in table(name).cells]
    assert len(values) == 2859
    assert sum(value.value is not None for value in values) == 2793


@pytest.mark.parametrize(("name", "row", "column", "value"), LOOKED_UP)
def test_values_looked_up_by_hand(name: str, row: str, column: str, value: float) -> None:
    (cell,) = [cell for cell in table(name).cells if (cell.row, cell.column) == (row, column)]
    assert cell.published.value == value


def test_red_diff_s_lambda_is_that_of_its_values_in_the_search() -> None:
    """Tables 5.1-5.12 print the best of 5.25-5.30; four of their values are of rows that our text of those lacks."""
    searches = {
        (c.overrides["dataset"], c.overrides["task.sigma_y"]): n
        for n in NAMES
        if "red_diff_5" in n
        for c in table(n).cells
    }
    differ = []
    for name in (f"ot_ode_5_{i}" for i in range(1, 13)):
        for cell in table(name).cells:
            o = cell.overrides
            if cell.row == "VP-SDE RED-Diff" and cell.metric == "fid":
                search = table(searches[o["dataset"], o["task.sigma_y"]])
                (found,) = [
                    c for c in search.cells if c.column == cell.column and c.row == f"lambda={o['sampler.weight']}"
                ]
                assert (found.overrides["sampler.lr"], found.overrides["task"]) == (o["sampler.lr"], o["task"])
                if found.published.value != pytest.approx(cell.published.value, abs=0.011):
                    differ.append((name, cell.column))
    assert differ == [
        ("ot_ode_5_2", "Denoise, FID"),
        ("ot_ode_5_4", "Inpaint center, FID"),
        ("ot_ode_5_4", "Denoise, FID"),
        ("ot_ode_5_6", "Inpaint center, FID"),
    ]


@pytest.mark.parametrize("name", ["imagenet64", "imagenet128", "afhq"])
def test_red_diff_s_experiments_have_the_lambdas_of_the_tables(name: str) -> None:
    lambdas = yaml.safe_load((CONFIGS / "experiment" / f"restore_red_diff_{name}.yaml").read_text())["lambdas"]
    found: dict[str, dict[str, float]] = {}
    for cell in (c for i in range(1, 13) for c in table(f"ot_ode_5_{i}").cells):
        o = cell.overrides
        if cell.row == "VP-SDE RED-Diff" and cell.metric == "fid" and o["dataset"].startswith(name):
            noise = "none" if float(o["task.sigma_y"]) == 0 else "some"
            found.setdefault(noise, {})[o["task"]] = float(o["sampler.weight"])
    assert {k: dict(v) for k, v in found.items()} == {
        k: {task: v for task, v in of.items() if task in found[k]} for k, of in lambdas.items()
    }
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        words = [f"+experiment=restore_red_diff_{name}", "task=blur", "noise=none"]
        composed = compose("restore", words, return_hydra_config=True)
    HydraConfig.instance().set_config(composed)
    assert (composed.sampler.weight, composed.task.sigma_y) == (lambdas["none"]["blur"], 0)


def composable() -> Iterator[tuple[Table, Cell]]:
    """The cells whose methods exist, at every scale of their table, whether or not their files are there."""
    options = config_options([CONFIGS])
    for name in NAMES:
        for scale in {"full", *(config(name).get("scale") or {})}:  # type: ignore[misc]
            whole = table(name, scale)
            for cell in whole.cells:
                found = obstacle(cell, options, Path("/nowhere"))
                if found is None or found.state == "missing":
                    yield whole, cell


def test_overrides_compose_and_make_the_metric() -> None:
    """A checkpoint that is a file stands for its name; a dataset without a config is left out."""
    options, wanted = config_options([CONFIGS]), {}
    for whole, cell in composable():
        words = dict(cell.overrides)
        for key, name in files_needed(cell):
            if name not in options[key]:
                words.pop(key)
        line = (cell.job, *(f"{k}={v}" for k, v in words.items()))
        wanted.setdefault(line, {})[cell.metric] = (whole.name, cell.row, cell.column)
    composed: dict[tuple[str, ...], DictConfig] = {}  # by job and words of a group; numbers, sets of files: once
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for line, metrics in wanted.items():
            parts = {"callbacks": line[:1]}
            for word in line[1:]:
                group = re.split(r"[./=]", word.split("@")[-1])[0]  # path@sampler.path=ot is the sampler's
                word = re.sub(rf"=([-+.e\d]+|{PUBLIC})$|^dataset=\w+$", "=0", word)
                parts[group] = (*parts.get(group, line[:1]), word)
            if new := [words for words in parts.values() if words not in composed]:
                composed |= dict.fromkeys(new, compose(line[0], list(line[1:])))
            callbacks = composed[parts["callbacks"]].get("callbacks", {})
            made = MADE[line[0]] | set(callbacks.get("evaluation", {}).get("metrics", {}))
            assert metrics.keys() <= made, (line, metrics)
    assert len(wanted) > 40


def test_needs_say_what_the_overrides_name() -> None:
    """Every option that is not in this version is among the needs of its cell: it says so instead of failing."""
    options = config_options([CONFIGS])
    for name in PUBLISHED:
        for cell in table(name, "full").cells:
            for key, value in cell.overrides.items():
                if key in options and re.fullmatch(r"[a-z_0-9]+", value) and value not in options[key]:
                    assert {value, f"{key}_{value}"} & {*cell.needs}, (name, cell.row, cell.column, key, value)
