"""The grid found on trajectories: its search against brute force, its gain, and the file it is kept in."""

import itertools
import json

import pytest
import torch

from steadyflow.denoisers import GaussianMixture
from steadyflow.grids import LogSNR, Quadratic, Saved
from steadyflow.noise import NoiseSource
from steadyflow.paths import ConditionalOT, VariancePreserving
from steadyflow.samplers import DEIS
from steadyflow.samplers.best_grid import _local_errors, best_grids

F64 = torch.float64
VP = VariancePreserving()
NOISE = NoiseSource(0, range(16), (2,), dtype=F64)


def test_local_errors_are_those_of_a_step():
    """Of AB of degree 1 in log rho from exact values: the deis sampler's own last step."""
    g = torch.Generator().manual_seed(0)
    y, eps = torch.randn(2, 6, 10, generator=g, dtype=F64)
    expected = {}
    rho = torch.tensor([9.0, 4.0, 2.0, 0.9, 0.4, 0.2], dtype=F64)
    found = _local_errors(y, eps, rho)
    for h, i, j in itertools.combinations(range(6), 3):
        times = VP.time_at(rho[[h, i, j]])
        (a, b, past, _), alpha = DEIS(VP, times, variant="log_rhoab", order=1).method.table[-1], VP(times)[0]
        sigma = VP(times)[1]
        x0 = y[i] - rho[i] * eps[i]
        step = a * alpha[1] * y[i] + b * x0 + past * sigma[0] * eps[h]
        one = (step / alpha[2] - y[j]).square().mean().sqrt()
        expected[h, i, j] = one
    log = rho.log()
    for h, i, j in expected:
        if log[i] - log[j] > 1.5 * (log[h] - log[i]):
            assert found[h, i, j] == torch.inf
        else:
            torch.testing.assert_close(found[h, i, j], max(expected[h, i, k] for k in range(i + 1, j + 1)))
    assert found.isfinite().sum() > 8
    assert found[2, 1, 4] == found[0, 3, 3] == torch.inf


def test_the_search_finds_the_least_sum(ring, monkeypatch):
    """Against all grids of 4 steps out of 9 nodes."""
    nodes, seen, growth = 9, {}, torch.linspace(0.5, 2, 10, dtype=F64)

    def keep(y, eps, rho):
        seen["error"], seen["rho"] = _local_errors(y, eps, rho), rho
        seen["first"] = (y - y[0] - (rho - rho[0]).unsqueeze(1) * eps[0]).square().mean(1).sqrt() * growth
        return seen["error"]

    monkeypatch.setattr("steadyflow.samplers.best_grid._local_errors", keep)
    monkeypatch.setattr("steadyflow.samplers.best_grid._growth", lambda *_: growth)
    first = lambda grids, key: grids[0]  # noqa: E731 - no contest with the rules
    monkeypatch.setattr("steadyflow.samplers.best_grid.min", first, raising=False)
    found = best_grids(ring, VP, NOISE, [1, 2, 4], end=0.01, nodes=nodes)
    error = seen["error"] * growth

    def total(way):
        return float(
            seen["first"][way[1]] + sum(error[h, i, j] for h, i, j in zip(way, way[1:], way[2:], strict=False))
        )

    ways = [(0, *middle, nodes) for middle in itertools.combinations(range(1, nodes), 3)]
    assert found[4] == seen["rho"][list(min(ways, key=total))].tolist()
    assert found[1] == seen["rho"][[0, nodes]].tolist()
    assert len(found[2]) == 3


def test_a_grid_found_on_16_samples_serves_others(ring):
    """Errors of DEIS on 300 other samples, beside the better of the quadratic and the log-SNR grid."""
    narrow = GaussianMixture(ring.means.reshape(8, 2), torch.full((8,), 0.01, dtype=F64))
    found = best_grids(narrow, VP, NOISE, [5, 8, 12])
    noise = NoiseSource(1, range(300), (2,), dtype=F64)
    exact = DEIS(VP, LogSNR(zero=False), 200, "rho_rk", "rk4")(narrow, noise)

    def error(grid):
        return float(
            (DEIS(VP, grid, None, "log_rhoab", 1)(narrow, noise, start=VP(1.0)[1] * noise(0)) - exact)
            .square()
            .mean()
            .sqrt()
        )

    for n, ratios in found.items():
        ours = error(VP.time_at(torch.tensor(ratios, dtype=F64)))
        others = [error(rule(end=1e-3, zero=False)(VP, n)) for rule in (Quadratic, LogSNR)]
        print(f"\n{n} steps: {ours:.4f}, quadratic {others[0]:.4f}, log-SNR {others[1]:.4f}")
        assert ours < 1.1 * min(others)


def test_a_saved_grid_fits_any_path(tmp_path):
    file = tmp_path / "grid.json"
    file.write_text(json.dumps({"ratios": {"2": [100.0, 1.0, 0.02], "3": [100.0, 5.0, 1.0, 0.02]}}))
    for path in (VP, ConditionalOT()):
        times = Saved(file)(path, 3)
        torch.testing.assert_close(path.ratio(times), torch.tensor([100, 5, 1, 0.02], dtype=F64), rtol=1e-9, atol=0)
        closed = Saved(file, zero=True)(path, 3)
        torch.testing.assert_close(path.ratio(closed), torch.tensor([100, 1, 0.02, 0], dtype=F64), rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match=r"has no grid of 7 steps; it has 2, 3"):
        Saved(file)(VP, 7)
    with pytest.raises(FileNotFoundError, match="makes one for a checkpoint"):
        Saved(tmp_path / "none.json")
    file.write_text(json.dumps({"ratios": {"2": [1.0, 5.0, 0.02]}}))
    with pytest.raises(ValueError, match="2 steps are 3 falling ratios"):
        Saved(file)
    file.write_text("[1, 2]")
    with pytest.raises(ValueError, match="expected"):
        Saved(file)


def test_steps_out_of_range_are_refused(ring):
    with pytest.raises(ValueError, match=r"steps must lie in 1\.\.100"):
        best_grids(ring, VP, NOISE, [0])
