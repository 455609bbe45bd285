"""Measurements of images: linear operators known by their singular value decomposition, and non-linear ones."""

from steadyflow.linear.compose import Composition, Stack
from steadyflow.linear.convolution import (
    Convolution,
    PaddedConvolution,
    disk_kernel,
    file_kernel,
    gaussian_kernel,
    motion_kernel,
)
from steadyflow.linear.diagonal import Denoising, Diagonal, Inpainting
from steadyflow.linear.masks import box_mask, cartesian_lines, file_mask, freeform_mask, random_mask
from steadyflow.linear.nonlinear import JPEG, Clip, NonlinearOperator, Quantise
from steadyflow.linear.operator import Operator
from steadyflow.linear.rows import Colorization, Fourier, RowOrthogonal, SuperResolution, WalshHadamard
from steadyflow.linear.separable import BicubicDownsampling, Blur, Separable

__all__ = [
    "JPEG",
    "BicubicDownsampling",
    "Blur",
    "Clip",
    "Colorization",
    "Composition",
    "Convolution",
    "Denoising",
    "Diagonal",
    "Fourier",
    "Inpainting",
    "NonlinearOperator",
    "Operator",
    "PaddedConvolution",
    "Quantise",
    "RowOrthogonal",
    "Separable",
    "Stack",
    "SuperResolution",
    "WalshHadamard",
    "box_mask",
    "cartesian_lines",
    "disk_kernel",
    "file_kernel",
    "file_mask",
    "freeform_mask",
    "gaussian_kernel",
    "motion_kernel",
    "random_mask",
]
