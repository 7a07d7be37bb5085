"""The cleaning of molecules with given bonds of "GEOM-Drugs Revisited".

F. Nikitin, I. Dunn, D. R. Koes, O. Isayev, "GEOM-Drugs Revisited: Toward More Chemically Accurate
Benchmarks for 3D Molecule Generation", 2025. A molecule passes if RDKit sanitises and Kekulises it,
it is one fragment, and every bond is about as long as the sum of the covalent radii of its atoms.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase

from molgen_energy.chemistry.rdkit import MAX_NEIGHBOURS, build, max_neighbours
from molgen_energy.data.molecules import Molecule, Molecules
from molgen_energy.elements import ELEMENTS, atomic_number

TOLERANCE = 0.4
"""The length of a bond may differ from the sum of radii by this part of it."""

FAULTS = (
    "RDKit does not sanitise or Kekulise it",
    "it has several fragments",
    "a bond is too long or too short for its elements",
)
"""What `faults` finds, in the order in which it looks."""

_RADII = {"H": 0.31, "C": 0.76, "N": 0.71, "O": 0.66, "F": 0.57, "P": 1.07, "S": 1.05,
          "Cl": 1.02, "Br": 1.20, "I": 1.39}  # fmt: skip
_OTHER_RADIUS = 1.5


@cache
def _radii() -> NDArray[np.float64]:
    """(119,) in Å by atomic number, as published."""
    radii = np.full(ELEMENTS + 1, _OTHER_RADIUS)
    for symbol, radius in _RADII.items():
        radii[atomic_number(symbol)] = radius
    return radii


def length_deviations(molecules: Molecules) -> NDArray[np.float64]:
    """|d - r| / r of each bond, (ΣE,), with its length d and the sum r of its atoms' radii.

    Infinite or NaN where coordinates are.
    """
    ends = molecules.atoms_of_bonds()
    expected = _radii()[molecules.atomic_numbers[ends]].sum(axis=1)
    first, second = molecules.positions.astype(np.float64)[ends.T]
    with np.errstate(invalid="ignore"):
        deviations: NDArray[np.float64] = np.abs(
            np.linalg.norm(first - second, axis=1) / expected - 1
        )
    return deviations


def lengths_fit(molecules: Molecules) -> NDArray[np.bool_]:
    """Which molecules have no bond that deviates by more than `TOLERANCE`, (M,).

    Of several conformers of a molecule, the published cleaning drops all if one of them fails.
    """
    fits = np.ones(len(molecules), bool)
    if molecules.bonds is not None:
        bad = ~(length_deviations(molecules) <= TOLERANCE)
        fits[molecules.molecule_index_of_bonds[bad]] = False
    return fits


def faults(molecules: Molecules) -> list[str]:
    """Why each molecule fails the cleaning, one of `FAULTS`; empty where it passes, (M,)."""
    fits = lengths_fit(molecules)
    return [
        topology_fault(molecule) or ("" if fit else FAULTS[2])
        for molecule, fit in zip(molecules, fits.tolist(), strict=True)
    ]


def topology_fault(molecule: Molecule) -> str:
    """Why the bonds and charges of a molecule fail the cleaning, whatever its positions."""
    if max_neighbours(molecule) > MAX_NEIGHBOURS:
        return FAULTS[0]
    built = build(molecule)
    with rdBase.BlockLogs():
        try:
            Chem.SanitizeMol(built)
            Chem.Kekulize(built, clearAromaticFlags=True)
        except (ValueError, RuntimeError):  # the valence of an atom overflows RDKit's counter
            return FAULTS[0]
    return FAULTS[1] if len(Chem.GetMolFrags(built)) > 1 else ""
