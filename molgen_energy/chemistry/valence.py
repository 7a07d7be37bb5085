"""Which bonds make an atom stable, by published tables.

`EDM_VALENCES` allows sums of bond orders by element, for neutral atoms (Hoogeboom et al.,
"Equivariant Diffusion for Molecule Generation in 3D", ICML 2022). `JODO_VALENCES` allows them by
element and formal charge (Huang et al., "Learning Joint 2D & 3D Diffusion Models for Complete
Molecule Generation", 2023). `GEOM_VALENCES` counts aromatic bonds apart (Nikitin et al.,
"GEOM-Drugs Revisited: Toward More Chemically Accurate Benchmarks for 3D Molecule Generation",
2025). The fourth model, `strict`, has no table: RDKit decides
(`molgen_energy.chemistry.rdkit.sanitize`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import AROMATIC, Molecules
from molgen_energy.elements import atomic_number

EDM_VALENCES: dict[str, tuple[int, ...]] = {
    "H": (1,), "B": (3,), "C": (4,), "N": (3,), "O": (2,), "F": (1,), "Al": (3,), "Si": (4,),
    "P": (3, 5), "S": (4,), "Cl": (1,), "As": (3,), "Br": (1,), "I": (1,), "Hg": (1, 2),
    "Bi": (3, 5),
}  # fmt: skip
"""Sums of bond orders of a stable atom, whatever its charge."""

JODO_VALENCES: dict[str, tuple[int, ...] | dict[int, tuple[int, ...]]] = {
    "H": {0: (1,), 1: (0,), -1: (0,)},
    "B": (3,),
    "C": {0: (3, 4), 1: (3,), -1: (3,)},
    "N": {0: (2, 3), 1: (2, 3, 4), -1: (2,)},
    "O": {0: (2,), 1: (3,), -1: (1,)},
    "F": {0: (1,), -1: (0,)},
    "Al": (3,),
    "Si": (4,),
    "P": {0: (3, 5), 1: (4,)},
    "S": {0: (2, 6), 1: (2, 3), 2: (4,), 3: (5,), -1: (3,)},
    "Cl": (1,),
    "As": (3,),
    "Se": (2, 4, 6),
    "Br": {0: (1,), 1: (2,)},
    "I": (1,),
    "Hg": (1, 2),
    "Bi": (3, 5),
}
"""Sums of bond orders of a stable atom, for any charge or for each; a charge that is not there
counts as 0. As published, carbon may have three bonds and nitrogen two."""

GEOM_VALENCES: dict[str, dict[int, tuple[tuple[int, int], ...]]] = {
    "H": {0: ((0, 1),)},
    "B": {0: ((0, 3),), -1: ((0, 4),)},
    "C": {0: ((0, 4), (2, 2), (2, 1), (3, 0)), -1: ((0, 3), (2, 1), (3, 0)),
          1: ((0, 3), (2, 1), (3, 0))},
    "N": {0: ((0, 3), (2, 0), (2, 1), (3, 0)), 1: ((0, 4), (2, 0), (2, 1), (2, 2), (3, 0)),
          -1: ((0, 2), (2, 0)), -2: ((0, 1),)},
    "O": {0: ((0, 2), (2, 0)), -1: ((0, 1),), 1: ((0, 3),)},
    "F": {0: ((0, 1),)},
    "Si": {0: ((0, 4),), 1: ((0, 5),)},
    "P": {0: ((0, 3), (0, 5)), 1: ((0, 4),)},
    "S": {0: ((0, 2), (0, 3), (0, 6), (2, 0)), 1: ((0, 3), (2, 0), (2, 1), (3, 0)),
          2: ((0, 4), (2, 1), (2, 2)), 3: ((0, 2), (0, 5)), -1: ((0, 1),)},
    "Cl": {0: ((0, 1),), 1: ((0, 2),)},
    "Br": {0: ((0, 1),), 1: ((0, 2),)},
    "I": {0: ((0, 1),), 1: ((0, 2),), 2: ((0, 3),)},
    "Bi": {0: ((0, 3),), 2: ((0, 5),)},
}  # fmt: skip
"""Number of aromatic bonds, and sum of the orders of the other bonds, of a stable atom of each
formal charge. Collected from the molecules of GEOM-Drugs, so it has some unusual entries."""

VALENCE_MODELS = ("strict", "geom", "jodo", "edm")
"""`strict`: RDKit sanitises the molecule with the bonds and charges as written, and the atom needs
neither implicit hydrogens nor radical electrons. The others are tables: `GEOM_VALENCES`,
`JODO_VALENCES`, `EDM_VALENCES`."""

_ELEMENTS = 119  # rows of a table by atomic number, which begins at 0
_HIGHEST_SUM = 64
_HIGHEST_CHARGE = 8
_CHARGES = 2 * _HIGHEST_CHARGE + 1
_MOST_AROMATIC = 4  # bonds at one atom; those beyond count as 4, which no table allows


@cache
def _table(model: str) -> NDArray[np.bool_]:
    """(5, 17, 119, 65): by number of aromatic bonds, formal charge + 8, element, sum of the others.

    Only `geom` counts aromatic bonds apart; in the other tables the sum contains them.
    """
    allowed = np.zeros((_MOST_AROMATIC + 1, _CHARGES, _ELEMENTS, _HIGHEST_SUM + 1), bool)
    if model == "geom":
        for symbol, by_charge in GEOM_VALENCES.items():
            for charge, pairs in by_charge.items():
                for aromatic, others in pairs:
                    index = charge + _HIGHEST_CHARGE
                    allowed[aromatic, index, atomic_number(symbol), others] = True
        return allowed
    table: Mapping[str, tuple[int, ...] | dict[int, tuple[int, ...]]] = (
        JODO_VALENCES if model == "jodo" else EDM_VALENCES
    )
    for symbol, sums in table.items():
        z = atomic_number(symbol)
        charges = {0: sums} if isinstance(sums, tuple) else sums
        allowed[:, :, z, list(charges[0])] = True
        for charge, of_charge in charges.items():
            allowed[:, charge + _HIGHEST_CHARGE, z] = False
            allowed[:, charge + _HIGHEST_CHARGE, z, list(of_charge)] = True
    return allowed


def valences(molecules: Molecules) -> NDArray[np.int64]:
    """Sum of the bond orders of each atom, (ΣN,); an aromatic bond counts as 1.

    Kekulise first what holds aromatic bonds: 1.5 each has no place in an integer.
    """
    sums: NDArray[np.int64] = aromatic_valences(molecules).sum(axis=0)
    return sums


def aromatic_valences(molecules: Molecules) -> NDArray[np.int64]:
    """Number of aromatic bonds, and sum of the orders of the other bonds, of each atom (2, ΣN)."""
    count = len(molecules.atomic_numbers)
    found = np.zeros((2, count), np.int64)
    if molecules.bonds is not None:
        aromatic = molecules.bonds.order == AROMATIC
        order = np.where(aromatic, 0, molecules.bonds.order)
        for atoms in molecules.atoms_of_bonds().T:
            found[0] += np.bincount(atoms, aromatic, count).astype(np.int64)
            found[1] += np.bincount(atoms, order, count).astype(np.int64)
    return found


def stable_atoms(molecules: Molecules, model: str = "edm") -> NDArray[np.bool_]:
    """Which atoms have bonds that a table allows, (ΣN,).

    Parameters
    ----------
    molecules
        With bonds: aromatic where RDKit finds aromaticity for `geom`, Kekulised for the others,
        where an aromatic bond that stays counts as 1. Without charges these are 0.
    model
        `geom`, `jodo` or `edm` of `VALENCE_MODELS`.
    """
    aromatic, others = aromatic_valences(molecules)
    if model != "geom":
        others = others + aromatic
    charges = np.zeros(len(others), np.int64)
    if molecules.formal_charges is not None and model != "edm":
        charges = molecules.formal_charges.astype(np.int64)
    beyond = np.abs(charges) > _HIGHEST_CHARGE
    charges = np.where(beyond, _HIGHEST_CHARGE, charges)  # of which no table has an entry
    stable: NDArray[np.bool_] = _table(model)[
        np.minimum(aromatic, _MOST_AROMATIC),
        charges + _HIGHEST_CHARGE,
        molecules.atomic_numbers,
        np.minimum(others, _HIGHEST_SUM),
    ]
    return stable


def has_valence(atomic_numbers: NDArray[np.uint8], model: str = "edm") -> NDArray[np.bool_]:
    """Which atoms are of an element that a valence model knows; `strict` knows all. Same shape."""
    if model == "strict":
        return np.ones(atomic_numbers.shape, bool)
    known: NDArray[np.bool_] = np.any(_table(model), axis=(0, 1, 3))
    return known[atomic_numbers]
