"""Trains the classifier behind `features=digits` on the training split of Digits and writes its weights.

    python scripts/train_digits_classifier.py digits_net.safetensors

Adam with a one-cycle rate, label smoothing 0.05, 60 epochs of 1597 images; each batch is rotated (10 degrees), shifted
(2 pixels) and scaled (10 %) at random. Prints the accuracy on the 200 held-out images, which take no part in a choice.
The weights in the package are fixed: new ones make every FID and KID with these features incomparable to the old.
"""

import argparse
import hashlib
import math
import os
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from steadyflow.data import Digits, from_uint8
from steadyflow.metrics.digits_net import digits_stages


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random rotation, scale and shift of each image (B, 1, H, W), the background -1 outside."""

    def uniform(bound: float) -> Tensor:
        return (torch.rand(len(x), generator=generator) * 2 - 1) * bound

    angle, scale = uniform(10 * math.pi / 180), 1 + uniform(0.1)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    shift = 2 * 2 / x.shape[-1]
    rows = [torch.stack([cos, -sin, uniform(shift)], 1), torch.stack([sin, cos, uniform(shift)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--epochs", type=int, default=60)
    args = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    train, test = Digits("train"), Digits("test")
    images = from_uint8(train.images)
    net = nn.ModuleDict({"stages": digits_stages(), "classifier": nn.Linear(64, 10)})

    def logits(x: Tensor) -> Tensor:
        for stage in net["stages"]:  # type: ignore[union-attr]
            x = stage(x)
        return net["classifier"](x.mean((2, 3)))

    batches = math.ceil(len(images) / 64)
    optimizer = torch.optim.Adam(net.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=args.epochs * batches)
    for epoch in range(args.epochs):
        losses = []
        for index in torch.randperm(len(images), generator=generator).chunk(batches):
            output = logits(augment(images[index], generator))
            loss = F.cross_entropy(output, train.labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.4f}", flush=True)

    net.eval()
    with torch.no_grad():
        for name, split in ("train", train), ("held out", test):
            right = logits(from_uint8(split.images)).argmax(1) == split.labels
            print(f"accuracy, {name}: {right.double().mean():.4f} of {len(right)}")
    data = save({k: v.contiguous() for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")})
    temporary = args.output.with_name(f".{args.output.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(args.output)
    print(f"{args.output}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
