"""Sampling under Lightning's Trainer."""

import time

import lightning as L
import pytest
import torch
from torch import nn

from steadyflow.denoisers import Denoiser, EpsDenoiser, GaussianMixture
from steadyflow.grids import Uniform
from steadyflow.modules.sampling import IndexBatches, Sampling, class_labels
from steadyflow.noise import NoiseSource
from steadyflow.paths import VariancePreserving
from steadyflow.samplers import DDIM, Heun

PATH = VariancePreserving()
MEANS = torch.tensor([[0.8, 0.0], [-0.8, 0.3], [0.0, -0.9]])
MIXTURE = GaussianMixture(MEANS, [0.01, 0.02, 0.03], labels=[0, 1, 2])


class Collect(L.Callback):
    def __init__(self):
        self.batches = []

    def on_predict_batch_end(self, trainer, pl_module, outputs, *_):
        self.batches.append(outputs)


def predict(module, **options):
    """The samples in the order of their numbers, and the batches they came in."""
    collect = Collect()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    L.Trainer(accelerator="cpu", callbacks=[collect], **quiet, **options).predict(module, return_predictions=False)
    x, index = (torch.cat([getattr(b, name) for b in collect.batches]) for name in ("x", "indices"))
    return x[index.argsort()], collect.batches


def sampling(n=11, batch_size=4, denoiser=MIXTURE, label=None, sampler=None, shape=(2,), **options):
    sampler = sampler or DDIM(PATH, Uniform(), steps=5, eta=1.0)
    return Sampling(denoiser, sampler, shape, 3, torch.arange(n), label, batch_size=batch_size, **options)


@pytest.mark.parametrize("mode", ["balanced", "random", "auto", None, 7])
def test_a_label_depends_on_its_index_alone(mode):
    whole = class_labels(mode, torch.arange(40), 10, seed=5)
    some = torch.tensor([31, 2, 17])
    assert class_labels(mode, some, 10, seed=5).tolist() == whole[some].tolist()


def test_labels_are_what_they_are_called():
    index = torch.arange(3000)
    assert class_labels("balanced", index[:12], 10, 0).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert class_labels("auto", index[:12], 10, 0).tolist() == class_labels("balanced", index[:12], 10, 0).tolist()
    assert set(class_labels(None, index, 10, 0).tolist()) == {10}
    assert set(class_labels(4, index, 10, 0).tolist()) == {4}
    assert class_labels("auto", index, 0, 0) is None
    assert class_labels(None, index, 0, 0) is None
    counts = class_labels("random", index, 10, 0).bincount(minlength=10)
    assert ((counts - 300) ** 2 / 300).sum() < 27.9  # chi-square, 9 degrees of freedom, 1 in 1000
    other = class_labels("random", index, 10, 1)
    assert 200 < (other == class_labels("random", index, 10, 0)).sum() < 400  # independent: 300 +- 16


@pytest.mark.parametrize(
    ("mode", "classes", "message"),
    [
        ("balanced", 0, "label=balanced, but this checkpoint has no classes; set label=null"),
        (3, 0, "label=3, but this checkpoint has no classes"),
        (10, 10, r"label=10, but this checkpoint's classes are 0\.\.9"),
        ("even", 10, "label must be auto, balanced, random, null or a class number; got 'even'"),
        (True, 10, "got True"),
    ],
)
def test_a_label_that_cannot_be_is_refused(mode, classes, message):
    with pytest.raises(ValueError, match=message):
        class_labels(mode, torch.arange(3), classes, 0)


@pytest.mark.parametrize(("n", "batch_size", "world"), [(0, 4, 2), (1, 4, 3), (17, 4, 2), (16, 4, 2), (5, 1, 8)])
def test_processes_share_the_samples_out(n, batch_size, world):
    index = torch.arange(100, 100 + n)
    shares = [list(IndexBatches(index, index % 7, batch_size, rank, world)) for rank in range(world)]
    given = torch.cat([batch.indices for share in shares for batch in share])
    assert sorted(given.tolist()) == index.tolist()
    for share in shares:
        assert share  # the hooks at the end run on every process
        assert all(len(batch.indices) <= batch_size and (batch.label == batch.indices % 7).all() for batch in share)
    assert max(map(len, shares)) <= min(map(len, shares)) + 1


def test_samples_do_not_depend_on_the_batch_size():
    label = class_labels("balanced", torch.arange(11), 3, 0)
    whole, _ = predict(sampling(batch_size=32, label=label, num_classes=3))
    for batch_size in (1, 5):
        x, batches = predict(sampling(batch_size=batch_size, label=label, num_classes=3))
        assert {len(b.indices) for b in batches} == {batch_size, 11 % batch_size} - {0}
        torch.testing.assert_close(x, whole, rtol=0, atol=1e-6)
    assert ((whole - MEANS[label]).norm(dim=1) < 0.6).all()  # each in its own mode, of standard deviation < 0.18


def test_guidance_is_the_guided_denoiser_and_counted():
    label = torch.tensor([0, 1, 2, 0])
    sampler = Heun(PATH, Uniform(), steps=6)
    plain = sampling(4, label=label, num_classes=3, sampler=sampler)
    guided = sampling(4, label=label, num_classes=3, sampler=sampler, guidance_scale=3.0)
    _, _ = predict(plain)
    x, _ = predict(guided)
    assert plain.denoiser.rows / plain.made == 11  # 2 N - 1
    assert guided.denoiser.rows / guided.made == 22

    class ByHand(Denoiser):
        def forward(self, x, alpha, sigma, label):
            null = MIXTURE(x, alpha, sigma, label=torch.full_like(label, 3))
            return null + 3.0 * (MIXTURE(x, alpha, sigma, label=label) - null)

    expected = sampler(ByHand(), NoiseSource(3, range(4), (2,)), label=label)
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-5)


def test_guidance_without_a_class_is_refused():
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0 guides towards a class"):
        sampling(guidance_scale=2.0)
    with pytest.raises(ValueError, match="guides towards a class"):
        sampling(3, label=torch.full((3,), 10), guidance_scale=2.0, num_classes=10)


class Slow(Denoiser):
    """Takes 50 ms the first time, then none."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, alpha, sigma):
        self.calls += 1
        time.sleep(0.5 if self.calls == 1 else 0.0)
        return x


@pytest.mark.parametrize(("n", "timed"), [(12, 8), (3, 3), (6, 6)])
def test_warm_up_is_not_timed(n, timed):
    module = sampling(n, denoiser=Slow())
    predict(module)
    assert module.timed == timed
    assert module.seconds < 0.4
    assert module.denoiser.rows / module.made == 5  # the warm-up call is not counted


class Eps(nn.Module):
    """A network that remembers in which precision it ran."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.eye(2) * 0.3), set()

    def forward(self, x, t):
        y = x @ self.weight
        self.seen.add(y.dtype)
        return y


@pytest.mark.parametrize(
    ("precision", "network", "state", "error"),
    [
        ("bf16-mixed", torch.bfloat16, torch.float32, 2e-2),
        ("bf16-true", torch.bfloat16, torch.float32, 2e-2),
        ("64-true", torch.float64, torch.float64, 1e-5),
    ],
)
def test_precision_reaches_the_network_alone(precision, network, state, error):
    states = set()

    class Spy(DDIM):
        def update(self, denoiser, x, *args, **condition):
            states.add(x.dtype)
            return super().update(denoiser, x, *args, **condition)

    reference, _ = predict(sampling(denoiser=EpsDenoiser(Eps(), PATH)))
    eps = Eps()
    x, _ = predict(sampling(denoiser=EpsDenoiser(eps, PATH), sampler=Spy(PATH, Uniform(), 5, 1.0)), precision=precision)
    assert (eps.seen, states) == ({network}, {state})
    assert 0 < (x - reference).abs().max() / reference.abs().max() < error


def test_nan_names_the_samples_and_the_step():
    class Broken(Denoiser):
        def forward(self, x, alpha, sigma):
            return torch.where(x.new_tensor(float(sigma)) < 0.9, float("nan"), x)

    module = sampling(denoiser=Broken())
    with pytest.raises(FloatingPointError, match=r"samples 0 to 3: the state is not finite after step \d of 5"):
        predict(module)


def test_images_come_out_as_bytes():
    class Ramp(Denoiser):
        def forward(self, x, alpha, sigma):
            return torch.linspace(-1.2, 1.2, 16).reshape(1, 1, 4, 4).expand_as(x)

    x, _ = predict(sampling(2, denoiser=Ramp(), shape=(1, 4, 4), sampler=DDIM(PATH, Uniform(), 3)))
    ramp = ((torch.linspace(-1.2, 1.2, 16).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(x, ramp.reshape(1, 1, 4, 4).expand(2, -1, -1, -1))
