"""Networks: plain modules called as network(x (B, *S), t (B,), label (B,) or None) -> (B, *S)."""

from steadyflow.networks.diffusers_unet import DiffusersUNet
from steadyflow.networks.mlp import MLP
from steadyflow.networks.noisy_classifier import NoisyClassifier
from steadyflow.networks.unet import UNet

__all__ = ["MLP", "DiffusersUNet", "NoisyClassifier", "UNet"]
