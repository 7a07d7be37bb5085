"""Which sums of bond orders make an atom stable.

`VALENCES` allows sums by element, for neutral atoms (Hoogeboom et al., "Equivariant Diffusion for
Molecule Generation in 3D", ICML 2022). `CHARGED_VALENCES` allows them by element and formal charge,
where bonds are given (Huang et al., "Learning Joint 2D & 3D Diffusion Models for Complete Molecule
Generation", 2023).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import AROMATIC, Molecules
from molgen_energy.elements import atomic_number

VALENCES: dict[str, tuple[int, ...]] = {
    "H": (1,), "B": (3,), "C": (4,), "N": (3,), "O": (2,), "F": (1,), "Al": (3,), "Si": (4,),
    "P": (3, 5), "S": (4,), "Cl": (1,), "As": (3,), "Br": (1,), "I": (1,), "Hg": (1, 2),
    "Bi": (3, 5),
}  # fmt: skip
"""Sums of bond orders of a stable neutral atom."""

CHARGED_VALENCES: dict[str, dict[int, tuple[int, ...]]] = {
    "H": {0: (1,), 1: (0,), -1: (0,)},
    "B": {0: (3,)},
    "C": {0: (4,), 1: (3,), -1: (3,)},
    "N": {0: (3,), 1: (2, 3, 4), -1: (2,)},
    "O": {0: (2,), 1: (3,), -1: (1,)},
    "F": {0: (1,), -1: (0,)},
    "Al": {0: (3,)},
    "Si": {0: (4,)},
    "P": {0: (3, 5), 1: (4,)},
    "S": {0: (2, 6), 1: (2, 3), 2: (4,), 3: (5,), -1: (3,)},
    "Cl": {0: (1,)},
    "As": {0: (3,)},
    "Se": {0: (2, 4, 6)},
    "Br": {0: (1,), 1: (2,)},
    "I": {0: (1,)},
    "Hg": {0: (1, 2)},
    "Bi": {0: (3, 5)},
}
"""Sums of bond orders of a stable atom for each formal charge, where bonds are given.

The table of JODO (Huang et al., "Learning Joint 2D & 3D Diffusion Models for Complete Molecule
Generation", 2023), but that neutral carbon has four bonds and neutral nitrogen three: as published,
it takes a carbon with three and a nitrogen with two for stable.
"""

VALENCE_MODELS = ("strict", "jodo")
"""`strict`: `CHARGED_VALENCES`, and a charge that is not there is unstable. `jodo`: as its code
counts, to compare with its figures: neutral C may have 3 and N 2, an unknown charge counts as 0,
elements with one entry ignore the charge, and an aromatic bond that stays counts as 1."""

_ELEMENTS = 119  # rows of a table by atomic number, which begins at 0
_HIGHEST_SUM = 64
_HIGHEST_CHARGE = 8


@cache
def _neutral_table() -> NDArray[np.bool_]:
    """(119, 65): by element and sum of orders."""
    allowed = np.zeros((_ELEMENTS, _HIGHEST_SUM + 1), bool)
    for symbol, sums in VALENCES.items():
        allowed[atomic_number(symbol), list(sums)] = True
    return allowed


@cache
def _charged_table(model: str) -> NDArray[np.bool_]:
    """(17, 119, 65): by formal charge + 8, element, and sum of orders."""
    allowed = np.zeros((2 * _HIGHEST_CHARGE + 1, _ELEMENTS, _HIGHEST_SUM + 1), bool)
    for symbol, by_charge in CHARGED_VALENCES.items():
        z = atomic_number(symbol)
        if model == "jodo":
            lax = {"C": (3, 4), "N": (2, 3)}.get(symbol, by_charge[0])
            allowed[:, z, list(lax)] = True
            by_charge = {q: sums for q, sums in by_charge.items() if q != 0}
        for charge, sums in by_charge.items():
            allowed[charge + _HIGHEST_CHARGE, z] = False
            allowed[charge + _HIGHEST_CHARGE, z, list(sums)] = True
    return allowed


def valences(molecules: Molecules) -> NDArray[np.int64]:
    """Sum of the bond orders of each atom, (ΣN,); an aromatic bond counts as 1.

    Kekulise first what holds aromatic bonds: 1.5 each has no place in an integer.
    """
    sums = np.zeros(len(molecules.atomic_numbers), np.int64)
    if molecules.bonds is not None:
        order = molecules.bonds.order.astype(np.int64)
        order[order == AROMATIC] = 1
        for atoms in molecules.atoms_of_bonds().T:
            sums += np.bincount(atoms, order, len(sums)).astype(np.int64)
    return sums


def stable_atoms(molecules: Molecules) -> NDArray[np.bool_]:
    """Which atoms have an allowed sum of bond orders, as neutral atoms (EDM), (ΣN,)."""
    sums = np.minimum(valences(molecules), _HIGHEST_SUM)
    stable: NDArray[np.bool_] = _neutral_table()[molecules.atomic_numbers, sums]
    return stable


def stable_charged_atoms(molecules: Molecules, model: str = "strict") -> NDArray[np.bool_]:
    """Which atoms have an allowed sum of bond orders for their formal charge, (ΣN,).

    Parameters
    ----------
    molecules
        With bonds, Kekulised where that was possible; without charges they count as 0.
    model
        One of `VALENCE_MODELS`. Under `strict` an atom with an aromatic bond that could not be
        Kekulised is unstable.
    """
    sums = np.minimum(valences(molecules), _HIGHEST_SUM)
    charges = np.zeros(len(sums), np.int64)
    if molecules.formal_charges is not None:
        charges = molecules.formal_charges.astype(np.int64)
    beyond = np.abs(charges) > _HIGHEST_CHARGE
    table = _charged_table(model)
    clipped = np.clip(charges, -_HIGHEST_CHARGE, _HIGHEST_CHARGE) + _HIGHEST_CHARGE
    stable: NDArray[np.bool_] = table[clipped, molecules.atomic_numbers, sums]
    if model == "strict":
        stable &= ~beyond
        if molecules.bonds is not None:
            aromatic = molecules.bonds.order == AROMATIC
            stable[molecules.atoms_of_bonds()[aromatic]] = False
    return stable


def has_valence(atomic_numbers: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which atoms are of an element that the table of valences knows; same shape."""
    known: NDArray[np.bool_] = np.any(_neutral_table(), axis=1)[atomic_numbers]
    return known
