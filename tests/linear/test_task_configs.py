"""Every task's operator is made, from its config and the shape of an image alone."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from steadyflow.linear import NonlinearOperator, Operator

TASKS = Path(__file__).parents[2] / "configs" / "task"
SWEPT = {"blur": {"std": 1.0}, "inpaint_box": {"size": 8}, "inpaint_freeform": {"seed": 3}, "jpeg": {"quality": 50}}
SWEPT |= {"mri": {"acceleration": 2.0}, "hdr": {"gain": 1.5}, "quantise": {"bits": 3}, "inpaint_file": {"invert": True}}


@pytest.mark.parametrize("file", sorted(TASKS.glob("*.yaml")), ids=lambda file: file.stem)
def test_task(file: Path, tmp_path: Path) -> None:
    task = OmegaConf.load(file)
    if OmegaConf.is_missing(task, "file"):
        np.save(tmp_path / "mask.npy", np.eye(32))
        task.file = str(tmp_path / "mask.npy")
    assert task.sigma_y == 0.0
    assert next(iter(task)) == "sigma_y"
    operator = instantiate(task.operator, shape=(3, 32, 32))
    assert isinstance(operator, Operator | NonlinearOperator)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = operator(x)
    assert y.shape == (2, *operator.measured_shape)
    torch.testing.assert_close(operator(operator.pinv(y)), y, rtol=0, atol=0.1 if "blur" in file.stem else 2e-5)
    if file.stem in SWEPT:  # what people sweep stands at the top and reaches the operator
        other = instantiate(OmegaConf.merge(task, SWEPT[file.stem]).operator, shape=(3, 32, 32))
        assert not torch.equal(other(x), y)


def test_the_script_that_draws_operators_makes_every_task_but_those_that_need_a_file() -> None:
    makers = runpy.run_path(str(TASKS.parents[1] / "scripts" / "operators.py"))["makers"]()
    assert {file.stem for file in TASKS.glob("*.yaml")} - set(makers) == {"inpaint_file"}
    for make in makers.values():
        assert make((3, 32, 32)).shape == (3, 32, 32)
