"""Datasets: torch Datasets of (x float32, label int), images in [-1, 1]."""

from steadyflow.data.digits import Digits
from steadyflow.data.images import InMemoryImages, from_uint8, to_uint8

__all__ = ["Digits", "InMemoryImages", "from_uint8", "to_uint8"]
