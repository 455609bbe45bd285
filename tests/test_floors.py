"""The plan of the house: a module imports only from lower floors, and heavy frameworks stay on the upper ones."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "steadyflow"
FLOORS = [
    {"equilibrium", "linear", "quadrature"},
    {"noise", "paths", "grids", "diffusions", "densities"},
    {"networks"},
    {"denoisers"},
    {"samplers"},
    {"guidance", "inversion", "restorers", "sdes"},
    {"data", "metrics", "checkpoints"},
    {"modules", "callbacks", "tables"},
    {"jobs", "cli", "launch", "mistakes", "__main__"},
]
# who may import whom on the same floor
NEIGHBOURS = {
    ("grids", "paths"),
    ("diffusions", "paths"),
    ("guidance", "restorers"),
    ("metrics", "data"),
    ("metrics", "checkpoints"),
    ("checkpoints", "data"),
    ("callbacks", "modules"),
}
FIRST_FLOOR = {"lightning": 7, "hydra": 8, "omegaconf": 8}
FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def room(name: str) -> tuple[str, int]:
    """The first part of a module's name below the package, and its floor."""
    floors = [floor for floor, rooms in enumerate(FLOORS) if name in rooms]
    assert len(floors) == 1, f"steadyflow.{name} stands on no floor: add it to the plan"
    return name, floors[0]


def imports(file: Path) -> Iterator[str]:
    """Full names of what a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(file: Path, package: Path = PACKAGE) -> list[str]:
    own, floor = room(file.relative_to(package).with_suffix("").parts[0])
    wrong = []
    for name in imports(file):
        top, _, rest = name.partition(".")
        if floor < FIRST_FLOOR.get(top, 0):
            wrong.append(f"{top} on floor {floor}")
        if top == "steadyflow" and rest and not rest.startswith("__version__"):
            other, below = room(rest.partition(".")[0])
            if not (other == own or below < floor or (own, other) in NEIGHBOURS or floor == below == len(FLOORS) - 1):
                wrong.append(f"{other} (floor {below}) from {own} (floor {floor})")
    return wrong


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_from_lower_floors(file: Path) -> None:
    assert violations(file) == []


def test_the_check_sees_a_violation(tmp_path: Path) -> None:
    file = tmp_path / "paths.py"
    file.write_text("import torch\nfrom steadyflow.samplers import DDIM\ndef f():\n    import lightning\n")
    assert violations(file, tmp_path) == ["samplers (floor 4) from paths (floor 1)", "lightning on floor 1"]
    (tmp_path / "data.py").write_text("from steadyflow.metrics import FID\n")
    assert violations(tmp_path / "data.py", tmp_path) == ["metrics (floor 6) from data (floor 6)"]
