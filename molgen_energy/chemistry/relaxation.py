"""Relaxation of molecules to a minimum of a force field or of GFN2-xTB.

MMFF94: T. A. Halgren, J. Comput. Chem. 17, 490 (1996), by RDKit. GFN2-xTB: C. Bannwarth, S. Ehlert,
S. Grimme, J. Chem. Theory Comput. 15, 1652 (2019), by tblite and ASE.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem import rdForceFieldHelpers

from molgen_energy.chemistry.descent import SIZES, descend

_MAX_STEPS_MMFF = 5000
_MAX_STEPS_XTB = 500
_MAX_FORCE_XTB = 0.05  # eV/Å


class Relaxed(NamedTuple):
    """A molecule at a minimum: positions (N, 3) in Å, and the energy lost in kcal/mol."""

    positions: NDArray[np.float64]
    energy: float


def relax_mmff(molecule: Chem.Mol, conformer: int = -1) -> Relaxed:
    """Move a conformer of a sanitised molecule to a minimum of MMFF94, in place.

    Raises
    ------
    ValueError
        MMFF94 has no parameters for the molecule, or does not converge.
    """
    properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(molecule)
    field = properties and rdForceFieldHelpers.MMFFGetMoleculeForceField(
        molecule, properties, confId=conformer
    )
    if not field:
        raise ValueError("no MMFF94 parameters")
    field.Initialize()
    before = field.CalcEnergy()
    found = molecule.GetNumAtoms() in SIZES and descend(field, molecule, conformer)
    if not found and field.Minimize(maxIts=_MAX_STEPS_MMFF) != 0:
        raise ValueError(f"not converged after {_MAX_STEPS_MMFF} steps of MMFF94")
    positions = np.array(field.Positions(), np.float64).reshape(-1, 3)
    return Relaxed(positions, before - field.CalcEnergy())


def relax_xtb(
    atomic_numbers: NDArray[np.uint8],
    positions: NDArray[np.floating[Any]],
    charge: int,
    unpaired: int | None = None,
) -> Relaxed:
    """Relax a molecule by GFN2-xTB, without using bonds; needs the packages tblite and ASE.

    Parameters
    ----------
    atomic_numbers, positions
        (N,) and (N, 3) in Å.
    charge, unpaired
        Total charge, and number of unpaired electrons (by default the fewest).

    Raises
    ------
    ValueError
        Charges or geometry do not converge.
    """
    from ase import Atoms
    from ase.optimize import BFGS
    from ase.units import kcal, mol
    from tblite.ase import TBLite

    atoms = Atoms(atomic_numbers, positions.astype(np.float64))
    multiplicity = {} if unpaired is None else {"multiplicity": unpaired + 1}
    atoms.calc = TBLite(method="GFN2-xTB", charge=charge, verbosity=0, **multiplicity)
    try:
        before = atoms.get_potential_energy()
        converged = BFGS(atoms, logfile=None).run(fmax=_MAX_FORCE_XTB, steps=_MAX_STEPS_XTB)
        after = atoms.get_potential_energy()
    except Exception as error:  # tblite raises several types where charges do not converge
        raise ValueError(f"GFN2-xTB failed: {str(error).strip().splitlines()[0]}") from error
    if not converged:
        raise ValueError(f"not converged after {_MAX_STEPS_XTB} steps of GFN2-xTB")
    return Relaxed(atoms.positions, (before - after) / (kcal / mol))
