"""Strain: the energy that molecules lose on relaxation, and the RMSD from the relaxed geometry.

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

_MAX_STEPS_MMFF = 5000
_MAX_STEPS_XTB = 500
_MAX_FORCE_XTB = 0.05  # eV/Å


class Relaxation(NamedTuple):
    """Relaxation of one molecule; strain and RMSD are None if it failed, for the given reason."""

    strain: float | None  # kcal/mol
    rmsd: float | None  # Å, all atoms, after superposition
    reason: str = ""


def relaxation_failed(chunk: MoleculeChunk, reason: str) -> list[Relaxation]:
    """Result for molecules whose relaxation did not finish."""
    return [Relaxation(None, None, reason)] * len(chunk)


def relax_mmff(chunk: MoleculeChunk) -> list[Relaxation]:
    """Relax molecules with their bonds in the MMFF94 force field."""
    return [_relax_mmff(molecule) for molecule in chunk.molecules]


def _relax_mmff(molecule: Molecule) -> Relaxation:
    built = build(molecule, positions=True)
    with rdBase.BlockLogs():
        try:
            Chem.SanitizeMol(built)
            properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(built)
        except (ValueError, RuntimeError) as error:
            return Relaxation(None, None, str(error).strip())
        if properties is None:
            return Relaxation(None, None, "no MMFF94 parameters")
        field = rdForceFieldHelpers.MMFFGetMoleculeForceField(built, properties)
        if field is None:
            return Relaxation(None, None, "no MMFF94 parameters")
        before = field.CalcEnergy()
        if field.Minimize(maxIts=_MAX_STEPS_MMFF) != 0:
            return Relaxation(None, None, f"not converged after {_MAX_STEPS_MMFF} steps")
        after = field.CalcEnergy()
    relaxed = np.array(field.Positions(), np.float64).reshape(-1, 3)
    return _result(before - after, molecule.positions, relaxed)


def relax_xtb(chunk: MoleculeChunk) -> list[Relaxation]:
    """Relax molecules by GFN2-xTB, without using their bonds; needs tblite and ASE."""
    return [_relax_xtb(molecule) for molecule in chunk.molecules]


def _relax_xtb(molecule: Molecule) -> Relaxation:
    from ase import Atoms
    from ase.optimize import BFGS
    from ase.units import kcal, mol
    from tblite.ase import TBLite

    atoms = Atoms(molecule.atomic_numbers, molecule.positions.astype(np.float64))
    charge = 0 if molecule.formal_charges is None else int(molecule.formal_charges.sum())
    atoms.calc = TBLite(method="GFN2-xTB", charge=charge, verbosity=0)
    try:
        before = atoms.get_potential_energy()
        if not BFGS(atoms, logfile=None).run(fmax=_MAX_FORCE_XTB, steps=_MAX_STEPS_XTB):
            return Relaxation(None, None, f"not converged after {_MAX_STEPS_XTB} steps")
        after = atoms.get_potential_energy()
    except Exception as error:  # tblite raises several types if the charges do not converge
        return Relaxation(None, None, str(error).strip().splitlines()[0])
    strain = (before - after) / (kcal / mol)
    return _result(strain, molecule.positions, atoms.positions)


def _result(strain: float, before: NDArray[np.float32], after: NDArray[np.float64]) -> Relaxation:
    if not np.isfinite(strain):
        return Relaxation(None, None, "energy not finite")
    return Relaxation(float(strain), rmsd(before.astype(np.float64), after))


def rmsd(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Root-mean-square deviation of atoms (N, 3) after optimal superposition.

    W. Kabsch, Acta Crystallographica A 32, 922 (1976).
    """
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    u, s, v = np.linalg.svd(a.T @ b)
    s[-1] *= np.sign(np.linalg.det(u @ v)) or 1.0
    squared = (a**2).sum() + (b**2).sum() - 2 * s.sum()
    return float(np.sqrt(max(0.0, squared) / len(a)))
