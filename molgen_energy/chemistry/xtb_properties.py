"""Frontier orbitals and dipole of molecules by GFN2-xTB, by the package tblite.

C. Bannwarth, S. Ehlert, S. Grimme, J. Chem. Theory Comput. 15, 1652 (2019).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

XTB_UNITS = {"homo": "hartree", "lumo": "hartree", "gap": "hartree", "mu": "debye"}
"""Properties that `xtb_properties` computes, with their units."""
_BOHR = 0.529177210903  # Å, CODATA 2018
_DEBYE = 2.541746473  # debye of one e·bohr


def xtb_properties(
    atomic_numbers: NDArray[np.uint8], positions: NDArray[np.floating[Any]], charge: int = 0
) -> dict[str, float]:
    """HOMO, LUMO and their gap in hartree, and the dipole moment in debye; needs tblite.

    Parameters
    ----------
    atomic_numbers, positions
        (N,), and (N, 3) in Å.
    charge
        Total charge. The dipole of an ion is that about the origin.

    Raises
    ------
    ValueError
        The number of electrons is odd, all orbitals are occupied, or charges do not converge.
    """
    from tblite.interface import Calculator

    electrons = int(atomic_numbers.sum()) - charge  # core shells hold pairs
    if electrons % 2:
        raise ValueError("the number of electrons is odd")
    try:
        calculator = Calculator(
            "GFN2-xTB", atomic_numbers.astype(int), positions.astype(np.float64) / _BOHR, charge
        )
        calculator.set("verbosity", 0)
        found = calculator.singlepoint()
    except Exception as error:  # tblite raises several types where charges do not converge
        raise ValueError(f"GFN2-xTB failed: {str(error).strip().splitlines()[0]}") from error
    energies, occupied = found.get("orbital-energies"), found.get("orbital-occupations")
    pairs = round(float(occupied.sum()) / 2)
    if not 0 < pairs < len(energies):
        raise ValueError("GFN2-xTB has no occupied or no empty orbital here")
    homo, lumo = float(energies[pairs - 1]), float(energies[pairs])
    dipole = float(np.linalg.norm(found.get("dipole"))) * _DEBYE
    return {"homo": homo, "lumo": lumo, "gap": lumo - homo, "mu": dipole}
