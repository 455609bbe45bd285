import pytest
import torch

from steadyflow.data import InMemoryImages, from_uint8, to_uint8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_level_survives_the_round_trip(dtype):
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels).to(dtype)), levels)


def test_half_precision_is_rounded_once():
    x = torch.linspace(-1.2, 1.2, 999).to(torch.bfloat16)
    assert torch.equal(to_uint8(x), to_uint8(x.double()))


def test_values_beyond_the_range_saturate():
    assert to_uint8(torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0])).tolist() == [
        0,
        0,
        128,
        255,
        255,
    ]


def test_fingerprint_depends_on_content_alone():
    images = torch.arange(48, dtype=torch.uint8).reshape(4, 1, 3, 4)
    labels = torch.tensor([0, 1, 1, 0])
    first = InMemoryImages("a", "train", images, labels, 2).fingerprint
    strided = images.expand(4, 2, 3, 4)[:, :1]
    assert InMemoryImages("b", "test", strided, labels, 2).fingerprint == first
    changed = {
        InMemoryImages("a", "train", images.bitwise_xor(torch.ones_like(images)), labels, 2).fingerprint,
        InMemoryImages("a", "train", images, 1 - labels, 2).fingerprint,
        InMemoryImages("a", "train", images.reshape(4, 1, 4, 3), labels, 2).fingerprint,
    }
    assert len(changed) == 3
    assert first not in changed


def test_floats_or_missing_labels_are_refused():
    with pytest.raises(ValueError, match="float32"):
        InMemoryImages("a", "train", torch.zeros(4, 1, 3, 4))
    with pytest.raises(ValueError, match="3 labels"):
        InMemoryImages("a", "train", torch.zeros(4, 1, 3, 4, dtype=torch.uint8), torch.zeros(3), 1)
