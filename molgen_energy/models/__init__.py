"""Networks. To add a denoiser of molecules, subclass `Denoiser` and add a row to `MODELS`."""

from __future__ import annotations

from molgen_energy.models.base import Denoiser
from molgen_energy.models.edm import EDM
from molgen_energy.models.gdm import GDM
from molgen_energy.models.gdm_pairs import GDMPairs
from molgen_energy.models.invariant import InvariantNetwork
from molgen_energy.models.jodo import JODO
from molgen_energy.models.mlp import MLP
from molgen_energy.models.resnet import ResNet
from molgen_energy.models.transformer import Transformer

MODELS: dict[str, type[Denoiser]] = {
    "gdm": GDM,
    "edm": EDM,
    "gdm_pairs": GDMPairs,
    "transformer": Transformer,
    "jodo": JODO,
}
"""Denoisers of molecules."""

SHAPE_MODELS: dict[str, type[MLP]] = {"mlp": MLP}
"""Networks from numbers to points."""

SPIN_MODELS: dict[str, type[ResNet]] = {"resnet": ResNet}
"""Networks on lattices."""

PROPERTY_MODELS: dict[str, type[InvariantNetwork]] = {"invariant": InvariantNetwork}
"""Networks from molecules to numbers."""

__all__ = [
    "EDM",
    "GDM",
    "JODO",
    "MLP",
    "MODELS",
    "PROPERTY_MODELS",
    "SHAPE_MODELS",
    "SPIN_MODELS",
    "Denoiser",
    "GDMPairs",
    "InvariantNetwork",
    "ResNet",
    "Transformer",
]
