"""The generative equilibrium transformer: noise to image in one evaluation, through a fixed point."""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from steadyflow.equilibrium import Equilibrium, Picard, Unrolled


class Block(nn.Module):
    """z (B, N, D) -> (B, N, D), with an injection u (B, N or 1, 3D), or None:

        z = z + W_o attention(W_i LN(z) + u),    z = z + FFN(LN(z))

    u joins queries, keys and values. Source: Geng et al. 2023 (thesis Eq. 4.5 and the block above it).
    """

    def __init__(self, width: int, heads: int, expansion: float):
        super().__init__()
        self.heads, hidden = heads, int(width * expansion)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, z: Tensor, u: Tensor | None) -> Tensor:
        qkv = self.qkv(self.norm1(z))
        qkv = qkv if u is None else qkv + u
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D / heads)
        z = z + self.out(attended.transpose(1, 2).flatten(2))
        return z + cast(Tensor, self.second(functional.gelu(self.first(self.norm2(z)))))


class GET(nn.Module):
    """Generative equilibrium transformer: network(e (B, C, H, W), t, label (B,) or None) -> x (B, C, H, W).

        h = patches(e) + positions,    n = W blocks(h, c)              (injection transformer; c the class embedding)
        z* = f(z*, n + c),    x = unpatches(W LN(z*))                   (equilibrium transformer f, decoder)

    z* by the solver of `equilibrium` from z_0 ~ N(0, I): in training drawn anew, in evaluation the same draw for every
    item, so that an image depends on its noise alone. The time is 1: e is noise, and x a sample. Where the steps of the
    solver and their gradient are to change, set the attribute `equilibrium`.
    Source: Geng et al. 2023; thesis Eq. 4.1-4.5 and Table 4.7. Positions and initial weights as in the released code.

    Args:
        in_channels, image_size: C, H = W.
        patch_size: P; N = (H / P)^2 patches.
        width: D. Table 4.7: 256, 384, 512, 768, 768 for Tiny, Mini, Small, Base, Base+.
        depth: blocks of the injection transformer: 6, 6, 6, 1, 6.
        equilibrium_depth: blocks of the equilibrium transformer, 3.
        expansion, equilibrium_expansion: the FFN's hidden width over D: 4, and 6, 6, 8, 12, 8.
        head_channels: channels per head.
        num_classes: 0 without labels; else every call needs one of 0..num_classes - 1: there is no null label.
        iterations: of the fixed-point iteration, differentiated as they stand.

    Raises:
        ValueError: sizes that do not divide; in the call, e of another shape, a time before 1, or a label where none
            belongs, or none where one does.
    """

    def __init__(
        self,
        in_channels: int = 3,
        image_size: int = 32,
        patch_size: int = 2,
        width: int = 512,
        depth: int = 6,
        equilibrium_depth: int = 3,
        expansion: float = 4.0,
        equilibrium_expansion: float = 8.0,
        head_channels: int = 64,
        num_classes: int = 0,
        iterations: int = 6,
    ):
        super().__init__()
        if image_size % patch_size or width % head_channels or width % 4:
            raise ValueError(
                f"need image_size a multiple of patch_size, and width of head_channels and of 4; got {image_size}, "
                f"{patch_size}, {width}, {head_channels}"
            )
        self.shape, self.patch_size, self.num_classes = (in_channels, image_size, image_size), patch_size, num_classes
        self.null_label = num_classes == 0  # whether it runs without a class
        heads, pixels = width // head_channels, in_channels * patch_size**2
        self.stem = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.register_buffer("positions", sinusoids(image_size // patch_size, width).to(self.stem.weight.dtype))
        self.table = nn.Embedding(num_classes, 3 * width) if num_classes else None
        self.injection = nn.ModuleList([Block(width, heads, expansion) for _ in range(depth)])
        self.inject = nn.Linear(width, 3 * width * equilibrium_depth, bias=False)
        self.blocks = nn.ModuleList([Block(width, heads, equilibrium_expansion) for _ in range(equilibrium_depth)])
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, pixels)
        self.equilibrium = Equilibrium(Picard(max_iterations=iterations, rtol=0.0, atol=1e-3), Unrolled(iterations))
        self._initialise()

    def forward(self, e: Tensor, t: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        if t is not None and bool((t < 1).any()):
            raise ValueError(
                f"GET makes images of noise alone, in one call at t = 1, and is asked at t = {float(t.min()):.3g}; "
                "choose sampler=one_step"
            )
        u = self.injections(e, label)
        return self.decode(self.equilibrium(self.step, self.start(u), u).z)

    def injections(self, e: Tensor, label: Tensor | None = None) -> Tensor:
        """n_l + c of every block of the equilibrium transformer: (B, N, equilibrium_depth, 3D)."""
        if e.shape[1:] != self.shape:
            raise ValueError(f"GET takes noise (B, {', '.join(map(str, self.shape))}), got shape {tuple(e.shape)}")
        if (label is None) != (self.table is None):
            raise ValueError(
                "a label was given to a network without classes: build it with num_classes > 0"
                if label is not None
                else f"this network has no unconditional model: give each sample a class, 0..{self.num_classes - 1}"
            )
        c = None if self.table is None or label is None else self.table(label)[:, None]
        h = self.stem(e).flatten(2).transpose(1, 2) + self.positions
        for block in self.injection:
            h = block(h, c)
        n = self.inject(h).unflatten(2, (len(self.blocks), -1))
        return cast(Tensor, n if c is None else n + c[:, None])

    def start(self, u: Tensor) -> Tensor:
        """z_0 (B, N, D)."""
        shape = (u.shape[1], u.shape[3] // 3)
        if self.training:
            return torch.randn(len(u), *shape, dtype=u.dtype, device=u.device)
        z = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        return z.to(u.device, u.dtype).expand(len(u), *shape).contiguous()

    def step(self, z: Tensor, u: Tensor) -> Tensor:
        """f(z, u): the equilibrium transformer once."""
        for i, block in enumerate(self.blocks):
            z = block(z, u[:, :, i])
        return z

    def decode(self, z: Tensor) -> Tensor:
        """z (B, N, D) -> x (B, C, H, W)."""
        patches, p = self.head(self.norm(z)), self.patch_size
        channels, height, width = self.shape
        pixels = patches.unflatten(1, (height // p, width // p)).unflatten(3, (p, p, channels))
        return cast(Tensor, pixels.permute(0, 5, 1, 3, 2, 4).reshape(-1, *self.shape))

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.stem.weight.flatten(1))
        nn.init.zeros_(cast(Tensor, self.stem.bias))
        if self.table is not None:
            nn.init.normal_(self.table.weight, std=0.02)
        nn.init.zeros_(self.head.weight)


def sinusoids(side: int, dim: int) -> Tensor:
    """Positions (side^2, dim) of a square grid, row by row: dim / 2 features of columns, then of rows; float64."""
    rate = torch.exp(torch.arange(dim // 4, dtype=torch.float64) * (-4 * math.log(10000) / dim))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * rate
    one = torch.cat([angle.sin(), angle.cos()], 1)
    columns, rows = one.expand(side, side, -1), one[:, None].expand(side, side, -1)
    return torch.cat([columns, rows], 2).flatten(0, 1)
