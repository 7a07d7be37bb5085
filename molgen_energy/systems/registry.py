"""The physical systems, by name, and their configurations."""

from __future__ import annotations

from pathlib import Path

from molgen_energy.config import Config, read_config
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.systems.base import System
from molgen_energy.systems.molecules.system import MoleculeSystem
from molgen_energy.systems.properties.system import PropertySystem
from molgen_energy.systems.shapes.system import ShapeSystem
from molgen_energy.systems.spins.system import SpinSystem
from molgen_energy.training.checkpoint import Checkpoint

SYSTEMS: dict[str, System] = {
    "molecules": MoleculeSystem(),
    "shapes": ShapeSystem(),
    "spins": SpinSystem(),
    "properties": PropertySystem(),
}
"""Physical systems."""

DEFAULT_SYSTEM = "molecules"
"""The system of `train` without a configuration."""


def system_named(name: str, where: str) -> System:
    """A physical system; the error message begins with `where` the name comes from.

    Raises
    ------
    InputError
        There is no such system.
    """
    if name not in SYSTEMS:
        raise InputError(f"{where}: {unknown_name('system', name, SYSTEMS)}")
    return SYSTEMS[name]


def load_config(name: str | Path) -> Config:
    """A shipped configuration by name, or a YAML file by path.

    Raises
    ------
    InputError
        There is no such configuration, it is not YAML, or a key or value is not valid.
    """
    raw = read_config(name)
    return system_named(raw.system, raw.where).config.of(raw)


def system_of_checkpoint(checkpoint: Checkpoint) -> System:
    """The physical system of a checkpoint.

    Raises
    ------
    InputError
        There is no such system, or the state is not as it declares.
    """
    system = system_named(checkpoint.system, str(checkpoint.path))
    checkpoint.state_as(system.state)
    return system
