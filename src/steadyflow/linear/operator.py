"""What a linear operator is: A, A^T and, through its singular value decomposition, everything made of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from steadyflow.linear.constants import Constants

Shape = tuple[int, int, int]  # (C, H, W)
SpectralFunction = Callable[[Tensor], Tensor]


class Operator(ABC):
    """y = A x for images x (B, C, H, W), with the singular value decomposition known by structure.

        A = U diag(s) V^T,   U^T U = I,  V^T V = I,  s >= 0

    V^T x and U^T y are fast transforms or products with small factors; no matrix of the image's size exists. From the
    decomposition follow, with S = {i : s_i > cutoff max s} the directions that count as measured,

        pinv(y)           = A^+ y = sum_S v_i u_i^T y / s_i
        project(x)        = A^+ A x = sum_S v_i v_i^T x
        spectral(x, f)    = f(sqrt(A^T A)) x = sum_i f(s_i [i in S]) v_i v_i^T x, which is f(0) x on the null space
        solve(y, r2, n2)  = (r2 A A^T + n2 I)^-1 y, with every s_i where n2 > 0; for n2 = 0 the pseudo-inverse,
                            sum_S u_i u_i^T y / (r2 s_i^2), also where A A^T is singular

    The cutoff is relative. A direction below it would come back with its error, if only the rounding of y, 1 / cutoff
    times as large; pinv, project, spectral and solve at n2 = 0 leave it unmeasured instead, all in the same way, so
    that they stay functions of one A. `__call__` and `adjoint` are A and A^T themselves, with all of the spectrum.

    Images and measurements are float32 or float64 and 4-dimensional, (B, *shape) and (B, *measured_shape); all
    methods are differentiable, keep the dtype and the device, and do their arithmetic outside autocast. (Where
    torch.set_float32_matmul_precision allows TF32 on a GPU, that holds here too: 1e-3 in place of 1e-6.) Spectral
    functions are evaluated in float64. A batch of N equals N batches of one.

    An operator whose structure gives no decomposition has A and A^T alone and says why in `refusal`.

    Args:
        shape: (C, H, W) of the image.
        measured_shape: of the measurement, three axes as well.
        cutoff: relative to the largest singular value, 0 <= cutoff < 1.

    Raises:
        ValueError: an image or measurement of another shape or dtype; noise2 < 0; a method that `refusal` rules out.
    """

    v_complete = False  # whether V is square, so that V V^T = I
    u_complete = False  # whether U is square
    refusal: str | None = None  # why there is no decomposition

    def __init__(self, shape: Shape, measured_shape: Shape, cutoff: float = 1e-6):
        if not 0 <= cutoff < 1:
            raise ValueError(f"need 0 <= cutoff < 1 (it is relative to the largest singular value), got {cutoff}")
        self.shape, self.measured_shape, self.cutoff = image_shape(shape), image_shape(measured_shape), float(cutoff)

    # What an operator states of itself.

    @property
    @abstractmethod
    def singular(self) -> Tensor:
        """s, float64, with 4 axes (1, *, *, *) that broadcast against the coefficients V^T x and U^T y."""

    @abstractmethod
    def _apply(self, x: Tensor) -> Tensor:
        """A x."""

    @abstractmethod
    def _adjoint(self, y: Tensor) -> Tensor:
        """A^T y."""

    @abstractmethod
    def vt(self, x: Tensor) -> Tensor:
        """V^T x: 4 axes, complex for a Fourier basis."""

    @abstractmethod
    def v(self, c: Tensor) -> Tensor:
        """V c."""

    @abstractmethod
    def ut(self, y: Tensor) -> Tensor:
        """U^T y."""

    @abstractmethod
    def u(self, c: Tensor) -> Tensor:
        """U c."""

    # What follows.

    def __call__(self, x: Tensor) -> Tensor:
        """A x."""
        with self._exact(x, self.shape, "image"):
            return self._apply(x)

    def adjoint(self, y: Tensor) -> Tensor:
        """A^T y."""
        with self._exact(y, self.measured_shape, "measurement"):
            return self._adjoint(y)

    def pinv(self, y: Tensor) -> Tensor:
        """A^+ y."""
        with self._exact(y, self.measured_shape, "measurement"):
            return self.v(self._spectrum(y.device, y.dtype).inverse * self.ut(y))

    def project(self, x: Tensor) -> Tensor:
        """A^+ A x."""
        with self._exact(x, self.shape, "image"):
            kept = self._spectrum(x.device, x.dtype).kept
            return self.v(self.vt(x) if self._all_kept else kept * self.vt(x))

    def spectral(self, x: Tensor, f: SpectralFunction) -> Tensor:
        """f(sqrt(A^T A)) x.

        Args:
            x: (B, *shape).
            f: the function of the singular values: float64 on x's device, 4 axes; (B, 1, 1, 1) broadcasts against
                them, for a function that differs from item to item. It must be finite at 0, which it is given for
                directions that are not measured.
        """
        with self._exact(x, self.shape, "image"):
            s = self._spectrum(x.device, torch.float64).truncated
            if self.v_complete:
                return self.v(f(s).to(x.dtype) * self.vt(x))
            at_zero = f(s.new_zeros(1, 1, 1, 1))
            return at_zero.to(x.dtype) * x + self.v((f(s) - at_zero).to(x.dtype) * self.vt(x))

    def solve(self, y: Tensor, r2: Tensor | float, noise2: Tensor | float) -> Tensor:
        """(r2 A A^T + noise2 I)^-1 y, for noise2 = 0 the pseudo-inverse of r2 A A^T.

        Args:
            y: (B, *measured_shape).
            r2, noise2: () or (B,), not negative and not both 0. Best on the CPU: they are looked at.
        """
        with self._exact(y, self.measured_shape, "measurement"):
            r2, noise2 = _variance(r2, len(y), "r2"), _variance(noise2, len(y), "noise2")
            if bool((r2.cpu() + noise2.cpu() == 0).any()):
                raise ValueError("r2 and noise2 are both 0, and 0 has no inverse: one of them must be positive")
            r2, noise2 = r2.to(y.device), noise2.to(y.device)
            spectrum = self._spectrum(y.device, torch.float64)
            solvable = spectrum.kept.bool() | (noise2 > 0)
            denominator = torch.where(solvable, r2 * spectrum.s.square() + noise2, 1.0)
            weight = torch.where(solvable, 1 / denominator, 0.0)
            c = self.ut(y)
            inside = self.u(weight.to(y.dtype) * c)
            if self.u_complete:
                return inside
            outside = y - self.u(c)  # divided by noise2: what rounding left of A's range in it must go first
            outside = outside - self.u(self.ut(outside))
            return inside + torch.where(noise2 > 0, 1 / torch.where(noise2 > 0, noise2, 1.0), 0.0).to(y.dtype) * outside

    @property
    def flat(self) -> bool:
        """Whether A A^T = s^2 I with one s."""
        return self.refusal is None and self.u_complete and self.singular.numel() == 1

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(K_h, K_w), float64, where A X = K_h X K_w^T in each channel; None where A has no such form."""
        return None

    @cached_property
    def _spectrum(self) -> Constants:
        if self.refusal is not None:
            raise ValueError(self.refusal)
        s = self.singular
        kept = (s > 0) & (s > self.cutoff * s.max())
        inverse = torch.where(kept, 1 / torch.where(kept, s, 1.0), 0.0)
        return Constants(s=s, truncated=s * kept, inverse=inverse, kept=kept.to(s.dtype))

    @cached_property
    def _all_kept(self) -> bool:
        cpu = self._spectrum(torch.device("cpu"), torch.float64)
        return bool(cpu.kept.all())

    @contextmanager
    def _exact(self, x: Tensor, shape: Shape, name: str) -> Iterator[None]:
        """Checks the input, and keeps autocast away from the products."""
        if x.ndim != 4 or x.shape[1:] != shape:
            raise ValueError(
                f"{type(self).__name__} takes a batch (B, {', '.join(map(str, shape))}) as its {name}, got "
                f"{tuple(x.shape)}: build it with the shape (C, H, W) of the image"
            )
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{type(self).__name__} computes in float32 or float64, got {x.dtype}: convert it first")
        with torch.autocast(x.device.type, enabled=False):
            yield


def image_shape(shape: Shape) -> Shape:
    """Three positive integers, or a ValueError."""
    shape = tuple(int(n) for n in shape)  # type: ignore[assignment]
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"a shape is (C, H, W), three positive sizes, got {shape}")
    return shape


def _variance(value: Tensor | float, batch: int, name: str) -> Tensor:
    """A variance () or (B,) as float64, (1 or B, 1, 1, 1), where it is."""
    value = torch.as_tensor(value, dtype=torch.float64)
    if value.ndim > 1 or (value.ndim == 1 and len(value) != batch):
        raise ValueError(f"{name} must be a number or one for each of the {batch} items, got {tuple(value.shape)}")
    if not bool((value >= 0).all()):
        raise ValueError(f"{name} is a variance and cannot be negative or NaN, got {value.min().item():g}")
    return value.reshape(-1, 1, 1, 1)
