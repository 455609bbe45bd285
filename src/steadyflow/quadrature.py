"""Gauss-Legendre quadrature on [0, 1]."""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Rule(NamedTuple):
    """int_0^1 g = sum_j weights_j g(nodes_j);  int_0^nodes_i g = sum_j integral_ij g(nodes_j). Float64, on the CPU.

    The first is exact for polynomials of degree 2 n - 1, the second, a collocation method's matrix, of degree n - 1.
    """

    nodes: Tensor
    weights: Tensor
    integral: Tensor


@cache
def gauss_legendre(n: int) -> Rule:
    """The rule of n nodes."""
    x, weights = np.polynomial.legendre.leggauss(n)
    p = np.polynomial.legendre.legvander(x, n)  # p[k, j] = P_j(x_k)
    rises = p[:, 1:] - np.concatenate([-np.ones((n, 1)), p[:, :-2]], 1)  # (2 j + 1) int_-1^x P_j
    integral = 0.25 * rises @ p[:, :n].T * weights
    return Rule(*(torch.from_numpy(v) for v in ((x + 1) / 2, weights / 2, integral)))
