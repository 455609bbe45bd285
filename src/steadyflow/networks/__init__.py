"""Networks: plain modules called as network(x (B, *S), t (B,), label (B,) or None) -> (B, *S)."""

from steadyflow.networks.diffusers_unet import DiffusersUNet
from steadyflow.networks.edm2 import EDM2UNet
from steadyflow.networks.get import GET
from steadyflow.networks.mlp import MLP
from steadyflow.networks.ncsnpp import NCSNpp, UnitRange
from steadyflow.networks.noisy_classifier import NoisyClassifier
from steadyflow.networks.unet import UNet

__all__ = ["GET", "MLP", "DiffusersUNet", "EDM2UNet", "NCSNpp", "NoisyClassifier", "UNet", "UnitRange"]
