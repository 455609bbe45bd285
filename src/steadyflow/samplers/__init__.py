"""Samplers: noise in, samples of the data distribution out, by calling a denoiser. One class per method."""

from steadyflow.samplers.ddim import DDIM
from steadyflow.samplers.ddpm import DDPM
from steadyflow.samplers.deis import DEIS, IPNDM
from steadyflow.samplers.euler import Euler
from steadyflow.samplers.heun import Heun
from steadyflow.samplers.parallel import Parallel, in_parallel
from steadyflow.samplers.rk45 import RK45
from steadyflow.samplers.sampler import OneStepSampler, Sampler
from steadyflow.samplers.trajectory import Parareal, TrajectoryMap, Transport

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "IPNDM",
    "RK45",
    "Euler",
    "Heun",
    "OneStepSampler",
    "Parallel",
    "Parareal",
    "Sampler",
    "TrajectoryMap",
    "Transport",
    "in_parallel",
]
