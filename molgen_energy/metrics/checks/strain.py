"""Strain: the energy that molecules lose on relaxation, and how their geometry changes.

Energies are in kcal/mol, distances in Å. Methods: see `molgen_energy.chemistry.relaxation`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase

from molgen_energy.chemistry.geometry import absolute_changes, rmsd
from molgen_energy.chemistry.rdkit import bond_forms, build
from molgen_energy.chemistry.relaxation import Relaxed, relax_mmff, relax_xtb
from molgen_energy.data.molecules import Molecule, MoleculeChunk


class TypeChanges(NamedTuple):
    """Absolute changes of the bond lengths, angles or dihedrals of one molecule, by type."""

    code: NDArray[np.int64]  # (T,), of the type in aromatic form
    total: NDArray[np.float64]  # (T,), sum of the changes, Å or degrees
    number: NDArray[np.int64]  # (T,), how many there are


class Relaxation(NamedTuple):
    """Relaxation of one molecule; strain and RMSD are None if it failed, for the given reason."""

    strain: float | None  # kcal/mol
    rmsd: float | None  # Å, all atoms, after superposition
    reason: str = ""
    changes: dict[str, TypeChanges] | None = None  # by kind of geometry


def relaxation_failed(chunk: MoleculeChunk, reason: str) -> list[Relaxation]:
    """Result for molecules whose relaxation did not finish."""
    return [Relaxation(None, None, reason)] * len(chunk)


def strain_mmff(chunk: MoleculeChunk) -> list[Relaxation]:
    """Relax molecules with their bonds in the MMFF94 force field."""
    return _relax_all(chunk, _relax_mmff)


def strain_xtb(chunk: MoleculeChunk) -> list[Relaxation]:
    """Relax molecules by GFN2-xTB, without using their bonds; needs tblite and ASE."""
    return _relax_all(chunk, _relax_xtb)


def _relax_all(chunk: MoleculeChunk, relax: Callable[[Molecule], Relaxed]) -> list[Relaxation]:
    found: list[Relaxation] = []
    positions: dict[int, NDArray[np.float64]] = {}
    for k, molecule in enumerate(chunk.molecules):
        relaxation, relaxed = _relaxation(molecule, relax)
        found.append(relaxation)
        if relaxed is not None:
            positions[k] = relaxed
    for k, changes in zip(positions, _changes(chunk, positions), strict=True):
        found[k] = found[k]._replace(changes=changes)
    return found


def _relaxation(
    molecule: Molecule, relax: Callable[[Molecule], Relaxed]
) -> tuple[Relaxation, NDArray[np.float64] | None]:
    """The relaxation without changes of types, and the relaxed positions (N, 3)."""
    with rdBase.BlockLogs():
        try:
            relaxed = relax(molecule)
        except (ValueError, RuntimeError) as error:
            return Relaxation(None, None, str(error).strip()), None
    if not np.isfinite(relaxed.energy):
        return Relaxation(None, None, "energy not finite"), None
    distance = rmsd(molecule.positions.astype(np.float64), relaxed.positions)
    return Relaxation(float(relaxed.energy), distance), relaxed.positions


def _changes(
    chunk: MoleculeChunk, positions: dict[int, NDArray[np.float64]]
) -> list[dict[str, TypeChanges]]:
    """Changes of the molecules that have relaxed positions, by their number in the chunk."""
    if not positions:
        return []
    molecules = chunk.molecules.select(np.array(list(positions)))
    if molecules.bonds is not None:
        order = np.concatenate([bond_forms(molecule).aromatic for molecule in molecules])
        molecules = replace(molecules, bonds=replace(molecules.bonds, order=order))
    found: list[dict[str, TypeChanges]] = [{} for _ in positions]
    measured = absolute_changes(molecules, np.concatenate(list(positions.values())))
    for kind, (codes, values, owner) in measured.items():
        stops = np.searchsorted(owner, np.arange(len(molecules) + 1))
        for k, (start, stop) in enumerate(pairwise(stops.tolist())):
            code, place = np.unique(codes[start:stop], return_inverse=True)
            total = np.zeros(len(code))
            np.add.at(total, place, values[start:stop])
            found[k][kind] = TypeChanges(code, total, np.bincount(place, minlength=len(code)))
    return found


def _relax_mmff(molecule: Molecule) -> Relaxed:
    built = build(molecule, positions=True)
    Chem.SanitizeMol(built)
    return relax_mmff(built)


def _relax_xtb(molecule: Molecule) -> Relaxed:
    charge = 0 if molecule.formal_charges is None else int(molecule.formal_charges.sum())
    return relax_xtb(molecule.atomic_numbers, molecule.positions, charge)
