"""Checkpoints: saved and loaded without pickled code, embedded in the package, public, or exact."""

from steadyflow.checkpoints.checkpoint import Checkpoint, analytic, embedded, embedded_names, load, photographs
from steadyflow.checkpoints.files import save
from steadyflow.checkpoints.public import Public, none, public
from steadyflow.checkpoints.running import Running

__all__ = [
    "Checkpoint",
    "Public",
    "Running",
    "analytic",
    "embedded",
    "embedded_names",
    "load",
    "none",
    "photographs",
    "public",
    "save",
]
