"""Input molecules of a job, from files or RDKit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from rdkit import Chem

from molgen_energy.chemistry.convert import molecule_from_rdkit
from molgen_energy.chemistry.identity import identify
from molgen_energy.data.molecules import Molecule
from molgen_energy.errors import InputError
from molgen_energy.metrics.sources import FileSource
from molgen_energy.output import display_path, named_path
from molgen_energy.systems.molecules.control.base import FURTHEST, MOST_RECORDS, Record


def read_records(value: Any, option: str) -> list[Record]:
    """The molecules that an option names, with all hydrogens.

    Parameters
    ----------
    value
        A path of an SDF, XYZ or HDF5 file, an RDKit molecule with a conformer, or several of them.
    option
        For messages.

    Raises
    ------
    InputError
        A file cannot be read, there is no molecule or too many, a molecule has no coordinates or
        lacks hydrogens. The message names the file and the record.
    """
    found = read_molecules(value, option)
    for source, molecule in found:
        if molecule.bond_index is not None and identify(molecule).incomplete:
            raise InputError(
                f"{option} {source} lacks hydrogens; add them, in RDKit by Chem.AddHs(molecule, "
                "addCoords=True)"
            )
    return [Record.of_molecule(molecule, source) for source, molecule in found]


def read_molecules(value: Any, option: str) -> list[tuple[str, Molecule]]:
    """The molecules that an option names, with their sources, complete or not.

    Parameters and errors are those of `read_records`, but for hydrogens.
    """
    several = isinstance(value, Iterable) and not isinstance(value, (str, Chem.Mol))
    items = list(value) if several else [value]
    found = list(islice(_molecules(items, option), MOST_RECORDS + 1))
    if not found:
        raise InputError(f"{option}: there is no molecule; name at least one")
    if len(found) > MOST_RECORDS:
        raise InputError(
            f"{option}: a job takes at most {MOST_RECORDS:,} molecules; divide the file"
        )
    for source, molecule in found:
        if not np.isfinite(molecule.positions).all():
            raise InputError(f"{option} {source}: its coordinates are not finite; correct them")
        if np.abs(molecule.positions).max() > FURTHEST:
            raise InputError(
                f"{option} {source}: it is more than {FURTHEST:,.0f} Å from the origin; move it"
            )
    return found


def _molecules(items: list[Any], option: str) -> Iterator[tuple[str, Molecule]]:
    """Molecules with the names of their files and records."""
    for number, item in enumerate(items, start=1):
        if isinstance(item, (str, PathLike)):
            path = named_path(Path(item))
            if not path.exists():
                raise InputError(
                    f"{option}: {display_path(path)} does not exist; expected a file of molecules "
                    "with coordinates, SDF, XYZ or HDF5"
                )
            for chunk in FileSource(path).chunks():
                name = display_path(Path(path.name))
                for record, molecule in zip(chunk.records.tolist(), chunk.molecules, strict=True):
                    yield f"{name}: record {record}", molecule
        else:
            yield f"molecule {number}", _of_rdkit(item, f"{option}: molecule {number}")


def _of_rdkit(molecule: Any, name: str) -> Molecule:
    if not isinstance(molecule, Chem.Mol):
        raise InputError(f"{name} is {type(molecule).__name__}; give paths or RDKit molecules")
    try:
        return molecule_from_rdkit(molecule)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from error
