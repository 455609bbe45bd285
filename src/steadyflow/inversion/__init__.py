"""Inversion: the noise that a sampler turns into given images. One class a method."""

from steadyflow.inversion.ddim_inversion import DDIMInversion
from steadyflow.inversion.deq import DEQInversion
from steadyflow.inversion.edict import EDICT
from steadyflow.inversion.inverter import Inversion, Inverter
from steadyflow.inversion.naive import Naive

__all__ = ["EDICT", "DDIMInversion", "DEQInversion", "Inversion", "Inverter", "Naive"]
