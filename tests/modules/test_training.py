"""Training: one process = many, accumulated = whole, interrupted = uninterrupted, averaged weights, refusals."""

import json
import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

from steadyflow import paths
from steadyflow.callbacks.last_checkpoint import AtomicCheckpointIO, LastCheckpoint
from steadyflow.data import GaussianMixtureSamples
from steadyflow.data.batches import TrainingBatches
from steadyflow.denoisers import EpsDenoiser, GaussianMixture, VelocityDenoiser
from steadyflow.modules import losses
from steadyflow.modules.training import EMA, DenoiserTraining, TrainingData, learning_rate
from steadyflow.networks import MLP

MEANS = [[1.5, 0.0], [-1.0, 1.0], [0.0, -1.5]]
MIXTURE = {"means": MEANS, "covariances": [[0.1, 0.1], [0.2, 0.2], [0.05, 0.05]], "weights": [0.5, 0.3, 0.2]}


class Labelled(GaussianMixtureSamples):
    """Points with the mode they come from as their label."""

    def __getitem__(self, i):
        return super().__getitem__(i)[0], int(self.component[i])


class Record(L.Callback):
    """Losses, learning rates and weights of each optimiser step, and what else is to happen there."""

    def __init__(self, at=None):
        self.losses, self.rates, self.weights, self.at = [], [], [], at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        if self.at is not None:
            self.at(trainer, pl_module, batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.weights.append([p.detach().clone() for p in pl_module.parameters()])


def module(dropout=0.0, seed=0, lr=3e-3, schedule=None, classes=3, denoiser=None):
    torch.manual_seed(0)
    if denoiser is None:
        denoiser = EpsDenoiser(MLP(2, 16, 1, dropout, num_classes=classes), paths.VariancePreserving())
        nn.init.normal_(denoiser.network.head.weight, std=0.1)  # or the first gradients of all but the head are 0
    return DenoiserTraining(
        denoiser,
        losses.UniformTimes(),
        losses.Constant(),
        partial(torch.optim.Adam, lr=lr),
        schedule,
        num_classes=classes,
        label_dropout=0.3 if classes else 0.0,
        seed=seed,
    )


def fit(net, *, steps=10, batch_size=16, callbacks=(), keeper=None, last=None, held_out=None, **trainer):
    data = TrainingData(Labelled(**MIXTURE, count=50), held_out, batch_size=batch_size, steps=steps, seed=1)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=keeper is not None,
        callbacks=[*callbacks, *([keeper] if keeper else [])],
        plugins=[AtomicCheckpointIO()],
        max_steps=steps,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if held_out else 0,
        check_val_every_n_epoch=None,
        val_check_interval=5,
        **{"devices": 1} | trainer,
    )
    trainer.fit(net, datamodule=data, ckpt_path=last, weights_only=True if last else None)
    return trainer


def ema():
    return WeightAveraging(multi_avg_fn=EMA(0.9), use_buffers=False)


def parameters(net):
    return [p.detach().clone() for p in net.parameters()]


def same(a, b):
    return all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


# ---- the same run, split in other ways


def test_accumulating_micro_batches_is_the_whole_batch():
    whole, parts = module(), module()
    fit(whole, precision="64-true", gradient_clip_val=0.5)
    fit(parts, precision="64-true", gradient_clip_val=0.5, accumulate_grad_batches=4)
    for a, b in zip(parameters(whole), parameters(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


DDP = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
from test_training import Record, fit, module, parameters
record, net = Record(), module()
fit(net, callbacks=[record], precision="64-true", devices=2, strategy="ddp", accumulate_grad_batches=2)
if net.global_rank == 0:
    weights = [p.flatten().tolist() for p in parameters(net)]
    open(sys.argv[2], "w").write(json.dumps({"losses": record.losses, "weights": weights}))
"""


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    """The loss curve and the weights of DDP on 2 processes (times 2 micro-batches), against one process."""
    script, out = tmp_path / "ddp.py", tmp_path / "out.json"
    script.write_text(DDP)
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK")}
    command = [sys.executable, str(script), str(Path(__file__).parent), str(out)]
    done = subprocess.run(
        command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    two = json.loads(out.read_text())
    record, one = Record(), module()
    fit(one, callbacks=[record], precision="64-true")
    assert len(record.losses) == 10
    curve = torch.tensor(two["losses"]).reshape(10, 2).mean(1)  # of the two micro-batches of a step
    torch.testing.assert_close(curve, torch.tensor(record.losses), rtol=1e-5, atol=0)
    for a, b in zip(parameters(one), two["weights"], strict=True):
        torch.testing.assert_close(a.flatten(), torch.tensor(b, dtype=torch.float64), rtol=1e-9, atol=1e-12)


# ---- the same run, interrupted


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_dies_continues_bit_for_bit(tmp_path, accumulate):
    """Weights, averaged weights and losses, with dropout, momentum, warm-up and validation, saved within an epoch."""
    held_out = Labelled(**MIXTURE, count=11, split="test")
    schedule = learning_rate(12, 3, "cosine")
    common = {"steps": 12, "held_out": held_out, "accumulate_grad_batches": accumulate}
    straight, record = module(0.3, schedule=schedule), Record()
    fit(straight, callbacks=[ema(), record], keeper=LastCheckpoint(tmp_path / "a.ckpt", 100), **common)

    class Killed(BaseException):
        pass

    def at(step):  # the last micro-batch of a step: within an accumulation, where there is one
        def die(trainer, pl_module, batch):
            if batch.step == (step + 1) * accumulate - 1:
                raise Killed

        return Record(die)

    def start(record, last=None):
        net = module(0.3, schedule=schedule)
        torch.manual_seed(99)  # another process, another history
        fit(net, callbacks=[ema(), record], keeper=LastCheckpoint(file, 4), last=last, **common)
        return net

    file = tmp_path / "b.ckpt"
    with pytest.raises(Killed):
        start(at(7))
    assert torch.load(file, weights_only=True)["global_step"] == 4
    with pytest.raises(Killed):
        start(at(4), str(file))  # and again, in the first step after
    rest = Record()
    resumed = start(rest, str(file))
    assert rest.losses == record.losses[4 * accumulate :]
    assert rest.rates == record.rates[4 * accumulate :]
    assert all(same(a, b) for a, b in zip(rest.weights, record.weights[4 * accumulate :], strict=True))
    assert same(parameters(resumed), parameters(straight))
    one, two = (torch.load(tmp_path / f, weights_only=True) for f in ("a.ckpt", "b.ckpt"))
    assert one["global_step"] == two["global_step"] == 12
    for key in ("state_dict", "current_model_state"):  # averaged and plain
        assert same(one[key].values(), two[key].values())
    assert not same(one["state_dict"].values(), one["current_model_state"].values())


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint_to_continue_from(tmp_path):
    straight = module()
    fit(straight, steps=8, keeper=LastCheckpoint(tmp_path / "a.ckpt", 100))

    def press(trainer, pl_module, batch):
        if batch.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    last = tmp_path / "b.ckpt"
    keeper = LastCheckpoint(last, 100)
    fit(module(), steps=8, callbacks=[Record(press)], keeper=keeper)
    assert keeper.interrupted
    assert signal.getsignal(signal.SIGINT) is before
    assert torch.load(last, weights_only=True)["global_step"] == 3
    resumed = module()
    fit(resumed, steps=8, keeper=LastCheckpoint(last, 100), last=str(last))
    assert same(parameters(resumed), parameters(straight))


def test_a_write_that_fails_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, file)

    def full(checkpoint, opened):
        opened.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, file)
    monkeypatch.undo()
    assert torch.load(file, weights_only=True) == {"step": 1}
    AtomicCheckpointIO().save_checkpoint({"step": 3}, file)
    assert torch.load(file, weights_only=True) == {"step": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


# ---- what goes wrong


def test_a_loss_that_is_not_finite_stops_at_its_step_and_keeps_what_was_saved(tmp_path):
    def break_(trainer, pl_module, batch):
        if batch.step == 6:
            batch.x0[0, 0] = math.nan

    last = tmp_path / "last.ckpt"
    with pytest.raises(FloatingPointError, match="not finite at step 7"):
        fit(module(), callbacks=[Record(break_)], keeper=LastCheckpoint(last, 2))
    saved = torch.load(last, weights_only=True)
    assert saved["global_step"] == 6
    assert all(v.isfinite().all() for v in saved["state_dict"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Poison(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 4:  # as an update that overflows: the loss of this step was fine
                next(pl_module.parameters()).data.flatten()[0] = math.inf

    last = tmp_path / "last.ckpt"
    with pytest.raises(FloatingPointError, match="weights are not finite after step 4"):
        fit(module(), callbacks=[Poison()], keeper=LastCheckpoint(last, 2))
    assert torch.load(last, weights_only=True)["global_step"] == 2


def test_half_precision_that_would_round_the_times_is_refused():
    with pytest.raises(ValueError, match="bf16-mixed"):
        fit(module(), precision="bf16-true")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LastCheckpoint("x", 0), "save_every must be at least 1"),
        (lambda: EMA(1.0), "0 <= decay < 1"),
        (lambda: learning_rate(10, 11), "0 <= warmup <= max_steps"),
        (lambda: learning_rate(10, 1, "linear"), "null or cosine"),
        (lambda: DenoiserTraining(None, None, None, None, label_dropout=1.5, num_classes=2), "is a probability"),
        (lambda: DenoiserTraining(None, None, None, None, label_dropout=0.1), "class-conditional network"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- the parts


def test_averaged_weights_follow_their_recursion():
    net, record = module(), Record()
    averaging = ema()
    fit(net, steps=30, callbacks=[averaging, record])
    expected = record.weights[0]
    for n, weights in enumerate(record.weights[1:], 1):
        d = min(0.9, (1 + n) / (10 + n))
        expected = [d * a + (1 - d) * w for a, w in zip(expected, weights, strict=True)]
    for a, b in zip(parameters(net), expected, strict=True):  # Lightning puts the average into the model at the end
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not same(parameters(net), record.weights[-1])


def test_learning_rate_warms_up_and_decays_to_zero():
    record = Record()
    fit(module(lr=1.0, schedule=learning_rate(10, 4, "cosine")), callbacks=[record])
    expected = [0.2, 0.4, 0.6, 0.8, *(0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6))]
    assert record.rates == pytest.approx(expected)
    constant = learning_rate(10, 2)
    assert [constant(k) for k in (0, 1, 2, 9)] == pytest.approx([1 / 3, 2 / 3, 1, 1])


def test_the_network_sees_the_noised_sample_its_time_and_the_label_or_the_null_label():
    seen = {}

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, x, t, label):
            seen.update(x=x, t=t, label=label)
            return self.weight * x

    path = paths.ConditionalOT()
    net = module(denoiser=VelocityDenoiser(Spy(), path))
    batch = TrainingBatches(Labelled(**MIXTURE, count=50), 64, 1, seed=0).batch(0)
    loss = net._loss(batch)
    t = net.times(path, batch.u)
    torch.testing.assert_close(seen["t"], t.float())
    torch.testing.assert_close(seen["x"], ((1 - t)[:, None] * batch.x0 + t[:, None] * batch.eps).float())
    dropped = batch.drop < 0.3
    assert 0 < dropped.sum() < 64
    assert torch.equal(seen["label"], batch.label.masked_fill(dropped, 3))
    torch.testing.assert_close(loss, (batch.eps - batch.x0).square().mean())  # the output is 0, the target eps - x_0


def test_mixed_precision_trains_as_single_precision_does():
    curves = []
    for precision in ("32-true", "bf16-mixed"):
        record = Record()
        fit(module(), steps=20, callbacks=[record], precision=precision)
        curves.append(torch.tensor(record.losses))
    assert not torch.equal(*curves)
    torch.testing.assert_close(*curves, rtol=0.02, atol=0)


@pytest.mark.slow
def test_a_small_network_learns_the_exact_denoiser_of_a_mixture():
    """Its held-out loss falls to that of the exact denoiser, below which nothing goes but by chance."""
    path, weight = paths.Cosine(), losses.Constant()
    exact = GaussianMixture(**MIXTURE)
    torch.manual_seed(0)
    denoiser = VelocityDenoiser(MLP(2, 64, 2), path)
    net = DenoiserTraining(
        denoiser,
        losses.UniformTimes(0.02, 0.98),
        weight,
        partial(torch.optim.Adam, lr=4e-3),
        learning_rate(900, 50, "cosine"),
    )
    data = TrainingData(GaussianMixtureSamples(**MIXTURE, count=20_000), batch_size=256, steps=900)
    test = GaussianMixtureSamples(**MIXTURE, count=20_000, split="test")
    x0 = test.points.float()
    eps, t = torch.randn(len(x0), 2), 0.02 + 0.96 * torch.rand(len(x0), dtype=torch.float64)
    alpha, sigma = path(t)

    def held_out():
        with torch.no_grad():
            return losses.denoising_loss(denoiser, x0, eps, t, weight)

    before = held_out().mean()
    L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_steps=900,
        limit_val_batches=0,
        callbacks=[WeightAveraging(multi_avg_fn=EMA(0.99), use_buffers=False)],
    ).fit(net, datamodule=data)
    x = alpha[:, None].float() * x0 + sigma[:, None].float() * eps
    d = exact(x, alpha, sigma)
    ideal = denoiser.target(d, (x - alpha[:, None].float() * d) / sigma[:, None].float(), t)
    floor = (ideal - denoiser.target(x0, eps, t)).square().mean(1)
    after = held_out()
    excess, error = float((after - floor).mean()), float((after - floor).std() / math.sqrt(len(x0)))
    assert excess > -3 * error
    assert excess < 0.03 * float(before - floor.mean())
