"""Checkpoints: saved and loaded without pickled code, embedded in the package, or exact."""

from steadyflow.checkpoints.checkpoint import Checkpoint, analytic, embedded, embedded_names, load
from steadyflow.checkpoints.files import save

__all__ = ["Checkpoint", "analytic", "embedded", "embedded_names", "load", "save"]
