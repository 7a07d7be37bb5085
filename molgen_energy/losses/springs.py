"""Spring families: how stiff the spring between two atoms is, by their distance in the data.

A family is a function f of distances d (any shape, the unit of the data, Å for molecules) that
returns f(d) of the same shape. The spring constant of a pair is k_ij = (c/n)·f(d_ij), with n the
number of atoms and a scale c. Kaba et al., "Energy Loss Functions for Physical Systems", NeurIPS
2025, section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SpringFamily = Callable[[Tensor], Tensor]

_EPSILON = 1e-5  # of the paper's code; keeps the inverse families finite at distance 0


def constant(distances: Tensor) -> Tensor:
    """f(d) = 1: a Morse potential to second order, all pairs alike."""
    return torch.ones_like(distances)


def exponential(distances: Tensor) -> Tensor:
    """f(d) = exp(−d): the paper's best for coordinate and equivariant graph networks."""
    return torch.exp(-distances)


def inverse(distances: Tensor) -> Tensor:
    """f(d) = 1/(d + ε)."""
    return 1 / (distances + _EPSILON)


def inverse_square(distances: Tensor) -> Tensor:
    """f(d) = 1/(d² + ε): a Lennard-Jones potential to second order."""
    return 1 / (distances.square() + _EPSILON)


SPRINGS: dict[str, SpringFamily] = {
    "constant": constant,
    "exponential": exponential,
    "inverse": inverse,
    "inverse_square": inverse_square,
}
