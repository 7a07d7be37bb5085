"""The physical systems that there are, by name, and configurations of theirs."""

from __future__ import annotations

from pathlib import Path

from molgen_energy.config import Config, read_config
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.systems.base import System
from molgen_energy.systems.molecules.system import MoleculeSystem
from molgen_energy.systems.shapes.system import ShapeSystem
from molgen_energy.systems.spins.system import SpinSystem

SYSTEMS: dict[str, System] = {
    system.name: system for system in (MoleculeSystem(), ShapeSystem(), SpinSystem())
}


def system_named(name: str, where: str) -> System:
    """A physical system; `where` it is named begins the message where there is none.

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
        There is no such configuration, it is no YAML, or a key or value is not valid.
    """
    given = read_config(name)
    return system_named(given.system, given.where).config.of(given)
