"""Restorers: images from incomplete, noisy measurements of them, by calling a denoiser. One class a method."""

from steadyflow.restorers.c_pigdm import CPiGDM, CPiGFM
from steadyflow.restorers.diffpir import DiffPIR
from steadyflow.restorers.flow_dps import FlowDPS
from steadyflow.restorers.gradients import DPS, PiGDM
from steadyflow.restorers.guided import GuidedSampler
from steadyflow.restorers.linear_regression import LinearRegression
from steadyflow.restorers.presets import guided
from steadyflow.restorers.red_diff import REDDiff
from steadyflow.restorers.restorer import Measurement, Restorer
from steadyflow.restorers.svd import DDNM, DDRM

__all__ = [
    "DDNM",
    "DDRM",
    "DPS",
    "CPiGDM",
    "CPiGFM",
    "DiffPIR",
    "FlowDPS",
    "GuidedSampler",
    "LinearRegression",
    "Measurement",
    "PiGDM",
    "REDDiff",
    "Restorer",
    "guided",
]
