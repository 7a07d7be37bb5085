"""Losses between a predicted and a true configuration, for anyone's training loop.

A loss is called with prediction (B, N, D), target (B, N, D) and mask (B, N), and returns one value
for each sample, (B,). Weights in diffusion time and the mean over the batch live elsewhere. Its
attribute `degree` says with which power of a small displacement it grows.

>>> energy = PairwiseEnergy(springs="exponential")
>>> loss = energy(prediction, target, mask).mean()
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from molgen_energy.losses.energy import PairwiseEnergy, mean_stiffness
from molgen_energy.losses.pointwise import MeanSquaredError
from molgen_energy.losses.springs import SPRINGS, SpringFamily


class Loss(Protocol):
    """What every loss is."""

    degree: int

    def __call__(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor: ...


LOSSES: dict[str, type[PairwiseEnergy] | type[MeanSquaredError]] = {
    "energy": PairwiseEnergy,
    "mse": MeanSquaredError,
}

__all__ = [
    "LOSSES",
    "SPRINGS",
    "Loss",
    "MeanSquaredError",
    "PairwiseEnergy",
    "SpringFamily",
    "mean_stiffness",
]
