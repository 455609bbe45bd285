"""The module that EDM's pickles ask for, which no test may leave behind."""

import sys
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def persistence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that EDM's pickles name, for writing them; reading one by pickle runs the source inside."""

    def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
        exec(meta["module_src"], {})

    module = ModuleType("torch_utils.persistence")
    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_utils", ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)
