"""Guidance: denoisers around a denoiser, so that every sampler can use them."""

from steadyflow.guidance.classifier_free import ClassifierFree

__all__ = ["ClassifierFree"]
