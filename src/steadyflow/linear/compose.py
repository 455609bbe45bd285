"""Operators made of operators: one after another, or side by side."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from steadyflow.linear.constants import Constants
from steadyflow.linear.diagonal import Diagonal
from steadyflow.linear.operator import Operator, Shape
from steadyflow.linear.separable import Separable

Part = Callable[[Shape], Operator]  # an operator class with its options bound: partial(Blur, std=2.0)


class Composition(Operator):
    """A = A_n ... A_1: the first part acts on the image, each other one on what the one before it measured.

    A and A^T always. The rest where all parts but the last have A_i A_i^T = c_i^2 I (`SuperResolution`,
    `Colorization`, `WalshHadamard`, `Denoising`), for then Q = A_{n-1} ... A_1 / c has Q Q^T = I and

        A = U_n diag(c s_n) (Q^T V_n)^T,   c = c_1 ... c_{n-1}

    Neighbours that act on rows and columns alike (`Blur`, `BicubicDownsampling`, `SuperResolution`) are one operator
    before that is asked, K = K_2 K_1, so a blur then downsampled is exact too. Parts that act on colours and parts that
    act on each channel alike commute: put the colours first.

    Args:
        parts: what makes an operator of a shape (C, H, W), in the order in which they act.
        cutoff: of the whole, relative to its largest singular value.

    Raises:
        ValueError: no parts; sizes that a part refuses.
    """

    def __init__(self, shape: Shape, parts: Sequence[Part], cutoff: float = 0.03):
        if not parts:
            raise ValueError("a composition needs at least one part")
        operators: list[Operator] = []
        for part in parts:
            operator = part(operators[-1].measured_shape if operators else shape)
            if operators and (before := operators[-1]).factors and operator.factors:
                (h1, w1), (h2, w2) = before.factors, operator.factors
                operators[-1] = Separable(before.shape, h2 @ h1, w2 @ w1, cutoff)
            else:
                operators.append(operator)
        self._inner, self._outer = operators[:-1], operators[-1]
        super().__init__(shape, self._outer.measured_shape, cutoff)
        if rough := [type(a).__name__ for a in self._inner if not a.flat]:
            self.refusal = (
                f"a composition with {', '.join(rough)} before {type(self._outer).__name__} has A and A^T alone; a "
                f"pseudo-inverse or solve needs A A^T = c I of every part but the last, or separable neighbours"
            )
        else:
            self.refusal = self._outer.refusal
        self.u_complete = self._outer.u_complete

    @cached_property
    def _scale(self) -> float:
        return math.prod(a.singular.item() for a in self._inner)

    @property
    def singular(self) -> Tensor:
        return self._scale * self._outer.singular

    def _apply(self, x: Tensor) -> Tensor:
        return self._outer(self._project_in(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._project_out(self._outer.adjoint(y))

    def vt(self, x: Tensor) -> Tensor:
        return self._outer.vt(self._project_in(x) / self._scale)

    def v(self, c: Tensor) -> Tensor:
        return self._project_out(self._outer.v(c) / self._scale)

    def ut(self, y: Tensor) -> Tensor:
        return self._outer.ut(y)

    def u(self, c: Tensor) -> Tensor:
        return self._outer.u(c)

    def _project_in(self, x: Tensor) -> Tensor:
        for operator in self._inner:
            x = operator(x)
        return x

    def _project_out(self, y: Tensor) -> Tensor:
        for operator in reversed(self._inner):
            y = operator.adjoint(y)
        return y


class Stack(Operator):
    """Several measurements of one image, y = (A_1 x, ..., A_n x), one after the other on the channel axis.

    A and A^T always. The rest where all parts are diagonal in one basis, A_i = T^* diag(g_i) T (all `Inpainting`, or
    all `Convolution` with one boundary; `Denoising` goes with either), for then

        s = sqrt(sum_i |g_i|^2),   V^T = T,   U^T y = sum_i conj(g_i / s) T y_i

    Args:
        parts: what makes an operator of the shape (C, H, W). Their measurements must be of one size (H', W').
        cutoff: of the whole, relative to its largest singular value.

    Raises:
        ValueError: no parts; measurements of different sizes.
    """

    v_complete = True

    def __init__(self, shape: Shape, parts: Sequence[Part], cutoff: float = 0.03):
        self._parts = [part(shape) for part in parts]
        sizes = {a.measured_shape[1:] for a in self._parts}
        if len(sizes) != 1:
            raise ValueError(f"a stack needs measurements of one size, got {sorted(sizes) or 'no parts'}")
        self._channels = [a.measured_shape[0] for a in self._parts]
        super().__init__(shape, (sum(self._channels), *sizes.pop()), cutoff)
        diagonal = [a for a in self._parts if isinstance(a, Diagonal)]
        bases = [a.basis for a in diagonal if a.gain.numel() > 1]  # one number is diagonal in every basis
        if len(diagonal) < len(self._parts) or len({type(basis) for basis in bases}) > 1:
            names = ", ".join(type(a).__name__ for a in self._parts)
            self.refusal = (
                f"a stack of {names} has A and A^T alone; a pseudo-inverse or solve needs parts that one basis makes "
                f"diagonal: all Inpainting, or all Convolution with one boundary"
            )
            return
        self._basis = (bases or [diagonal[0].basis])[0]
        self._modulus = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        for a in diagonal:
            self._modulus = torch.hypot(self._modulus, a.gain.abs())
        safe = torch.where(self._modulus > 0, self._modulus, 1.0)
        self._directions = [Constants(value=a.gain / safe) for a in diagonal]

    @property
    def singular(self) -> Tensor:
        return self._modulus

    def _apply(self, x: Tensor) -> Tensor:
        return torch.cat([a(x) for a in self._parts], 1)

    def _adjoint(self, y: Tensor) -> Tensor:
        parts = zip(self._parts, y.split(self._channels, 1), strict=True)
        return torch.stack([a.adjoint(part) for a, part in parts]).sum(0)

    def vt(self, x: Tensor) -> Tensor:
        return self._basis(x)

    def v(self, c: Tensor) -> Tensor:
        return self._basis.inverse(c)

    def ut(self, y: Tensor) -> Tensor:
        parts = zip(self._directions, y.split(self._channels, 1), strict=True)
        return torch.stack([d(y.device, y.dtype).value.conj() * self._basis(part) for d, part in parts]).sum(0)

    def u(self, c: Tensor) -> Tensor:
        dtype = c.real.dtype if c.is_complex() else c.dtype
        return torch.cat([self._basis.inverse(d(c.device, dtype).value * c) for d in self._directions], 1)
