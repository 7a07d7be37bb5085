"""GEOM's own `drugs_crude.msgpack`: maps of 1,000 molecules, without bonds and charges.

Axelrod and Gómez-Bombarelli, Scientific Data 9, 185 (2022), doi:10.7910/DVN/JNGTDF. Each map leads
from a SMILES to the molecule, whose `conformers` have `totalenergy` in hartree and `xyz`, rows of
[Z, x, y, z] in Å. In memory is one molecule at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import Molecule
from molgen_energy.datasets.geom.layout import Entry, Layout, arrays_to_molecule
from molgen_energy.formats.messages import iterate_entries


class Crude(Layout):
    """`drugs_crude.msgpack`."""

    name = "GEOM's msgpack file"
    file_names = "drugs_crude.msgpack"
    has_bonds = False
    has_smiles = True

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def in_folder(cls, folder: Path) -> Crude | None:
        """The file of this name."""
        path = folder / "drugs_crude.msgpack"
        return cls(path) if path.exists() else None

    @classmethod
    def of_file(cls, path: Path, start: bytes) -> Crude | None:
        """Any file that begins with a map that is not empty."""
        is_map = start[:1] in (b"\xde", b"\xdf") or 0x81 <= int.from_bytes(start[:1], "big") <= 0x8F
        return cls(path) if is_map else None

    def entries(self, own_split: bool) -> Iterator[Entry]:
        """All molecules, in the order of the file."""
        for number, (smiles, found) in enumerate(iterate_entries(self._path), start=1):
            conformers = found.get("conformers") if isinstance(found, dict) else None
            if not isinstance(conformers, list):
                conformers = []
            items = [item if isinstance(item, dict) else {} for item in conformers]
            yield Entry(
                f"{self._path.name}: molecule {number}",
                [_rows(item.get("xyz")) for item in items],
                energies_of(items),
                smiles,
            )

    @staticmethod
    def decode(conformer: Any) -> Molecule:
        """The rows of a conformer."""
        if conformer.ndim != 2 or conformer.shape[1] != 4:
            raise ValueError("a conformer has no rows of Z, x, y, z")
        return arrays_to_molecule(conformer[:, 1:], conformer[:, 0])


def _rows(xyz: Any) -> NDArray[np.float64]:
    """An array, which any process can be sent, unlike lists that lie deep in one another."""
    try:
        return np.array(xyz, np.float64)
    except (ValueError, TypeError, OverflowError):
        return np.zeros(0)


def energies_of(conformers: list[dict[Any, Any]]) -> list[float]:
    """`totalenergy` of each conformer, NaN where it is none; nothing where no conformer has one."""
    energies = [conformer.get("totalenergy") for conformer in conformers]
    numbers = [float(e) if isinstance(e, (int, float)) else math.nan for e in energies]
    return [] if all(map(math.isnan, numbers)) else numbers
