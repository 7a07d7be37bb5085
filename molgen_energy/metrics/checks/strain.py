"""Strain: the energy that molecules lose on relaxation, and the RMSD from the relaxed geometry.

Energies are in kcal/mol, distances in Å. Methods: see `molgen_energy.chemistry.relaxation`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from rdkit import Chem, rdBase

from molgen_energy.chemistry.geometry import rmsd
from molgen_energy.chemistry.rdkit import build
from molgen_energy.chemistry.relaxation import Relaxed, relax_mmff, relax_xtb
from molgen_energy.data.molecules import Molecule, MoleculeChunk


class Relaxation(NamedTuple):
    """Relaxation of one molecule; strain and RMSD are None if it failed, for the given reason."""

    strain: float | None  # kcal/mol
    rmsd: float | None  # Å, all atoms, after superposition
    reason: str = ""


def relaxation_failed(chunk: MoleculeChunk, reason: str) -> list[Relaxation]:
    """Result for molecules whose relaxation did not finish."""
    return [Relaxation(None, None, reason)] * len(chunk)


def strain_mmff(chunk: MoleculeChunk) -> list[Relaxation]:
    """Relax molecules with their bonds in the MMFF94 force field."""
    return [_relaxation(molecule, _relax_mmff) for molecule in chunk.molecules]


def strain_xtb(chunk: MoleculeChunk) -> list[Relaxation]:
    """Relax molecules by GFN2-xTB, without using their bonds; needs tblite and ASE."""
    return [_relaxation(molecule, _relax_xtb) for molecule in chunk.molecules]


def _relaxation(molecule: Molecule, relax: Callable[[Molecule], Relaxed]) -> Relaxation:
    with rdBase.BlockLogs():
        try:
            relaxed = relax(molecule)
        except (ValueError, RuntimeError) as error:
            return Relaxation(None, None, str(error).strip())
    if not np.isfinite(relaxed.energy):
        return Relaxation(None, None, "energy not finite")
    distance = rmsd(molecule.positions.astype(np.float64), relaxed.positions)
    return Relaxation(float(relaxed.energy), distance)


def _relax_mmff(molecule: Molecule) -> Relaxed:
    built = build(molecule, positions=True)
    Chem.SanitizeMol(built)
    return relax_mmff(built)


def _relax_xtb(molecule: Molecule) -> Relaxed:
    charge = 0 if molecule.formal_charges is None else int(molecule.formal_charges.sum())
    return relax_xtb(molecule.atomic_numbers, molecule.positions, charge)
