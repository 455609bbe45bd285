"""What a test must not leave behind for the next one, and a linear operator written out as a matrix."""

import logging
import math
import signal
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a suite run in the background hands that on to the commands
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _tidy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hydra's configuration, log handlers and working-directory imports of a command that ran in this process."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    yield
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    if "hydra.core.hydra_config" in sys.modules:
        from hydra.core.global_hydra import GlobalHydra
        from hydra.core.hydra_config import HydraConfig

        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None


class DenseOperator:
    """y = A x for a matrix A (k, d) on flattened images, by dense linear algebra: what fast operators are tested by."""

    def __init__(self, matrix: Tensor, shape: tuple[int, ...]):
        assert matrix.shape[1] == math.prod(shape)
        self.matrix, self.shape, self.inverse = matrix, shape, torch.linalg.pinv(matrix)

    def _times(self, matrix: Tensor, x: Tensor) -> Tensor:
        return x.flatten(1) @ matrix.to(x.dtype).mT

    def _image(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), *self.shape)

    @property
    def flat(self) -> bool:
        s = torch.linalg.svdvals(self.matrix)
        return len(s) == len(self.matrix) and bool(s.max() - s.min() < 1e-12 * s.max())

    def __call__(self, x: Tensor) -> Tensor:
        return self._times(self.matrix, x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._image(self._times(self.matrix.mT, y))

    def pinv(self, y: Tensor) -> Tensor:
        return self._image(self._times(self.inverse, y))

    def project(self, x: Tensor) -> Tensor:
        return self.pinv(self(x))

    def solve(self, y: Tensor, r2: Tensor | float, noise2: Tensor | float) -> Tensor:
        r2 = torch.as_tensor(r2, dtype=torch.float64).reshape(-1, 1, 1)
        m = r2 * (self.matrix @ self.matrix.mT) + noise2 * torch.eye(len(self.matrix), dtype=torch.float64)
        return torch.linalg.solve(m, y.double().unsqueeze(-1)).squeeze(-1).to(y.dtype)

    def spectral(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        _, s, vt = torch.linalg.svd(self.matrix, full_matrices=True)
        s = torch.cat([s, s.new_zeros(len(vt) - len(s))]).reshape(1, -1, 1, 1)
        return self._image(self._times(vt.mT @ torch.diag(f(s).flatten()) @ vt, x))


@pytest.fixture(scope="session")
def dense() -> type[DenseOperator]:
    return DenseOperator
