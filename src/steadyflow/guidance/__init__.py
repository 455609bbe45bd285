"""Guidance: denoisers around a denoiser, so that every sampler can use them."""

from steadyflow.guidance.classifier import Classifier
from steadyflow.guidance.classifier_free import ClassifierFree
from steadyflow.guidance.ddnm import DDNM
from steadyflow.guidance.dps import DPS
from steadyflow.guidance.pigdm import NRSD, PiGDM

__all__ = ["DDNM", "DPS", "NRSD", "Classifier", "ClassifierFree", "PiGDM"]
