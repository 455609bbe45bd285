"""Seven distributions in the plane that tell samplers and models apart by eye."""

import numpy as np
import torch

from steadyflow.data.points import InMemoryPoints, normals, uniforms

COLUMNS = 8  # uniform numbers a point may use


class Toy2D(InMemoryPoints):
    """Points in the plane. Sample i is a function of (seed, split, i).

    | name             | units | what it is                                                                   |
    |------------------|-------|------------------------------------------------------------------------------|
    | 8gaussians       | +-4   | 8 modes of std sqrt(1/8) on the circle of radius 2 sqrt(2)                   |
    | two_spirals      | +-3.5 | two arms of one and a half turns, noise 0.1                                  |
    | checkerboard     | +-4   | uniform on 8 of 16 squares of side 2                                         |
    | rings            | +-3.3 | four rings about 0, radius 3, 9/4, 3/2, 3/4, noise 0.08, equal mass          |
    | olympic_rings    | +-2.8 | five interlaced rings, radius N(1, 0.001^2)                                  |
    | fractal_tree     | +-1.2 | 9 generations of branches, each 0.7 of its parent, turned 30 degrees         |
    | sierpinski       | +-1   | the Sierpinski carpet after 4 cuts: uniform on 4096 squares of side 2/81     |

    Source: the first four as in FFJORD (Grathwohl et al. 2019); rings of width 0.001, tree and carpet after DiffFlow
    (Zhang & Chen 2021, Section 4.1), whose tree and carpet are pictures, here drawn by formula.

    Args:
        name: of the distribution.
        split: train or test, of independent samples.
        count: how many samples.
        seed: >= 0.

    Raises:
        ValueError: another name.
    """

    def __init__(self, name: str, split: str = "train", count: int = 10_000, seed: int = 0):
        if name not in SHAPES:
            raise ValueError(f"no distribution {name!r}; there are {', '.join(SHAPES)}")
        points = SHAPES[name](uniforms(seed, split, count, COLUMNS))
        super().__init__(name, split, torch.from_numpy(points))


def eight_gaussians(u: np.ndarray) -> np.ndarray:
    """Eight Gaussians of standard deviation sqrt(1/8) on the circle of radius sqrt(8)."""
    angle = np.floor(8 * u[:, 0]) * (np.pi / 4)
    return np.sqrt(8) * _circle(angle) + np.sqrt(1 / 8) * normals(u[:, 1:3])


def two_spirals(u: np.ndarray) -> np.ndarray:
    """+-(phi (-cos phi, sin phi) + (u, v) / 2) / 3 + 0.1 z with phi = 3 pi sqrt(w)."""
    phi = 3 * np.pi * np.sqrt(u[:, 0])
    arm = phi[:, None] * np.stack([-np.cos(phi), np.sin(phi)], 1) + u[:, 1:3] / 2
    sign = np.where(u[:, 3] < 0.5, 1.0, -1.0)
    return sign[:, None] * arm / 3 + 0.1 * normals(u[:, 4:6])


def checkerboard(u: np.ndarray) -> np.ndarray:
    """The squares (column, row) of side 2 in [-4, 4]^2 with an even sum."""
    column = np.floor(4 * u[:, 0])
    row = 2 * np.floor(2 * u[:, 1]) + column % 2
    return 2 * (np.stack([column, row], 1) + u[:, 2:4]) - 4


def rings(u: np.ndarray) -> np.ndarray:
    """Four circles of radius 0.75, 1.5, 2.25 and 3, of equal weight, with Gaussian noise of 0.08."""
    radius = 0.75 * (1 + np.floor(4 * u[:, 0]))
    return radius[:, None] * _circle(2 * np.pi * u[:, 1]) + 0.08 * normals(u[:, 2:4])


def olympic_rings(u: np.ndarray) -> np.ndarray:
    """Five interlaced circles of radius 1, three above two, whose radius has a standard deviation of 0.001."""
    centres = np.array([[-1.75, 0.75], [0.0, 0.75], [1.75, 0.75], [-1.05, -0.75], [1.05, -0.75]])
    radius = 1 + 0.001 * normals(u[:, 2])
    return centres[np.floor(5 * u[:, 0]).astype(int)] + radius[:, None] * _circle(2 * np.pi * u[:, 1])


def fractal_tree(u: np.ndarray) -> np.ndarray:
    """A trunk of length 0.7 from (0, -1) upwards forks 8 times; uniform by length, Gaussian noise 0.004 around it."""
    generations, ratio, turn = 9, 0.7, np.pi / 6
    mass = (2 * ratio) ** np.arange(generations)
    last = np.searchsorted(mass.cumsum()[:-1] / mass.sum(), u[:, 0], side="right")  # the generation a point lies on
    forks = np.floor(u[:, 1] * 2 ** (generations - 1)).astype(int)  # bit k: left or right at the k-th fork
    point, heading, length = np.tile([0.0, -1.0], (len(u), 1)), np.full(len(u), np.pi / 2), 0.7
    for k in range(generations):
        along = np.where(last > k, 1.0, np.where(last == k, u[:, 2], 0.0))
        point += (length * along)[:, None] * _circle(heading)
        heading += turn * (2 * (forks >> k & 1) - 1)
        length *= ratio
    return point + 0.004 * normals(u[:, 3:5])


def sierpinski(u: np.ndarray) -> np.ndarray:
    """Each cut keeps the 8 outer squares of 3 x 3; a point is uniform in one of the last squares."""
    cuts = 4
    kept = np.array([[i, j] for i in range(3) for j in range(3) if (i, j) != (1, 1)])
    address = np.floor(u[:, 0] * 8**cuts).astype(int)
    corner = sum(kept[address // 8**k % 8] * 3.0 ** -(k + 1) for k in range(cuts))
    return 2 * (corner + u[:, 1:3] * 3.0**-cuts) - 1


def _circle(angle: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angle), np.sin(angle)], 1)


SHAPES = {
    "8gaussians": eight_gaussians,
    "two_spirals": two_spirals,
    "checkerboard": checkerboard,
    "rings": rings,
    "olympic_rings": olympic_rings,
    "fractal_tree": fractal_tree,
    "sierpinski": sierpinski,
}
