"""`steadyflow sample` in processes of its own: killed, and on two."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from steadyflow import cli
from steadyflow.callbacks.samples import SampleFiles

COMMON = ["sample", "checkpoint=analytic", "logger=none", "+trainer.enable_progress_bar=false"]


def start(*overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "steadyflow", *COMMON, *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_killed_run_continues_where_it_was(tmp_path):
    options = ["dataset=gaussian_mixture", "callbacks=none", "num_samples=40", "sampler.steps=3000", "sampler.eta=1"]
    killed = tmp_path / "killed"
    process = start(*options, "batch_size=4", f"hydra.run.dir={killed}")
    while len(list((killed / "samples").glob("*.npz"))) < 2:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = {f.name: f.read_bytes() for f in (killed / "samples").glob("*.npz")}
    assert 2 <= len(kept) < 10
    assert not (killed / "metrics.json").exists()

    assert cli.main([*COMMON, *options, "batch_size=4", f"hydra.run.dir={killed}"]) == 0
    assert {name: (killed / "samples" / name).read_bytes() for name in kept} == kept
    assert cli.main([*COMMON, *options, "batch_size=40", f"hydra.run.dir={tmp_path / 'whole'}"]) == 0
    (index, x, _), (_, y, _) = (SampleFiles(tmp_path / d, vector=True).vectors() for d in ("killed", "whole"))
    assert index.tolist() == list(range(40))
    np.testing.assert_allclose(x, y, atol=1e-5)
    assert not list(killed.rglob(".*.tmp"))


@pytest.mark.slow
def test_two_processes_share_what_is_missing(tmp_path):
    """A run begun on one process and continued on two ends with the same images and scores."""
    options = ["sampler.steps=5", "num_samples=21", "batch_size=3"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main([*COMMON, *options, f"hydra.run.dir={one}"]) == 0
    shutil.copytree(one, two)
    shards = sorted((two / "samples").iterdir())
    for shard in shards[2:]:  # five batches are missing: three for one process, two for the other
        shard.unlink()
    process = start(*options, "trainer=ddp_cpu", f"hydra.run.dir={two}")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert [s.name for s in sorted((two / "samples").iterdir())] == [s.name for s in shards]
    for shard in shards:
        with np.load(shard) as b, np.load(one / "samples" / shard.name) as a:
            assert np.array_equal(a["index"], b["index"])
            assert np.array_equal(a["label"], b["label"])
            assert np.abs(a["images"].astype(int) - b["images"]).max() <= 1
    a, b = (json.loads((Path(d) / "metrics.json").read_text()) for d in (one, two))
    for name in ("fid", "kid"):
        assert b[name] == pytest.approx(a[name], rel=1e-3)
        assert b["protocol"][name]["count"] == 21
    assert b["nfe"] == 5
    assert b["protocol"]["nfe"] | {"devices": 1, "count": 21} == a["protocol"]["nfe"]
    assert b["protocol"]["nfe"]["devices"] == 2
    assert b["protocol"]["nfe"]["count"] == 15


@pytest.mark.slow
def test_two_processes_share_the_states_of_every_sample(tmp_path):
    """sampler.shard: the same samples as on one process, each evaluation made once, by one of the two."""
    options = ["dataset=gaussian_mixture", "sampler=parallel", "sampler.steps=25", "num_samples=5", "batch_size=2"]
    options += ["callbacks=none"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main([*COMMON, *options, f"hydra.run.dir={one}"]) == 0
    process = start(*options, "sampler.shard=true", "trainer=ddp_cpu", f"hydra.run.dir={two}")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    (index, x, _), (same, y, _) = (SampleFiles(d, vector=True).vectors() for d in (one, two))
    assert index.tolist() == same.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(x, y, atol=1e-5)
    a, b = (json.loads((d / "metrics.json").read_text()) for d in (one, two))
    assert 1 < a["parallel_iterations"] < 15
    assert b["parallel_iterations"] == a["parallel_iterations"]
    assert b["nfe"] == a["nfe"] == pytest.approx(25 * a["parallel_iterations"])
    assert b["protocol"]["nfe"]["count"] == b["protocol"]["parallel_iterations"]["count"] == 5
