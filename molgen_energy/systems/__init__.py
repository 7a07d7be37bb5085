"""Physical systems: each is its configuration, its network, its loss, and how it is sampled."""

from __future__ import annotations

from molgen_energy.systems.base import System
from molgen_energy.systems.molecules import MoleculeSystem
from molgen_energy.systems.shapes import ShapeSystem
from molgen_energy.systems.spins import SpinSystem

SYSTEMS: dict[str, System] = {
    system.name: system for system in (MoleculeSystem(), ShapeSystem(), SpinSystem())
}

__all__ = ["SYSTEMS", "System"]
