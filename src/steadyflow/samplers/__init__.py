"""Samplers: noise in, samples of the data distribution out, by calling a denoiser. One class per method."""

from steadyflow.samplers.consistency import Consistency
from steadyflow.samplers.ddim import DDIM
from steadyflow.samplers.ddpm import DDPM
from steadyflow.samplers.deis import DEIS, IPNDM
from steadyflow.samplers.dpm_solver import DPMSolver
from steadyflow.samplers.dpmpp import DPMpp
from steadyflow.samplers.er_sde import ERSDE
from steadyflow.samplers.euler import Euler
from steadyflow.samplers.gddim import GDDIM
from steadyflow.samplers.heun import Heun
from steadyflow.samplers.likelihood import Likelihood
from steadyflow.samplers.linear import EulerMaruyama, LinearRK45, LinearSampler
from steadyflow.samplers.parallel import Parallel, in_parallel
from steadyflow.samplers.predictor_corrector import PredictorCorrector
from steadyflow.samplers.restart import Restart
from steadyflow.samplers.rk45 import RK45
from steadyflow.samplers.sa_solver import SASolver
from steadyflow.samplers.sampler import OneStepSampler, Sampler
from steadyflow.samplers.trajectory import Parareal, TrajectoryMap, Transport
from steadyflow.samplers.unipc import UniPC
from steadyflow.samplers.variational_bound import VariationalBound

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "ERSDE",
    "GDDIM",
    "IPNDM",
    "RK45",
    "Consistency",
    "DPMSolver",
    "DPMpp",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Likelihood",
    "LinearRK45",
    "LinearSampler",
    "OneStepSampler",
    "Parallel",
    "Parareal",
    "PredictorCorrector",
    "Restart",
    "SASolver",
    "Sampler",
    "TrajectoryMap",
    "Transport",
    "UniPC",
    "VariationalBound",
    "in_parallel",
]
