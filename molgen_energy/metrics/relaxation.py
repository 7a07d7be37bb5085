"""How far molecules are from rest: the energy they lose when relaxed, and how far they move.

Energies are in kcal/mol, distances in Å. MMFF94: T. A. Halgren, J. Comput. Chem. 17, 490 (1996),
by RDKit. GFN2-xTB: C. Bannwarth, S. Ehlert, S. Grimme, J. Chem. Theory Comput. 15, 1652 (2019), by
tblite and ASE.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase
from rdkit.Chem import rdForceFieldHelpers

from molgen_energy.chemistry.rdkit import build
from molgen_energy.data.molecules import Molecule, MoleculeChunk

_MOST_STEPS_MMFF = 5000
_MOST_STEPS_XTB = 500
_FORCE_XTB = 0.05  # eV/Å


class Relaxed(NamedTuple):
    """Of one molecule; both None where the reason says why."""

    strain: float | None  # kcal/mol
    rmsd: float | None  # Å, all atoms, after superposition
    reason: str = ""


def not_relaxed(piece: MoleculeChunk, reason: str) -> list[Relaxed]:
    """Molecules that were given up."""
    return [Relaxed(None, None, reason)] * len(piece)


def relax_mmff(piece: MoleculeChunk) -> list[Relaxed]:
    """Relax molecules with their bonds in the force field MMFF94."""
    return [_mmff(molecule) for molecule in piece.molecules]


def _mmff(molecule: Molecule) -> Relaxed:
    built = build(molecule, positions=True)
    with rdBase.BlockLogs():
        try:
            Chem.SanitizeMol(built)
            properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(built)
        except (ValueError, RuntimeError) as error:
            return Relaxed(None, None, str(error).strip())
        if properties is None:
            return Relaxed(None, None, "MMFF94 has no parameters for it")
        field = rdForceFieldHelpers.MMFFGetMoleculeForceField(built, properties)
        if field is None:
            return Relaxed(None, None, "MMFF94 has no parameters for it")
        before = field.CalcEnergy()
        if field.Minimize(maxIts=_MOST_STEPS_MMFF) != 0:
            return Relaxed(None, None, f"not at rest after {_MOST_STEPS_MMFF} steps")
        after = field.CalcEnergy()
    moved = np.array(field.Positions(), np.float64).reshape(-1, 3)
    return _relaxed(before - after, molecule.positions, moved)


def relax_xtb(piece: MoleculeChunk) -> list[Relaxed]:
    """Relax molecules, without regard to bonds, by GFN2-xTB; needs tblite and ASE."""
    return [_xtb(molecule) for molecule in piece.molecules]


def _xtb(molecule: Molecule) -> Relaxed:
    from ase import Atoms
    from ase.optimize import BFGS
    from ase.units import kcal, mol
    from tblite.ase import TBLite

    atoms = Atoms(molecule.atomic_numbers, molecule.positions.astype(np.float64))
    charge = 0 if molecule.formal_charges is None else int(molecule.formal_charges.sum())
    atoms.calc = TBLite(method="GFN2-xTB", charge=charge, verbosity=0)
    try:
        before = atoms.get_potential_energy()
        if not BFGS(atoms, logfile=None).run(fmax=_FORCE_XTB, steps=_MOST_STEPS_XTB):
            return Relaxed(None, None, f"not at rest after {_MOST_STEPS_XTB} steps")
        after = atoms.get_potential_energy()
    except Exception as error:  # what tblite raises where charges do not converge
        return Relaxed(None, None, str(error).strip().splitlines()[0])
    strain = (before - after) / (kcal / mol)
    return _relaxed(strain, molecule.positions, atoms.positions)


def _relaxed(strain: float, before: NDArray[np.float32], after: NDArray[np.float64]) -> Relaxed:
    if not np.isfinite(strain):
        return Relaxed(None, None, "its energy is not finite")
    return Relaxed(float(strain), rmsd(before.astype(np.float64), after))


def rmsd(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Root mean squared distance of atoms (N, 3) after the best superposition.

    W. Kabsch, Acta Crystallographica A 32, 922 (1976).
    """
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    u, s, v = np.linalg.svd(a.T @ b)
    s[-1] *= np.sign(np.linalg.det(u @ v)) or 1.0
    squared = (a**2).sum() + (b**2).sum() - 2 * s.sum()
    return float(np.sqrt(max(0.0, squared) / len(a)))
