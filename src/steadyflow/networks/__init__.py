"""Networks: plain modules called as network(x (B, *S), t (B,), label (B,) or None) -> (B, *S)."""

from steadyflow.networks.mlp import MLP
from steadyflow.networks.unet import UNet

__all__ = ["MLP", "UNet"]
