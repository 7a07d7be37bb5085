"""Networks: those that predict the noise in a molecule, and those that predict configurations."""

from __future__ import annotations

from molgen_energy.models.edm import EDM
from molgen_energy.models.gdm import GDM
from molgen_energy.models.gdm_pairs import GDMPairs
from molgen_energy.models.mlp import MLP
from molgen_energy.models.resnet import ResNet

MODELS: dict[str, type[GDM | EDM | GDMPairs]] = {"gdm": GDM, "edm": EDM, "gdm_pairs": GDMPairs}
"""Networks on molecules."""

SHAPE_MODELS: dict[str, type[MLP]] = {"mlp": MLP}
"""Networks from numbers to points."""

SPIN_MODELS: dict[str, type[ResNet]] = {"resnet": ResNet}
"""Networks on lattices."""

__all__ = ["EDM", "GDM", "MLP", "MODELS", "SHAPE_MODELS", "SPIN_MODELS", "GDMPairs", "ResNet"]
