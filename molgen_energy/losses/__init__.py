"""Losses between a predicted and a true configuration, for anyone's training loop.

A loss is called with prediction and target, padded (B, N, D) with a mask (B, N) or packed (ΣN, D)
with the number `batch` of each atom's sample, and returns one value for each sample, (B,). Weights
in diffusion time and the mean over the batch live elsewhere. The attribute `degree` of a loss on
positions says with which power of a small displacement it grows.

>>> energy = PairwiseEnergy(springs="exponential")
>>> loss = energy(prediction, target, mask).mean()
"""

from __future__ import annotations

from molgen_energy.losses.base import Loss, Neighbours, PositionLoss
from molgen_energy.losses.edges import (
    EDGES,
    BondEdges,
    CompleteEdges,
    Edges,
    SparseEdges,
    SymmetrizedEdges,
)
from molgen_energy.losses.energy import PairwiseEnergy, mean_stiffness
from molgen_energy.losses.pointwise import (
    KabschError,
    MeanAbsoluteError,
    MeanSquaredError,
    PointwiseLoss,
)
from molgen_energy.losses.spin import (
    CrossEntropy,
    LocalField,
    Margin,
    SpinLoss,
    TrueEnergy,
    lattice_couplings,
)
from molgen_energy.losses.springs import PUBLISHED_SCALES, SPRINGS, SpringFamily

POINTWISE_LOSSES: dict[str, type[PointwiseLoss]] = {
    "mse": MeanSquaredError,
    "mae": MeanAbsoluteError,
    "kabsch": KabschError,
}
"""Losses that compare each atom with itself."""

LOSSES: dict[str, type[PositionLoss]] = {"energy": PairwiseEnergy, **POINTWISE_LOSSES}
"""Losses on the positions of atoms."""

SPIN_LOSSES: dict[str, type[SpinLoss]] = {
    "local_field": LocalField,
    "cross_entropy": CrossEntropy,
    "margin": Margin,
    "true_energy": TrueEnergy,
}
"""Losses on spins."""

__all__ = [
    "EDGES",
    "LOSSES",
    "POINTWISE_LOSSES",
    "PUBLISHED_SCALES",
    "SPIN_LOSSES",
    "SPRINGS",
    "BondEdges",
    "CompleteEdges",
    "CrossEntropy",
    "Edges",
    "KabschError",
    "LocalField",
    "Loss",
    "Margin",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "Neighbours",
    "PairwiseEnergy",
    "PointwiseLoss",
    "PositionLoss",
    "SparseEdges",
    "SpinLoss",
    "SpringFamily",
    "SymmetrizedEdges",
    "TrueEnergy",
    "lattice_couplings",
    "mean_stiffness",
]
