"""Physical systems: each is its configuration, its network, its loss, and how it is sampled."""

from __future__ import annotations

from molgen_energy.systems.base import System
from molgen_energy.systems.molecules import MoleculeSystem
from molgen_energy.systems.shapes import ShapeSystem

SYSTEMS: dict[str, System] = {system.name: system for system in (MoleculeSystem(), ShapeSystem())}

__all__ = ["SYSTEMS", "System"]
