"""What every operator must satisfy: small ones of every kind against their dense matrix, built column by column."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from steadyflow.linear import (
    BicubicDownsampling,
    Blur,
    Colorization,
    Composition,
    Convolution,
    Denoising,
    Fourier,
    Inpainting,
    Operator,
    PaddedConvolution,
    Stack,
    SuperResolution,
    WalshHadamard,
    box_mask,
    cartesian_lines,
    disk_kernel,
    freeform_mask,
    gaussian_kernel,
    motion_kernel,
    random_mask,
)

SHAPE = (3, 8, 16)
SHAKEN = partial(motion_kernel, 7, 4.0, 30.0, 90.0)


def _mask_per_channel() -> Tensor:
    return torch.stack([random_mask(SHAPE[1:], 0.5, seed=i) for i in range(3)])


# With all of these A^+ is of the whole spectrum, or of what the cutoff keeps.
OPERATORS: dict[str, Callable[[], Operator]] = {
    "denoising": lambda: Denoising(SHAPE),
    "super-resolution x4": lambda: SuperResolution(SHAPE, 4),
    "bicubic x2": lambda: BicubicDownsampling(SHAPE, 2),
    "bicubic x4": lambda: BicubicDownsampling(SHAPE, 4),
    "bicubic x8": lambda: BicubicDownsampling(SHAPE, 8),
    "blur reflect": lambda: Blur(SHAPE, 1.0, 5),
    "blur circular": lambda: Blur(SHAPE, (1.5, 0.6), 7, "circular"),
    "blur zero, kernel larger than the image": lambda: Blur(SHAPE, 1.2, 35, "zero"),
    "blur, all kept": lambda: Blur(SHAPE, 0.6, 5, cutoff=1e-9),
    "motion blur": lambda: Convolution(SHAPE, SHAKEN()),
    "turned Gaussian": lambda: Convolution(SHAPE, gaussian_kernel(9, (2.0, 0.7), 30.0)),
    "disk, reflect": lambda: Convolution(SHAPE, disk_kernel(5, 2.0), "reflect"),
    "convolution, odd sizes": lambda: Convolution((2, 7, 9), SHAKEN()),
    "box": lambda: Inpainting(SHAPE, partial(box_mask, size=4)),
    "free-form": lambda: Inpainting(SHAPE, freeform_mask),
    "mask per channel": lambda: Inpainting(SHAPE, _mask_per_channel()),
    "colour mean": lambda: Colorization(SHAPE),
    "colour luma": lambda: Colorization(SHAPE, "luma"),
    "Walsh-Hadamard": lambda: WalshHadamard(SHAPE, 0.3),
    "Walsh-Hadamard, all rows": lambda: WalshHadamard((1, 16, 16), 1.0),
    "Fourier": lambda: Fourier(SHAPE, partial(cartesian_lines, acceleration=2.0)),
    "Fourier, odd sizes": lambda: Fourier((2, 7, 9), partial(random_mask, missing=0.5)),
    "composition, colours first": lambda: Composition(
        SHAPE, [Colorization, partial(Blur, std=0.8, size=5), partial(SuperResolution, factor=2)]
    ),
    "composition, mask of an average": lambda: Composition(
        SHAPE, [partial(SuperResolution, factor=2), partial(Inpainting, mask=partial(box_mask, size=2))]
    ),
    "composition, Fourier gains of an average": lambda: Composition(
        SHAPE, [partial(SuperResolution, factor=2), partial(Convolution, kernel=SHAKEN())]
    ),
    "stack of convolutions": lambda: Stack(
        SHAPE, [partial(Convolution, kernel=SHAKEN()), partial(Convolution, kernel=motion_kernel(7, 4.0)), Denoising]
    ),
    "stack of masks": lambda: Stack(
        SHAPE, [partial(Inpainting, mask=partial(random_mask, missing=0.6, seed=i)) for i in range(2)]
    ),
}
# A and A^T alone.
PLAIN: dict[str, Callable[[], Operator]] = {
    "motion blur, reflect": lambda: PaddedConvolution(SHAPE, SHAKEN()),
    "motion blur, zero": lambda: PaddedConvolution(SHAPE, SHAKEN(), "zero"),
    "kernel larger than the image": lambda: PaddedConvolution(SHAPE, motion_kernel(41, 20.0, 70.0), "reflect"),
    "composition, blur then mask": lambda: Composition(
        SHAPE, [Blur, partial(Inpainting, mask=partial(box_mask, size=4))]
    ),
    "stack of blur and mask": lambda: Stack(SHAPE, [Blur, partial(Inpainting, mask=partial(box_mask, size=4))]),
}


def gaussian(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(operator: Operator) -> Tensor:
    """A as a matrix (M, N), float64: A of each unit vector."""
    n = torch.Size(operator.shape).numel()
    return operator(torch.eye(n, dtype=torch.float64).reshape(n, *operator.shape)).flatten(1).mT.contiguous()


@pytest.fixture(params=OPERATORS)
def operator(request: pytest.FixtureRequest) -> Operator:
    return OPERATORS[request.param]()


@pytest.fixture(params=OPERATORS | PLAIN)
def any_operator(request: pytest.FixtureRequest) -> Operator:
    return (OPERATORS | PLAIN)[request.param]()


def kept(operator: Operator) -> tuple[Tensor, Tensor, Tensor]:
    """(U, s, V) of the dense matrix, of the singular values above the cutoff."""
    u, s, vt = torch.linalg.svd(dense(operator), full_matrices=False)
    rank = int((s > max(operator.cutoff, 1e-12) * s[0]).sum())
    return u[:, :rank], s[:rank], vt[:rank].mT


def rows_of(call: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Tensor:
    """The matrix of a linear map of (B, *shape), column by column."""
    n = torch.Size(shape).numel()
    return call(torch.eye(n, dtype=torch.float64).reshape(n, *shape)).flatten(1).mT


def test_the_adjoint_is_the_transpose(any_operator: Operator) -> None:
    adjoint = rows_of(any_operator.adjoint, any_operator.measured_shape)
    torch.testing.assert_close(adjoint, dense(any_operator).mT, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inner_products(any_operator: Operator, dtype: torch.dtype) -> None:
    x, y = gaussian(4, *any_operator.shape, dtype=dtype), gaussian(4, *any_operator.measured_shape, dtype=dtype, seed=1)
    left, right = any_operator(x), any_operator.adjoint(y)
    assert left.dtype == right.dtype == dtype
    eps = torch.finfo(dtype).eps
    scale = (left * y).flatten(1).norm(dim=1)
    difference = ((left * y).flatten(1).sum(1) - (x * right).flatten(1).sum(1)).abs()
    assert (difference <= 50 * eps * (scale + 1)).all()


def test_pseudo_inverse_and_moore_penrose(operator: Operator) -> None:
    a, g = dense(operator), rows_of(operator.pinv, operator.measured_shape)
    u, s, v = kept(operator)
    torch.testing.assert_close(g, v / s @ u.mT, rtol=0, atol=1e-11)
    torch.testing.assert_close(g @ a @ g, g, rtol=0, atol=1e-11)
    torch.testing.assert_close((a @ g).mT, a @ g, rtol=0, atol=1e-11)
    torch.testing.assert_close((g @ a).mT, g @ a, rtol=0, atol=1e-11)
    # A A^+ A = A but for what the cutoff leaves out
    assert torch.linalg.matrix_norm(a @ g @ a - a, 2) <= operator.cutoff * s[0] * (1 + 1e-9) + 1e-12


def test_the_projector(operator: Operator) -> None:
    p, (_, _, v) = rows_of(operator.project, operator.shape), kept(operator)
    torch.testing.assert_close(p, v @ v.mT, rtol=0, atol=1e-11)
    torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-11)
    torch.testing.assert_close(p, p.mT, rtol=0, atol=1e-11)
    x = gaussian(2, *operator.shape)
    whole = operator.pinv(operator(x))
    torch.testing.assert_close(operator.project(x), whole, rtol=0, atol=1e-11)


def test_solve_with_noise(operator: Operator) -> None:
    a, y = dense(operator), gaussian(3, *operator.measured_shape)
    r2, noise2 = torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64), torch.tensor([0.1, 1e-4, 0.3], dtype=torch.float64)
    solved = operator.solve(y, r2, noise2)
    for i in range(3):
        matrix = r2[i] * a @ a.mT + noise2[i] * torch.eye(len(a)).double()
        expected = torch.linalg.solve(matrix, y[i].flatten())
        torch.testing.assert_close(solved[i].flatten(), expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    torch.testing.assert_close(operator.solve(y[:1], 0.5, 0.1), solved[:1], rtol=1e-12, atol=1e-12)


def test_solve_without_noise_is_the_pseudo_inverse(operator: Operator) -> None:
    (u, s, _), y = kept(operator), gaussian(2, *operator.measured_shape)
    expected = y.flatten(1) @ (u / (0.7 * s**2)) @ u.mT
    solved = operator.solve(y, 0.7, torch.tensor([0.0, 0.2], dtype=torch.float64))
    torch.testing.assert_close(solved[0].flatten(), expected[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solved[1:], operator.solve(y[1:], 0.7, 0.2), rtol=1e-12, atol=1e-12)
    restored = operator.adjoint(0.7 * operator.solve(y, 0.7, 0.0))
    torch.testing.assert_close(restored, operator.pinv(y), rtol=0, atol=1e-9)


def test_spectral_functions(operator: Operator) -> None:
    (_, s, v), x = kept(operator), gaussian(2, *operator.shape)
    scale = torch.tensor([1.0, 3.0], dtype=torch.float64).reshape(2, 1, 1, 1)  # a function for each item
    out = operator.spectral(x, lambda s: torch.exp(-scale * s) + s**2)
    for i in range(2):
        inside = v @ ((torch.exp(-scale[i].flatten() * s) + s**2) * (v.mT @ x[i].flatten()))
        outside = x[i].flatten() - v @ (v.mT @ x[i].flatten())  # f(0) = 1
        torch.testing.assert_close(out[i].flatten(), inside + outside, rtol=0, atol=1e-11)
    torch.testing.assert_close(
        operator.spectral(x, lambda s: (s > 0).double()), operator.project(x), rtol=0, atol=1e-12
    )


def test_the_decomposition(operator: Operator) -> None:
    x, y = gaussian(2, *operator.shape), gaussian(2, *operator.measured_shape)
    torch.testing.assert_close(operator.u(operator.singular * operator.vt(x)), operator(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(operator.v(operator.singular * operator.ut(y)), operator.adjoint(y), rtol=0, atol=1e-12)
    if operator.v_complete:
        torch.testing.assert_close(operator.v(operator.vt(x)), x, rtol=0, atol=1e-12)
    if operator.u_complete:
        torch.testing.assert_close(operator.u(operator.ut(y)), y, rtol=0, atol=1e-12)
    if operator.flat:
        torch.testing.assert_close(operator(operator.adjoint(y)), operator.singular.square() * y, rtol=0, atol=1e-12)


def test_float32_is_float64_to_1e_5(operator: Operator) -> None:
    x = gaussian(2, *operator.shape)
    y = operator(x)
    calls: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
        "A": (operator, x),
        "A^T": (operator.adjoint, y),
        "A^+": (operator.pinv, y),
        "A^+ A": (operator.project, x),
        "solve": (lambda y: operator.adjoint(operator.solve(y, 0.5, 0.05**2)), y),
        "solve, noiseless": (lambda y: operator.adjoint(operator.solve(y, 0.5, 0.0)), y),
        "spectral": (lambda x: operator.spectral(x, lambda s: s**2 / (s**2 + 0.01)), x),
    }
    for name, (call, argument) in calls.items():
        exact, single = call(argument), call(argument.float())
        assert single.dtype == torch.float32, name
        assert (single.double() - exact).norm() <= 1e-5 * exact.norm(), name


def test_a_batch_is_its_items(operator: Operator) -> None:
    x, y = gaussian(3, *operator.shape), gaussian(3, *operator.measured_shape)
    r2, noise2 = torch.tensor([0.5, 1.0, 0.2], dtype=torch.float64), torch.tensor([0.1, 0.0, 0.3], dtype=torch.float64)
    both = [operator(x), operator.adjoint(y), operator.pinv(y), operator.project(x), operator.solve(y, r2, noise2)]
    for i in range(3):
        one, x1, y1 = slice(i, i + 1), x[i : i + 1], y[i : i + 1]
        single = [operator(x1), operator.adjoint(y1), operator.pinv(y1), operator.project(x1)]
        single.append(operator.solve(y1, r2[i], noise2[i]))
        for a, b in zip(both, single, strict=True):
            torch.testing.assert_close(a[one], b, rtol=1e-12, atol=1e-12)


def test_gradients(any_operator: Operator) -> None:
    x = gaussian(1, *any_operator.shape).requires_grad_()
    y = gaussian(1, *any_operator.measured_shape).requires_grad_()
    assert torch.autograd.gradcheck(any_operator, x, fast_mode=True)
    assert torch.autograd.gradcheck(any_operator.adjoint, y, fast_mode=True)
    if any_operator.refusal is None:
        assert torch.autograd.gradcheck(lambda y: any_operator.solve(y, 0.5, 0.1), y, fast_mode=True)
        assert torch.autograd.gradcheck(any_operator.project, x, fast_mode=True)
    (gradient,) = torch.autograd.grad(any_operator(x), x, torch.ones(1, *any_operator.measured_shape).double())
    torch.testing.assert_close(gradient, any_operator.adjoint(torch.ones_like(y)), rtol=0, atol=1e-12)


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            self.numel = max(self.numel, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return out


@pytest.mark.parametrize("name", OPERATORS | PLAIN)
def test_no_matrix_of_the_image_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built and used at 3 x 64 x 64: a dense A^T A would have 12 288 times as many numbers as the image."""
    monkeypatch.setitem(globals(), "SHAPE", (3, 64, 64))
    with Largest() as seen:
        operator = (OPERATORS | PLAIN)[name]()
        y = operator(torch.zeros(1, *operator.shape))
        operator.adjoint(y)
        if operator.refusal is None:
            operator.pinv(y)
            operator.solve(y, 1.0, 0.1)
            operator.spectral(torch.zeros(1, *operator.shape), torch.exp)
    assert seen.numel <= 8 * 3 * 64 * 64


def test_autocast_changes_nothing(operator: Operator) -> None:
    x = gaussian(1, *operator.shape, dtype=torch.float32)
    y = operator(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(operator(x), y)
        assert torch.equal(operator.pinv(y), operator.pinv(y.clone()))
        assert operator.solve(y, 1.0, 0.1).dtype == torch.float32


def test_what_inference_mode_built_serves_autograd(any_operator: Operator) -> None:
    with torch.inference_mode():
        any_operator(torch.zeros(1, *any_operator.shape))
        if any_operator.refusal is None:
            any_operator.project(torch.zeros(1, *any_operator.shape))
    x = gaussian(1, *any_operator.shape, dtype=torch.float32).requires_grad_()
    out = any_operator.project(x) if any_operator.refusal is None else any_operator(x)
    out.sum().backward()
    assert x.grad is not None


def test_a_change_of_dtype_is_noticed(operator: Operator) -> None:
    x = gaussian(1, *operator.shape)
    single = operator(x.float())
    assert (operator(x) - single).abs().max() > 0 or torch.equal(operator(x).float(), single)
    assert operator(x).dtype == torch.float64
    torch.testing.assert_close(operator(x), (dense(operator) @ x.flatten()).reshape(1, *operator.measured_shape))


@pytest.mark.parametrize("name", PLAIN)
def test_refusals(name: str) -> None:
    operator = PLAIN[name]()
    y = operator(gaussian(1, *operator.shape))
    calls: list[Callable[[], Tensor]] = [
        lambda: operator.pinv(y),
        lambda: operator.solve(y, 1.0, 0.1),
        lambda: operator.project(gaussian(1, *operator.shape)),
        lambda: operator.spectral(gaussian(1, *operator.shape), torch.exp),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"alone; a pseudo-inverse or solve needs [^\n]*$"):
            call()


def test_bad_input() -> None:
    operator = SuperResolution((3, 8, 8), 2)
    x, y = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"takes a batch \(B, 3, 8, 8\) as its image, got \(2, 3, 16, 16\)"):
        operator(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"got \(3, 8, 8\)"):
        operator(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="as its measurement"):
        operator.pinv(x)
    with pytest.raises(ValueError, match=r"float32 or float64, got torch\.float16"):
        operator(x.half())
    with pytest.raises(ValueError, match=r"noise2 is a variance and cannot be negative or NaN, got -0\.1"):
        operator.solve(y, 1.0, -0.1)
    with pytest.raises(ValueError, match="noise2 is a variance"):
        operator.solve(y, 1.0, float("nan"))
    with pytest.raises(ValueError, match="both 0"):
        operator.solve(y, torch.tensor([1.0, 0.0]), 0.0)
    with pytest.raises(ValueError, match="one for each of the 2 items"):
        operator.solve(y, torch.ones(3), 0.1)
    with pytest.raises(ValueError, match="0 <= cutoff < 1"):
        Blur((3, 8, 8), cutoff=1.0)
    with pytest.raises(ValueError, match=r"a shape is \(C, H, W\)"):
        Denoising((8, 8))  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda(operator: Operator) -> None:
    x = gaussian(2, *operator.shape)
    y = operator(x)
    for a, b in (
        (operator(x.cuda()), y),
        (operator.adjoint(y.cuda()), operator.adjoint(y)),
        (operator.pinv(y.cuda()), operator.pinv(y)),
        (operator.solve(y.cuda(), torch.tensor([0.5, 1.0]), 0.1), operator.solve(y, torch.tensor([0.5, 1.0]), 0.1)),
        (operator.spectral(x.cuda(), torch.exp), operator.spectral(x, torch.exp)),
    ):
        assert a.is_cuda
        torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-10)
