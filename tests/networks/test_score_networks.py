"""NCSN++, EDM2's U-Net and GET: their own properties; tests/checkpoints/test_format_scores.py has the originals'.

The sizes are those of Karras et al. 2022, Table 7 and 2024, Table 7, Song's checkpoints, and thesis Table 4.7.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional

from steadyflow.networks import GET, EDM2UNet, NCSNpp, UnitRange
from steadyflow.networks.conditioning import FourierTime
from steadyflow.networks.edm2 import MPConv
from steadyflow.networks.ncsnpp import FirConv, resample

NCSN = {"fourier": True, "fir": True, "input_pyramid": "residual"}
SKIP = {"fourier": True, "fir": True, "input_pyramid": "skip", "output_pyramid": True, "log_time": True}
SKIP |= {"time_scale": -999.0, "time_shift": 999.0, "time_min": 0.999, "divide_by_time": True}
TINY = {"model_channels": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (8,)}
TINY |= {"image_size": 16, "num_classes": 3}
SMALL = {
    "ddpmpp": lambda: NCSNpp(**TINY),
    "ncsnpp": lambda: NCSNpp(**TINY, **NCSN),
    "pyramids": lambda: NCSNpp(**TINY, **SKIP),
    "edm2": lambda: EDM2UNet(**TINY | {"model_channels": 64, "channel_mult": (1, 1)}),
    "get": lambda: GET(image_size=16, width=64, depth=1, equilibrium_depth=1, num_classes=4),
}
SIZES = {
    55.7: lambda: NCSNpp(channel_mult=(2, 2, 2)),
    61.8: lambda: NCSNpp(),
    65.6: lambda: NCSNpp(image_size=256, channel_mult=(1, 1, 2, 2, 2, 2, 2), num_res_blocks=2, **SKIP),
    124.7: lambda: EDM2UNet(in_channels=4, model_channels=128, num_classes=1000),
    280.2: lambda: EDM2UNet(num_classes=1000),
    8.5: lambda: GET(width=256, equilibrium_expansion=6),
    19.1: lambda: GET(width=384, equilibrium_expansion=6),
    37.1: lambda: GET(),
    62.0: lambda: GET(width=768, depth=1, equilibrium_expansion=12),
    83.3: lambda: GET(width=768),
}


def randomised(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in network.parameters():
        p.data = torch.randn(p.shape) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.3)
    return network.eval()


@pytest.mark.parametrize("millions", SIZES)
def test_sizes_are_the_published(millions: float) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in SIZES[millions]().parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("name", SMALL)
def test_a_batch_is_its_items_and_a_new_network_gives_zero(name: str) -> None:
    network = SMALL[name]().eval()
    x, label = torch.randn(3, 3, 16, 16), torch.tensor([0, 2, 1])
    t = torch.ones(3) if name == "get" else torch.tensor([0.1, 0.5, 0.9])
    with torch.inference_mode():
        assert not network(x, t, label).any()
        randomised(network)
        singles = torch.cat([network(x[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(3)])
        whole = network(x, t, label)
    torch.testing.assert_close(whole, singles, rtol=1e-4, atol=1e-5)
    assert whole.std() > 1e-4
    if name != "get":  # no label is the null label
        with torch.inference_mode():
            assert torch.equal(network(x, t), network(x, t, torch.full((3,), 3)))


def test_fir_is_the_convolution_with_1331_and_its_transpose() -> None:
    taps = torch.tensor([1.0, 3, 3, 1], dtype=torch.float64) / 8
    kernel, x = torch.outer(taps, taps).expand(3, 1, 4, 4), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    down = functional.conv2d(x, kernel, stride=2, padding=1, groups=3)
    torch.testing.assert_close(resample(x, "down", fir=True), down, rtol=0, atol=1e-14)
    up = functional.conv_transpose2d(x, 4 * kernel, stride=2, padding=1, groups=3)
    torch.testing.assert_close(resample(x, "up", fir=True), up, rtol=0, atol=1e-14)
    conv = FirConv(3, 5).double()
    padded = functional.conv2d(functional.pad(x, (2, 2, 2, 2)), kernel, groups=3)
    torch.testing.assert_close(conv(x), functional.conv2d(padded, conv.weight, conv.bias, 2), rtol=0, atol=1e-14)


def test_recomputed_activations_give_the_same_gradient() -> None:
    x, gradients = torch.randn(1, 3, 16, 16), []
    for recompute in (False, True):
        torch.manual_seed(1)  # the frequencies
        network = randomised(NCSNpp(**TINY, **NCSN, checkpoint_activations=recompute))
        y = x.clone().requires_grad_()
        network(y, torch.tensor([0.5])).square().sum().backward()
        gradients.append(y.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_fourier_frequencies_stay_in_single_precision() -> None:
    features = FourierTime(8).bfloat16()
    assert features.frequencies.dtype == torch.float32
    assert FourierTime(8).double().frequencies.dtype == torch.float64


def test_unit_range_is_the_flow_in_other_units() -> None:
    """Of a Gaussian y_0 ~ N(m, s^2): the exact velocity in [0, 1] becomes the exact one in [-1, 1]."""
    m, s, t = 0.4, 0.2, torch.tensor([0.3, 0.8], dtype=torch.float64)[:, None, None, None]

    def velocity(x: torch.Tensor, mean: float, std: float, noise: float) -> torch.Tensor:
        """E[noise eps - x_0 | x] of x = (1 - t) x_0 + noise t eps."""
        variance = ((1 - t) * std) ** 2 + (noise * t) ** 2
        return -mean + (noise**2 * t - (1 - t) * std**2) / variance * (x - (1 - t) * mean)

    class Twice(nn.Module):
        def forward(self, x: torch.Tensor, _: torch.Tensor, label: None) -> torch.Tensor:
            return 2 * velocity((x + 1) / 2, m, s, 1.0)

    x = torch.randn(2, 1, 2, 2, dtype=torch.float64)
    expected = velocity(x, 2 * m - 1, 2 * s, 2.0)
    torch.testing.assert_close(UnitRange(Twice())(x, t.flatten()), expected, rtol=0, atol=1e-13)


def test_edm2_keeps_magnitudes() -> None:
    torch.manual_seed(0)
    conv = MPConv(64, 128, 3)
    conv.weight.data *= 7
    assert conv(torch.randn(8, 64, 16, 16)).detach().std() == pytest.approx(1, abs=0.05)
    conv.train()(torch.randn(1, 64, 4, 4))  # forced normalisation
    torch.testing.assert_close(conv.weight.detach().square().mean((1, 2, 3)), torch.ones(128), rtol=1e-3, atol=0)


def test_get_returns_the_last_iterate_decoded_and_its_gradient_reaches_every_weight() -> None:
    network = randomised(SMALL["get"]())
    e, label = torch.randn(2, 3, 16, 16), torch.tensor([1, 3])
    u = network.injections(e, label)
    z = network.start(u)
    for _ in range(6):
        z = network.step(z, u)
    torch.testing.assert_close(network(e, torch.ones(2), label), network.decode(z), rtol=1e-5, atol=1e-5)
    network.train()(e, torch.ones(2), label).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="set fir=true"):
        NCSNpp(**TINY, output_pyramid=True)
    with pytest.raises(ValueError, match="no level has the attention resolution 5"):
        NCSNpp(attention_resolutions=(5,))
    with pytest.raises(ValueError, match=r"do not divide by 8"):
        NCSNpp(model_channels=8, num_res_blocks=1)(torch.zeros(1, 3, 12, 16), torch.zeros(1))
    with pytest.raises(ValueError, match="no unconditional model"):
        SMALL["get"]()(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"asked at t = 0.3; choose sampler=one_step"):
        SMALL["get"]()(torch.zeros(2, 3, 16, 16), torch.tensor([1, 0.3]), torch.tensor([0, 1]))
