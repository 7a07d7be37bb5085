"""Losses between a predicted and a true configuration, for any training loop.

A loss takes prediction and target, padded (B, N, D) with a mask (B, N) or packed (ΣN, D) with the
sample `batch` of each atom, and returns one value for each sample, (B,). Weights in diffusion time
and the mean over the batch are left to the caller. A loss declares the inputs that it requires
besides positions, `requires`, and its section class in a configuration, `Config`; a loss on
positions also the power of a small displacement with which it grows, `degree`.

>>> energy = PairwiseEnergy(springs="exponential")
>>> loss = energy(prediction, target, mask).mean()
"""

from __future__ import annotations

from molgen_energy.losses.adaptive import AdaptiveSprings
from molgen_energy.losses.base import Loss, LossConfig, Neighbours, PositionLoss, ResolvedLoss
from molgen_energy.losses.edges import (
    EDGES,
    BondEdges,
    CompleteEdges,
    Edges,
    EdgesConfig,
    SparseEdges,
    SymmetrizedEdges,
)
from molgen_energy.losses.energy import EnergyConfig, PairwiseEnergy, mean_stiffness
from molgen_energy.losses.pointwise import (
    KabschError,
    MeanAbsoluteError,
    MeanSquaredError,
    PointwiseLoss,
)
from molgen_energy.losses.score_energy import ScoreEnergy, ScoreEnergyConfig
from molgen_energy.losses.spin import (
    CrossEntropy,
    LocalField,
    Margin,
    SpinLoss,
    TrueEnergy,
    lattice_couplings,
)
from molgen_energy.losses.springs import (
    PUBLISHED_SCALES,
    SPRINGS,
    SpringFamily,
    SpringsConfig,
)
from molgen_energy.losses.torsion import ChiralityError, TorsionError

LOSSES: dict[str, type[PositionLoss]] = {
    "energy": PairwiseEnergy,
    "score_energy": ScoreEnergy,
    "mse": MeanSquaredError,
    "mae": MeanAbsoluteError,
    "kabsch": KabschError,
}
"""Losses on the positions of atoms."""

POSITION_TERMS: dict[str, type[PositionLoss]] = {
    "mse": MeanSquaredError,
    "torsion": TorsionError,
    "chirality": ChiralityError,
}
"""Terms that are added to a loss on positions.

`torsion` and `chirality` alone do not determine a configuration, so they are no rows of `LOSSES`.
"""

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
    "POSITION_TERMS",
    "PUBLISHED_SCALES",
    "SPIN_LOSSES",
    "SPRINGS",
    "AdaptiveSprings",
    "BondEdges",
    "ChiralityError",
    "CompleteEdges",
    "CrossEntropy",
    "Edges",
    "EdgesConfig",
    "EnergyConfig",
    "KabschError",
    "LocalField",
    "Loss",
    "LossConfig",
    "Margin",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "Neighbours",
    "PairwiseEnergy",
    "PointwiseLoss",
    "PositionLoss",
    "ResolvedLoss",
    "ScoreEnergy",
    "ScoreEnergyConfig",
    "SparseEdges",
    "SpinLoss",
    "SpringFamily",
    "SpringsConfig",
    "SymmetrizedEdges",
    "TorsionError",
    "TrueEnergy",
    "lattice_couplings",
    "mean_stiffness",
]
