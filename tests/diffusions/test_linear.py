"""Psi, Sigma, L, R and Psi^ of every linear diffusion against their differential equations and written-down values."""

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from scipy.integrate import solve_ivp

from steadyflow.diffusions import BDM, CLD, Isotropic, LinearDiffusion
from steadyflow.diffusions.linear import factor, inverse
from steadyflow.paths import VariancePreserving

F64 = torch.float64
DIFFUSIONS = {
    "vp": Isotropic(VariancePreserving()),
    "bdm": BDM(VariancePreserving(), size=(3, 4), blur_max=2.0, floor=0.1),
    "cld": CLD(),
    "another cld": CLD(beta=2.0, mass=1.0, damping=2.0, initial=0.5),
}
every = pytest.mark.parametrize("diffusion", DIFFUSIONS.values(), ids=DIFFUSIONS.keys())


def solved(rate, start: torch.Tensor, t0: float, t1: float) -> torch.Tensor:
    """X(t1) of dX/dt = rate(t, X), X(t0) = start: DOP853 at tolerance 1e-11."""
    solution = solve_ivp(
        lambda t, x: rate(t, torch.from_numpy(x).reshape(start.shape)).numpy().ravel(),
        (t0, t1),
        start.numpy().ravel(),
        method="DOP853",
        rtol=1e-11,
        atol=1e-12,
    )
    return torch.from_numpy(solution.y[:, -1]).reshape(start.shape)


def noise_covariance(diffusion: LinearDiffusion, t: float) -> torch.Tensor:
    return diffusion.noise(t) @ diffusion.noise(t).mT


@every
def test_transition_solves_its_equation(diffusion):
    eye = torch.eye(diffusion.variables, dtype=F64).expand_as(diffusion.transition(0.5, 0.5)).contiguous()
    torch.testing.assert_close(diffusion.transition(0.5, 0.5), eye, rtol=0, atol=1e-14)
    for s, t in ((0.1, 0.9), (0.9, 0.3)):
        exact = solved(lambda u, x: diffusion.drift(u) @ x, eye, s, t)
        torch.testing.assert_close(diffusion.transition(t, s), exact, rtol=1e-9, atol=1e-9)


@every
def test_covariance_solves_its_equation_from_the_data_on(diffusion):
    def rate(t, x):
        return diffusion.drift(t) @ x + x @ diffusion.drift(t).mT + noise_covariance(diffusion, t)

    exact = solved(rate, diffusion.covariance(1e-12), 1e-12, 0.7)
    torch.testing.assert_close(diffusion.covariance(0.7), exact, rtol=1e-9, atol=1e-11)


@every
def test_roots_of_the_covariance(diffusion):
    t = torch.tensor([1e-8, 1e-4, 0.02, 0.3, 1.0], dtype=F64)
    lower, root, covariance = diffusion.cholesky(t), diffusion.root(t), diffusion.covariance(t)
    assert (lower.triu(1) == 0).all()
    for square in (lower @ lower.mT, root @ root.mT):
        torch.testing.assert_close(square, covariance, rtol=1e-12, atol=1e-18)
    torch.testing.assert_close(factor(covariance[2:]), lower[2:], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(root[-1], lower[-1], rtol=0, atol=0)  # the reference, t = 1
    scale = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    assert (inverse(root) @ root - torch.eye(diffusion.variables, dtype=F64)).abs().max() < 1e-6
    assert (scale > 0).all()


@every
def test_root_solves_its_equation(diffusion):
    """dR/dt = (F + 1/2 G G^T Sigma^-1) R, Eq. 7.17, with the right side from the definitions and not from `rate`."""

    def rate(t, x):
        return (diffusion.drift(t) + 0.5 * noise_covariance(diffusion, t) @ inverse(diffusion.covariance(t))) @ x

    for s, t in ((1.0, 0.02), (0.2, 0.7)):
        exact = solved(rate, diffusion.root(s), s, t)
        torch.testing.assert_close(diffusion.root(t), exact, rtol=1e-9, atol=1e-9)


@every
def test_rate_is_half_g_gt_root_inverse_transposed(diffusion):
    for t in (0.01, 0.4, 0.9):
        exact = 0.5 * noise_covariance(diffusion, t) @ inverse(diffusion.root(t)).mT
        torch.testing.assert_close(diffusion.rate(t), exact, rtol=1e-9, atol=1e-9)


@every
def test_damped_transition_solves_its_equation(diffusion):
    lambdas = torch.tensor([0.0, 0.5, 1.0], dtype=F64).reshape(3, *[1] * diffusion.root(1.0).ndim)

    def rate(t, x):  # (lambda, ...)
        pull = 0.5 * noise_covariance(diffusion, t) @ inverse(diffusion.covariance(t))
        return (diffusion.drift(t) + (1 + lambdas**2) * pull) @ x

    t, s = torch.tensor([0.05, 0.2, 0.6], dtype=F64), torch.tensor([0.9, 0.3, 0.65], dtype=F64)
    found = torch.stack([diffusion.damped_transition(t, s, float(lambda_)) for lambda_ in lambdas])
    for k in range(3):
        eye = torch.eye(diffusion.variables, dtype=F64).expand_as(found[:, k]).contiguous()
        exact = solved(rate, eye, float(s[k]), float(t[k]))
        torch.testing.assert_close(found[:, k], exact, rtol=1e-9, atol=1e-9)
    closed = diffusion.root(t) @ inverse(diffusion.root(s))
    torch.testing.assert_close(found[0], closed, rtol=1e-9, atol=1e-9)
    closed = diffusion.covariance(t) @ diffusion.transition(s, t).mT @ inverse(diffusion.covariance(s))
    torch.testing.assert_close(found[2], closed, rtol=1e-9, atol=1e-9)


CLD_VALUES = {  # the oracle: Psi(t, 0); Sigma xx, xv, vv; L xx, xv, vv; theta; R
    0.02: [0.9884867952, 0.2726860125, -0.06817150312, 0.7158007827]
    + [0.005048016979, 0.02054130396, 0.1223836636, 0.07104939816, 0.2891129903, 0.1969704101, 9.191839465]
    + [-0.069130516, -0.01640087606, -0.2358365215, -0.2583888518],
    0.1: [0.8087921354, 0.7189263426, -0.1797315856, 0.08986579282]
    + [0.221810061, 0.1298598404, 0.2157583505, 0.4709671549, 0.2757301417, 0.3738064198, 7.530079948]
    + [0.1498936687, -0.4464772661, 0.4421248248, -0.1424218727],
    0.3: [0.3084410412, 0.4354461758, -0.1088615439, -0.1270051346]
    + [0.8593569148, 0.046850304, 0.2342778912, 0.9270150564, 0.05053888141, 0.4813768926, 5.623146256]
    + [0.7323124968, 0.5683971516, -0.2552310219, 0.4112602785],
    0.6: [0.04773253288, 0.07900557167, -0.01975139292, -0.03127303879]
    + [0.996223554, 0.001535762646, 0.2493751618, 0.9981099909, 0.001538670747, 0.4993724004, 3.200350693]
    + [-0.9963874957, 0.05861324502, -0.03086127725, -0.4984202477],
    1.0: [0.003019163651, 0.005367402046, -0.001341850512, -0.002348238395]
    + [0.9999839705, 7.076211786e-6, 0.249996876, 0.9999919852, 7.076268501e-6, 0.499996876, 0.0]
    + [0.9999919852, 0.0, 7.076268501e-6, 0.499996876],
}


@pytest.mark.parametrize("t", CLD_VALUES)
def test_cld_against_written_values(t):
    cld = CLD()
    sigma, lower = cld.covariance(t), cld.cholesky(t)
    found = torch.cat(
        [
            cld.transition(t, 0.0).flatten(),
            torch.stack([sigma[0, 0], sigma[0, 1], sigma[1, 1], lower[0, 0], lower[1, 0], lower[1, 1], cld.angle(t)]),
            cld.root(t).flatten(),
        ]
    )
    np.testing.assert_allclose(found, CLD_VALUES[t], rtol=2e-9, atol=1e-12)


def test_cld_step_against_written_values():
    psi, root = CLD().transition(0.5, 1.0), CLD().root
    np.testing.assert_allclose(psi.flatten(), [-163.7944501, -436.7852003, 109.1963001, 272.9907502], rtol=1e-9)
    pull = (root(0.5) - psi @ root(1.0)).flatten()
    np.testing.assert_allclose(pull, [163.1481325, 219.1438529, -109.5781216, -136.8153829], rtol=1e-9)


def test_cld_is_stationary_in_its_own_noise():
    cld = CLD()
    stationary = torch.diag(torch.tensor([1.0, 0.25], dtype=F64))
    change = cld.drift(0.5) @ stationary
    change = change + change.mT + noise_covariance(cld, 0.5)
    assert change.abs().max() < 1e-14


def test_cld_at_the_data_end():
    """R_0 exists: its rows are the limit of L_t Rot(theta_t), and its data row vanishes."""
    cld = CLD()
    near, limit = cld.root(1e-12), cld.root(0.0)
    assert limit[0].abs().max() < 1e-30
    torch.testing.assert_close(near, limit, rtol=0, atol=1e-4)  # O(sqrt t)
    torch.testing.assert_close(limit @ limit.T, cld.covariance(0.0), rtol=1e-12, atol=1e-30)


def test_isotropic_is_its_path():
    path = VariancePreserving()
    diffusion, t = Isotropic(path), torch.tensor([0.1, 0.7], dtype=F64)
    mean, covariance = diffusion(t)
    torch.testing.assert_close(mean[:, 0, 0], path(t)[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(covariance[:, 0, 0], path(t)[1] ** 2, rtol=1e-14, atol=0)
    # dx/dt = F x + B eps is the path's own velocity for x_0 = 0.3, eps = -1.1
    (alpha, sigma), (dalpha, dsigma) = path(t), path.derivative(t)
    x = alpha * 0.3 - sigma * 1.1
    found = diffusion.drift(t)[:, 0, 0] * x - diffusion.rate(t)[:, 0, 0] * 1.1
    torch.testing.assert_close(found, dalpha * 0.3 - dsigma * 1.1, rtol=1e-12, atol=0)


def test_bdm_basis_is_the_orthonormal_cosine_transform():
    bdm = DIFFUSIONS["bdm"]
    x = torch.randn(2, 5, 3, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(bdm.to_basis(x), dctn(x.numpy(), axes=(2, 3), norm="ortho"), atol=1e-13)
    torch.testing.assert_close(bdm.from_basis(bdm.to_basis(x)), x, rtol=0, atol=1e-14)


def test_bdm_keeps_its_precision_under_autocast():
    bdm, x = DIFFUSIONS["bdm"], torch.linspace(-1, 1, 24).reshape(2, 1, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = bdm.to_basis(x)
    assert torch.equal(y, bdm.to_basis(x))


def test_bdm_without_blur_is_its_path():
    path, t = VariancePreserving(), torch.tensor([0.2, 0.9], dtype=F64)
    mean, _ = BDM(path, size=4, blur_max=0.0)(t)
    torch.testing.assert_close(mean[..., 0, 0], path(t)[0][:, None, None].expand(2, 4, 4), rtol=1e-14, atol=0)


@every
def test_a_block_acts_on_each_item_as_it_does_alone(diffusion):
    g = torch.Generator().manual_seed(0)
    u = torch.randn(2, 3 * diffusion.variables, 3, 4, dtype=F64, generator=g)
    t = torch.tensor([0.2, 0.8], dtype=F64)
    both = diffusion.apply(diffusion.root(t), u)
    for b in range(2):
        torch.testing.assert_close(diffusion.apply(diffusion.root(t[b]), u[b : b + 1]), both[b : b + 1])
    back = diffusion.apply(inverse(diffusion.root(t)), both)
    torch.testing.assert_close(back, u, rtol=0, atol=1e-10)


def test_data_is_the_first_variable():
    cld = CLD()
    x = torch.arange(12.0).reshape(2, 3, 2)
    u = cld.lift(x)
    assert u.shape == (2, 6, 2)
    torch.testing.assert_close(cld.data(u), x, rtol=0, atol=0)
    assert (u[:, 3:] == 0).all()
    moved = cld.apply(torch.tensor([[1.0, 0.0], [2.0, 1.0]], dtype=F64), u)
    torch.testing.assert_close(moved[:, 3:], 2 * x, rtol=0, atol=0)  # v += 2 x


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CLD(mass=0.3), "set mass=0.25"),
        (lambda: CLD(initial=0.0), "initial > 0"),
        (lambda: BDM(VariancePreserving(), 8, floor=0.0), "0 < floor"),
        (lambda: BDM(VariancePreserving(), 8).to_basis(torch.zeros(1, 1, 4, 4)), "set path.size"),
        (lambda: CLD().ratio(0.5), "quadratic or uniform"),
    ],
)
def test_mistakes_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
