"""The installed package: the command and its configs work outside the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built through the source distribution as an index would get it."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("not a checkout")
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder), "--target"]
    subprocess.run([*build, "sdist"], cwd=ROOT, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    subprocess.run(["tar", "xzf", str(archive), "-C", str(folder)], check=True)
    (source,) = (p for p in folder.iterdir() if p.is_dir())
    subprocess.run([*build, "wheel"], cwd=source, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern, inside in ((ROOT / "src", "*.py", ""), (ROOT / "configs", "*.yaml", "steadyflow/configs/")):
        files = [inside + p.relative_to(folder).as_posix() for p in folder.rglob(pattern)]
        assert files
        assert set(files) <= names
    shipped = {inside.name for inside in (ROOT / "src").rglob("*.safetensors")}
    assert shipped <= {Path(name).name for name in names}
    assert "steadyflow/py.typed" in names
    assert not any(name.startswith(("tests/", "scripts/", "configs/")) for name in names)


@pytest.mark.slow
def test_installed_command(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)

    def steadyflow(*argv: str) -> str:
        environment = os.environ | {"PYTHONPATH": str(site)}  # before the checkout
        command = [sys.executable, str(site / "bin" / "steadyflow"), *argv]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    assert "\n  sample " in steadyflow("--help")
    composed = steadyflow("sample", "sampler.steps=7", "--cfg", "job")
    assert "steps: 7\n" in composed
    sources = steadyflow("sample", "--info", "searchpath")
    assert f"file://{site}/steadyflow/configs" in sources
    assert str(ROOT / "configs") not in sources
