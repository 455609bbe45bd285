"""The U-Net: its size, its zero start, its conditioning, its independence of batch, layout and precision."""

import pytest
import torch
from torch import Tensor, nn

from steadyflow.networks import UNet
from steadyflow.networks.blocks import GroupNorm, ResBlock, SelfAttention

SMALL = {"in_channels": 2, "model_channels": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "image_size": 8}
VARIANTS = {
    "ddpm": {"attention_resolutions": (4,)},
    "adm": {
        "attention_resolutions": (8, 4),
        "head_channels": 4,
        "scale_shift_norm": True,
        "resblock_updown": True,
        "learned_sigma": True,
        "num_classes": 3,
    },
    "patches": {"attention_resolutions": (2,), "num_heads": 2, "patch_size": 2, "num_classes": 3},
    "skip": {"attention_resolutions": (), "input_skip": True, "learned_sigma": True, "num_classes": 3},
}


def perturbed(seed: int = 0, **options: object) -> UNet:
    """A small network with random weights everywhere, the zero-initialised ones included."""
    torch.manual_seed(seed)
    network = UNet(**{**SMALL, **options})  # type: ignore[arg-type]
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.2 * torch.randn_like(p) / p[0].numel() ** 0.5)
    return network


def inputs(batch: int = 3, size: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 2, size, size, generator=generator, dtype=dtype)
    return x, torch.rand(batch, generator=generator, dtype=dtype)


def test_default_has_the_size_of_the_published_cifar10_network() -> None:
    # Ho et al. 2020, Section 4: "our CIFAR10 model has 35.7 million parameters"; 35,746,307 in its conversions.
    with torch.device("meta"):
        network = UNet(3, 128, (1, 2, 2, 2), 2, (16,))
    assert sum(p.numel() for p in network.parameters()) == 35_746_307


def closed_form(c: int, outer: int, mult: tuple[int, ...], blocks: int, attention: set[int], **options: int) -> int:
    """Parameters of the network counted by hand: sums over the two ways, level by level."""
    width, classes, scale, updown, out = 4 * c, *(options[k] for k in ("classes", "scale", "updown", "out"))

    def conv(a: int, b: int, k: int = 3) -> int:
        return a * b * k * k + b

    def res(a: int, b: int) -> int:
        skip = conv(a, b, 1) if a != b else 0
        return 2 * a + conv(a, b) + (width + 1) * b * (2 if scale else 1) + 2 * b + conv(b, b) + skip

    def attend(a: int) -> int:
        return 2 * a + 4 * conv(a, a, 1)

    def change(a: int) -> int:
        return res(a, a) if updown else conv(a, a)

    levels = [c * m for m in mult]
    total = (c + 1) * width + (width + 1) * width + (classes + 1) * width * bool(classes) + conv(outer, levels[0])
    skips = [levels[0]]
    for k, w in enumerate(levels):
        inside = [levels[max(k - 1, 0)]] + [w] * (blocks - 1)
        total += sum(res(a, w) + (attend(w) if k in attention else 0) for a in inside)
        skips += [w] * blocks
        if k + 1 < len(levels):
            total += change(w)
            skips.append(w)
    total += 2 * res(levels[-1], levels[-1]) + attend(levels[-1])
    for k, w in reversed(list(enumerate(levels))):
        inside = [levels[min(k + 1, len(levels) - 1)]] + [w] * blocks
        total += sum(res(a + skips.pop(), w) + (attend(w) if k in attention else 0) for a in inside)
        total += change(w) if k else 0
    return total + 2 * levels[0] + conv(levels[0], out)


@pytest.mark.parametrize(
    "options",
    [
        {"model_channels": 16, "channel_mult": (1, 2, 3), "num_res_blocks": 2, "attention_resolutions": (8,)},
        {"channel_mult": (2, 1), "attention_resolutions": (16, 8), "num_classes": 5, "learned_sigma": True},
        {"channel_mult": (1, 3), "attention_resolutions": (), "scale_shift_norm": True, "resblock_updown": True},
        {"channel_mult": (1, 2), "attention_resolutions": (4,), "patch_size": 2, "num_classes": 10},
    ],
)
def test_parameter_count_equals_the_closed_form(options: dict) -> None:
    full = {"in_channels": 3, "model_channels": 8, "num_res_blocks": 1, "image_size": 16} | options
    network = UNet(**full)
    p = full.get("patch_size", 1)
    attention = {k for k in range(len(full["channel_mult"])) if 16 // p // 2**k in full["attention_resolutions"]}
    expected = closed_form(
        full["model_channels"],
        3 * p * p,
        full["channel_mult"],
        full["num_res_blocks"],
        attention,
        classes=full.get("num_classes", 0),
        scale=full.get("scale_shift_norm", False),
        updown=full.get("resblock_updown", False),
        out=3 * p * p * (2 if full.get("learned_sigma") else 1),
    )
    assert sum(p.numel() for p in network.parameters()) == expected


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_a_new_network_returns_exactly_zero_and_each_block_is_its_skip(options: dict) -> None:
    network = UNet(**SMALL, **options)
    x, t = inputs()
    out = network(x, t)
    assert out.shape[1] == 2 * (2 if options.get("learned_sigma") else 1)
    assert out.count_nonzero() == 0
    c = torch.randn(3, 32)
    for module in network.modules():
        if isinstance(module, ResBlock):
            h = torch.randn(3, module.norm1.num_channels, 4, 4)
            assert torch.equal(module(h, c), module.skip(module.resample(h)))
        if isinstance(module, SelfAttention):
            h = torch.randn(3, module.norm.num_channels, 4, 4)
            assert torch.equal(module(h), h)


@pytest.mark.parametrize("learned_sigma", [False, True])
def test_input_skip_adds_the_input_to_the_prediction_alone(learned_sigma: bool) -> None:
    options = {"attention_resolutions": (), "learned_sigma": learned_sigma}
    plain, skip = perturbed(**options), perturbed(input_skip=True, **options)
    assert skip.load_state_dict(plain.state_dict(), strict=False).missing_keys == ["mix.weight", "mix.bias"]
    assert skip.mix is not None
    nn.init.zeros_(skip.mix.weight)
    skip.mix.bias.data.copy_(torch.tensor([-0.25, 0.5]))
    x, t = inputs()
    expected = 0.75 * plain(x, t)
    expected[:, :2] += 0.5 * x
    torch.testing.assert_close(skip(x, t), expected)
    skip.mix.bias.data.copy_(torch.tensor([-1.0, 1.0]))  # eps from x = eps, exactly, in bf16 too
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(skip(x, t)[:, :2], x)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_gradient_reaches_every_parameter(options: dict) -> None:
    network = perturbed(**options)
    x, t = inputs()
    label = torch.tensor([0, 1, 2]) if options.get("num_classes") else None
    (network(x, t, label) * torch.randn(1, 1, 8, 8)).sum().backward()
    null = network.conditioning.table
    if null is not None:
        assert null.weight.grad is not None
        assert null.weight.grad[-1].count_nonzero() == 0  # nobody was unlabelled
        network(x, t).square().sum().backward()
        assert null.weight.grad[-1].count_nonzero() == null.weight.shape[1]
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_batch_equals_singles(options: dict) -> None:
    network = perturbed(**options).double().eval()
    x, t = inputs(dtype=torch.float64)
    label = torch.tensor([2, 3, 0]) if options.get("num_classes") else None
    singles = [network(x[i : i + 1], t[i : i + 1], None if label is None else label[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(network(x, t, label), torch.cat(singles), rtol=1e-12, atol=1e-12)


def test_attention_stands_at_the_configured_resolutions_only() -> None:
    network = UNet(**{**SMALL, "channel_mult": (1, 1, 2), "num_res_blocks": 2, "attention_resolutions": (4,)})
    seen: list[int] = []
    for module in network.modules():
        if isinstance(module, SelfAttention):
            module.register_forward_hook(lambda _m, a, _o: seen.append(a[0].shape[-1]))
    x, t = inputs()
    network(x, t)
    assert seen == [4, 4, 2, 4, 4, 4]  # way down, middle (always), way up


def test_attention_equals_the_softmax_written_out() -> None:
    torch.manual_seed(0)
    block = SelfAttention(8, num_heads=2).double()
    nn.init.normal_(block.out.weight)
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64)
    tokens = block.norm(x).flatten(2).mT
    q, k, v = (tokens @ w.mT + b for w, b in zip(block.qkv.weight.chunk(3), block.qkv.bias.chunk(3), strict=True))
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        weights = (q[..., part] @ k[..., part].mT / 2).softmax(-1)
        heads.append(weights @ v[..., part])
    expected = x + (torch.cat(heads, -1) @ block.out.weight.mT + block.out.bias).mT.reshape(2, 8, 3, 4)
    torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_no_label_is_the_null_label_and_labels_matter() -> None:
    network = perturbed(num_classes=3, attention_resolutions=()).eval()
    x, t = inputs()
    null = network(x, t)
    assert torch.equal(null, network(x, t, torch.full((3,), 3)))
    assert not torch.allclose(null, network(x, t, torch.zeros(3, dtype=torch.long)), atol=1e-4)
    assert not torch.allclose(null, network(x, t.flip(0)), atol=1e-4)


def test_on_a_torus_the_network_commutes_with_shifts_by_its_coarsest_cell() -> None:
    # On a torus, convolutions, norms and changes of resolution commute with shifts by the network's divisor (4 here),
    # and with no smaller one.
    network = perturbed(attention_resolutions=(), patch_size=2).double().eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
            module._reversed_padding_repeated_twice = [p for p in reversed(module.padding) for _ in range(2)]
    x, t = inputs(1, 16, dtype=torch.float64)
    moved = network(x.roll((4, 8), (2, 3)), t)
    torch.testing.assert_close(moved, network(x, t).roll((4, 8), (2, 3)), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(network(x.roll(1, 3), t), network(x, t).roll(1, 3), atol=1e-6)


def test_bf16_autocast_and_channels_last_agree_with_float32() -> None:
    network = perturbed(**VARIANTS["adm"]).eval()
    x, t = inputs()
    label = torch.tensor([0, 1, 3])
    exact = network(x, t, label)
    last = network.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last), t, label)
    torch.testing.assert_close(last, exact, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = network(x, t, label)
    assert half.dtype == torch.bfloat16
    error = (half.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 1e-5 < error < 0.03  # rounding of 2^-9 through some twenty layers; and bf16 was really used


def test_group_norm_keeps_float32_statistics_in_half_precision() -> None:
    x = (300 + torch.randn(2, 8, 16, 16)).bfloat16()  # variance lost in bf16 sums, kept in float32
    norm = GroupNorm(8).bfloat16()
    expected = torch.nn.functional.group_norm(x.double(), 2, eps=1e-5)
    torch.testing.assert_close(norm(x).double(), expected, rtol=2**-8, atol=1e-3)


def test_time_features_survive_a_half_precision_network() -> None:
    network = perturbed(attention_resolutions=()).eval()
    t = torch.tensor([0.5001, 0.5002])  # one value in bf16
    features = network.bfloat16().conditioning.features(t)
    torch.testing.assert_close(features, UNet(**SMALL, attention_resolutions=()).conditioning.features(t))
    assert (features[0] - features[1]).abs().max() > 0.05


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_identical_gradients(dropout: float) -> None:
    x, t = inputs()
    gradients = []
    for flag in (False, True):
        network = perturbed(dropout=dropout, checkpoint_activations=flag, **VARIANTS["ddpm"])
        torch.manual_seed(5)
        network(x, t).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert any(a.any() for a in gradients[0])


def test_dropout_acts_in_training_only() -> None:
    network = perturbed(dropout=0.5, attention_resolutions=())
    x, t = inputs()
    assert not torch.equal(network(x, t), network(x, t))
    network.eval()
    assert torch.equal(network(x, t), network(x, t))


@pytest.mark.slow
def test_compiled_in_one_graph_output_and_gradients_equal_eager() -> None:
    # aot_eager: the capture and the derived backward of torch.compile, without minutes of code generation.
    network = perturbed(num_classes=3, channel_mult=(1,), attention_resolutions=(8,))
    x, t = inputs()
    label = torch.tensor([0, 1, 3])
    results = []
    for call in (network, torch.compile(network, backend="aot_eager", fullgraph=True)):
        network.zero_grad()
        out = call(x, t, label)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 9}, "image_size 9 is not a multiple of 2"),
        ({"patch_size": 3}, "image_size 8 is not a multiple of 6"),
        ({"attention_resolutions": (16,)}, r"attention resolution 16: the levels are at \[8, 4\]"),
        ({"num_heads": 3, "attention_resolutions": (8,)}, "3 attention heads do not divide"),
        ({"head_channels": 5}, "head_channels 5 does not divide 16 channels"),
        ({"head_channels": 4, "num_heads": 2}, "num_heads or head_channels, not both"),
        ({"num_classes": -1}, "num_classes >= 0, got -1"),
    ],
)
def test_a_wrong_size_is_one_line_at_construction(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNet(**{**SMALL, "attention_resolutions": (), **options})


@pytest.mark.parametrize(
    ("x", "t", "label", "message"),
    [
        ((2, 3, 8, 8), 2, None, r"takes images \(B, 2, H, W\), got shape \(2, 3, 8, 8\)"),
        ((2, 16), 2, None, r"takes images \(B, 2, H, W\), got shape \(2, 16\)"),
        ((2, 2, 8, 7), 2, None, "images of 8 x 7 do not divide by 2"),
        ((2, 2, 8, 8), 3, None, r"time must have shape \(2,\), got \(3,\)"),
        ((2, 2, 8, 8), 2, torch.tensor([0, 4]), "label 4 is out of range: classes are 0..2, the null label is 3"),
        ((2, 2, 8, 8), 2, torch.tensor([-1, 0]), "label -1 is out of range"),
        ((2, 2, 8, 8), 2, torch.tensor([0]), r"integers of shape \(2,\), got \(1,\) int64"),
        ((2, 2, 8, 8), 2, torch.tensor([0.0, 1.0]), r"integers of shape \(2,\), got \(2,\) float32"),
    ],
)
def test_a_wrong_call_is_one_line(x: tuple, t: int, label: Tensor | None, message: str) -> None:
    network = UNet(**SMALL, attention_resolutions=(), num_classes=3)
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(x), torch.zeros(t), label)


def test_a_label_for_a_network_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes > 0"):
        UNet(**SMALL, attention_resolutions=())(*inputs(), torch.zeros(3, dtype=torch.long))
