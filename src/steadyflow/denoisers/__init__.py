"""Denoisers D(x, alpha, sigma) = E[x_0 | alpha x_0 + sigma eps = x]: checkpoints in their wrapper, exact formulas."""

from steadyflow.denoisers.classifier import NetworkClassifier
from steadyflow.denoisers.denoiser import CountedDenoiser, Denoiser
from steadyflow.denoisers.exact import Empirical, Gaussian, GaussianMixture
from steadyflow.denoisers.linear import DenoiserNoise, MixtureNoise, NetworkNoise, NoiseModel, VelocityNoise
from steadyflow.denoisers.network import (
    ConsistencyDenoiser,
    EDMDenoiser,
    EpsDenoiser,
    NetworkDenoiser,
    ScoreDenoiser,
    VDenoiser,
    VelocityDenoiser,
    X0Denoiser,
)
from steadyflow.denoisers.photographs import Photographs
from steadyflow.denoisers.pullback import denoise_and_pull

__all__ = [
    "ConsistencyDenoiser",
    "CountedDenoiser",
    "Denoiser",
    "DenoiserNoise",
    "EDMDenoiser",
    "Empirical",
    "EpsDenoiser",
    "Gaussian",
    "GaussianMixture",
    "MixtureNoise",
    "NetworkClassifier",
    "NetworkDenoiser",
    "NetworkNoise",
    "NoiseModel",
    "Photographs",
    "ScoreDenoiser",
    "VDenoiser",
    "VelocityDenoiser",
    "VelocityNoise",
    "X0Denoiser",
    "denoise_and_pull",
]
