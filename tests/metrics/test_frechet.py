"""FID: against clean-fid, closed forms, and its own bootstrap done by hand."""

import numpy as np
import pytest
import torch
from cleanfid import fid as cleanfid
from torch import Tensor

from steadyflow.metrics import FrechetDistance, frechet_distance
from steadyflow.metrics.reference import gaussian


def features(n: int, d: int, seed: int) -> Tensor:
    """Correlated features away from the origin, as a network's are."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=g) / d**0.5
    return (torch.randn(n, d, generator=g) @ mixing + torch.rand(d, generator=g)).relu()


def spread(metric: FrechetDistance, x: Tensor, order: Tensor, batch: int) -> FrechetDistance:
    for rows in order.split(batch):
        metric.update(rows, x[rows])
    return metric


def of(x: Tensor, y: Tensor, bootstrap: int = 0) -> dict[str, Tensor]:
    metric = FrechetDistance(bootstrap)
    metric.set_reference(*gaussian(y))
    return spread(metric, x, torch.arange(len(x)), 64).compute()


@pytest.mark.filterwarnings("ignore:The `disp` argument:DeprecationWarning")
def test_equals_clean_fid() -> None:
    for d, n in ((8, 100), (64, 500)):
        x, y = features(n, d, 0), features(n + 50, d, 1)
        theirs = cleanfid.fid_from_feats(x.double().numpy(), y.double().numpy())
        assert abs(float(of(x, y)["fid"]) - theirs) < 1e-6
        assert theirs > 0.1


def test_commuting_covariances_have_a_closed_form_even_when_singular() -> None:
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(30, 30, generator=g, dtype=torch.float64)).Q
    a, b = torch.rand(30, generator=g, dtype=torch.float64), torch.rand(30, generator=g, dtype=torch.float64)
    a[10:20], b[15:] = 0, 0
    ca, cb = (basis * a) @ basis.T, (basis * b) @ basis.T
    mean = torch.randn(30, generator=g, dtype=torch.float64)
    exact = mean.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert abs(frechet_distance(mean, ca, torch.zeros_like(mean), cb) - exact) < 1e-12


def test_fewer_images_than_features() -> None:
    """n < d: the covariance is singular. The trace of the root is the nuclear norm of the centred factors."""
    x, y = features(20, 64, 0), features(500, 64, 1)
    xc, yc = (v.double() - v.double().mean(0) for v in (x, y))
    nuclear = np.linalg.norm((xc @ yc.T).numpy() / (19 * 499) ** 0.5, "nuc")
    means = (x.double().mean(0) - y.double().mean(0)).square().sum()
    exact = means + xc.square().sum() / 19 + yc.square().sum() / 499 - 2 * nuclear
    assert abs(of(x, y)["fid"] - exact) < 1e-8 * exact


def test_translation_adds_its_square_and_identical_sets_have_none() -> None:
    x, shift = features(200, 16, 0).double(), torch.linspace(-1, 1, 16, dtype=torch.float64)
    assert abs(of(x, x)["fid"]) < 1e-10
    assert abs(of(x + shift, x)["fid"] - shift.square().sum()) < 1e-10


def test_batches_and_their_order_do_not_matter() -> None:
    x, reference, results = features(300, 16, 0), gaussian(features(200, 16, 1)), []
    for order, batch in ((torch.arange(300), 300), (torch.arange(300), 7), (torch.randperm(300), 64)):
        metric = FrechetDistance(bootstrap=5)
        metric.set_reference(*reference)
        results.append(spread(metric, x, order, batch).compute())
    for other in results[1:]:
        assert abs(other["fid"] - results[0]["fid"]) < 1e-10
        assert abs(other["fid_std"] - results[0]["fid_std"]) < 1e-10


def test_bootstrap_is_the_spread_over_resampled_images() -> None:
    x, y = features(5000, 8, 0), features(400, 8, 1)  # two blocks of 4096
    random, values = torch.Generator().manual_seed(3), []
    for _ in range(6):
        drawn = torch.randint(len(x), (len(x),), generator=random)
        values.append(of(x[drawn], y)["fid"])
    metric = FrechetDistance(bootstrap=6, seed=3)
    metric.set_reference(*gaussian(y))
    result = spread(metric, x, torch.arange(len(x)), 1000).compute()
    assert abs(result["fid_std"] - torch.stack(values).std()) < 1e-9


def test_standard_error_falls_as_the_root_of_the_count_and_covers_the_true_one() -> None:
    y, g = features(4000, 8, 1), torch.Generator().manual_seed(0)
    pool = features(20000, 8, 0)
    small, large = (of(pool[torch.randint(20000, (n,), generator=g)], y, 50)["fid_std"] for n in (500, 8000))
    assert 2.8 < small / large < 5.7  # 4, the estimates themselves being 10 % off
    drawn = torch.stack([of(pool[torch.randint(20000, (500,), generator=g)], y)["fid"] for _ in range(40)])
    assert 0.7 < small / drawn.std() < 2


def test_refusals() -> None:
    metric = FrechetDistance()
    metric.set_reference(torch.zeros(4), torch.eye(4))
    metric.update(torch.tensor([0]), torch.ones(1, 4))
    with pytest.raises(ValueError, match="at least 2 images for a covariance, got 1"):
        metric.compute()
    metric.update(torch.tensor([0]), torch.ones(1, 4))
    with pytest.raises(ValueError, match="image 0 was given twice"):
        metric.compute()
    with pytest.raises(ValueError, match="bootstrap must be 0"):
        FrechetDistance(bootstrap=1)
