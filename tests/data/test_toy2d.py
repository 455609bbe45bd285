"""Each distribution against what its definition implies; tolerances are five standard errors or a p-value."""

import numpy as np
import pytest
from scipy import integrate, stats

from steadyflow.data import Toy2D
from steadyflow.data.toy2d import SHAPES

COUNT = 40_000


def points(name):
    return Toy2D(name, count=COUNT).points.double().numpy()


def equally_often(which, parts):
    return stats.chisquare(np.bincount(which, minlength=parts)).pvalue > 1e-3


@pytest.mark.parametrize("name", SHAPES)
def test_train_and_test_are_one_law_and_two_samples(name):
    train, test = points(name), Toy2D(name, "test", count=COUNT).points.double().numpy()
    for axis in (0, 1):
        assert stats.ks_2samp(train[:, axis], test[:, axis]).pvalue > 1e-3
    assert not np.isin(train[:1000, 0], test[:, 0]).all()


def test_8gaussians_has_eight_equal_isotropic_modes():
    x = points("8gaussians")
    angle = np.arange(8) * np.pi / 4
    modes = np.sqrt(8) * np.stack([np.cos(angle), np.sin(angle)], 1)
    which = np.linalg.norm(x[:, None] - modes, axis=-1).argmin(1)
    assert equally_often(which, 8)
    # a mode's squared distance to its centre is chi^2 of 2 degrees; 0.2% beyond the half distance are cut off
    squared = 8 * ((x - modes[which]) ** 2).sum(1)
    assert abs((squared < 5).mean() - stats.chi2(2).cdf(5)) < 5 * np.sqrt(0.1 / COUNT)
    assert np.allclose(x.mean(0), 0, atol=5 * 2.1 / np.sqrt(COUNT))
    assert np.allclose(np.cov(x.T), (4 + 1 / 8) * np.eye(2), atol=5 * 4.2 / np.sqrt(COUNT))


def test_two_spirals_have_the_second_moment_of_their_formula_and_are_point_symmetric():
    x = points("two_spirals")
    density = lambda phi: 2 * phi / (3 * np.pi) ** 2  # noqa: E731
    cross, _ = integrate.quad(lambda p: density(p) * p * (np.sin(p) - np.cos(p)) / 2, 0, 3 * np.pi)
    expected = ((3 * np.pi) ** 2 / 2 + cross + 2 * (1 / 12)) / 9 + 2 * 0.01
    squared = (x**2).sum(1)
    assert abs(squared.mean() - expected) < 5 * squared.std() / np.sqrt(COUNT)
    assert stats.ks_2samp(x[:, 0], -x[:, 0]).pvalue > 1e-3
    # radius and angle go together along an arm: modulo a half turn the residual angle is narrow
    far = squared > 4
    radius, angle = np.sqrt(squared[far]), np.arctan2(x[far, 1], -x[far, 0])
    residual = np.angle(np.exp(2j * (angle - 3 * radius))) / 2
    assert residual.std() < 0.5 < np.pi / np.sqrt(12)


def test_checkerboard_is_uniform_on_its_eight_squares():
    u = (points("checkerboard") + 4) / 2
    cell = np.floor(u).astype(int)
    assert (cell.sum(1) % 2 == 0).all()
    assert equally_often(cell[:, 0] * 2 + cell[:, 1] // 2, 8)
    for axis in (0, 1):
        assert stats.kstest(u[:, axis] - cell[:, axis], "uniform").pvalue > 1e-3


def test_rings_are_four_equal_rings_with_rice_distributed_radii():
    x = points("rings")
    radius = np.linalg.norm(x[:10_000], axis=1)
    law = [stats.rice(0.75 * k / 0.08, scale=0.08) for k in (1, 2, 3, 4)]
    assert stats.kstest(radius, lambda r: sum(ring.cdf(r) for ring in law) / 4).pvalue > 1e-3
    assert stats.kstest(np.arctan2(x[:, 1], x[:, 0]) / (2 * np.pi) + 0.5, "uniform").pvalue > 1e-3


def test_olympic_rings_are_five_thin_unit_circles():
    x = points("olympic_rings")
    centres = np.array([[-1.75, 0.75], [0, 0.75], [1.75, 0.75], [-1.05, -0.75], [1.05, -0.75]])
    off = np.linalg.norm(x[:, None] - centres, axis=-1) - 1
    which = np.abs(off).argmin(1)
    distance = off[np.arange(COUNT), which]
    assert stats.kstest(distance / 0.001, "norm").pvalue > 1e-3
    assert equally_often(which, 5)


def test_fractal_tree_is_uniform_by_length_over_511_branches():
    # the branches anew, as complex numbers; of 9 generations
    starts, headings, length, segments, lengths = [-1j], [1j], 0.7, [], []
    for generation in range(9):
        ends = [s + length * h for s, h in zip(starts, headings, strict=True)]
        segments += [(s, e, generation) for s, e in zip(starts, ends, strict=True)]
        lengths += [length] * len(starts)
        turns = [np.exp(1j * np.pi / 6), np.exp(-1j * np.pi / 6)]
        starts, headings = [e for e in ends for _ in turns], [h * t for h in headings for t in turns]
        length *= 0.7
    assert len(segments) == 511
    x = points("fractal_tree")[:3000]
    z = x[:, 0] + 1j * x[:, 1]
    a, b = np.array([s for s, _, _ in segments]), np.array([e for _, e, _ in segments])
    along = (((z[:, None] - a) * np.conj(b - a)).real / np.abs(b - a) ** 2).clip(0, 1)
    distance = np.abs(z[:, None] - a - along * (b - a))
    assert distance.min(1).max() < 5 * 0.004
    # the trunk and the two first branches touch nothing else away from their ends: their share is their length's
    nearest, middle = distance.argmin(1), along[np.arange(len(z)), distance.argmin(1)]
    for k in range(3):
        share = lengths[k] * 0.8 / sum(lengths)
        found = ((nearest == k) & (middle > 0.1) & (middle < 0.9)).mean()
        assert abs(found - share) < 5 * np.sqrt(share / len(z))
    centre = sum(length * (s + e) / 2 for length, (s, e, _) in zip(lengths, segments, strict=True)) / sum(lengths)
    assert abs(z.mean() - centre) < 5 * z.std() / np.sqrt(len(z))


def test_sierpinski_is_uniform_on_the_squares_of_the_carpet():
    u = (points("sierpinski") + 1) / 2
    cell = np.zeros(COUNT, int)
    for _ in range(4):
        digits = np.floor(3 * u).astype(int).clip(0, 2)
        u = 3 * u - digits
        assert not (digits == 1).all(1).any()
        square = digits[:, 0] * 3 + digits[:, 1]
        cell = cell * 8 + np.where(square > 4, square - 1, square)
    assert equally_often(cell, 8**4)
    for axis in (0, 1):
        assert stats.kstest(u[:, axis], "uniform").pvalue > 1e-3


def test_another_name_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="no distribution 'moons'; there are 8gaussians, two_spirals, checkerboard"):
        Toy2D("moons")
