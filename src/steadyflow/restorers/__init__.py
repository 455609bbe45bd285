"""Restorers: images from incomplete, noisy measurements of them, by calling a denoiser. One class a method."""

from steadyflow.restorers.c_pigdm import CPiGDM, CPiGFM
from steadyflow.restorers.guided import GuidedSampler
from steadyflow.restorers.restorer import Measurement, Restorer

__all__ = ["CPiGDM", "CPiGFM", "GuidedSampler", "Measurement", "Restorer"]
