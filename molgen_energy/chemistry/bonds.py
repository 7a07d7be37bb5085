"""Bonds from distances, and which sums of bond orders make an atom stable (EDM's protocol).

Typical bond lengths are public chemistry tables, with the selection and the margins of Hoogeboom
et al., "Equivariant Diffusion for Molecule Generation in 3D", ICML 2022. A pair has a bond of order
k when its distance is below the length of order k plus the margin of order k; the highest order
that fits counts, and a pair without a single-bond length has no bond.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import (
    AROMATIC,
    Bonds,
    Molecule,
    Molecules,
    batch_by_size,
    offsets_from_sizes,
)
from molgen_energy.elements import atomic_number

# Picometres. Each pair stands once, under either element.
SINGLE = {
    "H": {"H": 74, "B": 119, "C": 109, "N": 101, "O": 96, "F": 92, "Si": 148, "P": 144, "S": 134,
          "Cl": 127, "As": 152, "Br": 141, "I": 161},
    "C": {"C": 154, "N": 147, "O": 143, "F": 135, "Si": 185, "P": 184, "S": 182, "Cl": 177,
          "Br": 194, "I": 214},
    "N": {"N": 145, "O": 140, "F": 136, "P": 177, "S": 168, "Cl": 175, "Br": 214, "I": 222},
    "O": {"O": 148, "F": 142, "Si": 163, "P": 163, "S": 151, "Cl": 164, "Br": 172, "I": 194},
    "F": {"F": 142, "Si": 160, "P": 156, "S": 158, "Cl": 166, "Br": 178, "I": 187},
    "Si": {"Si": 233, "S": 200, "Cl": 202, "Br": 215, "I": 243},
    "P": {"P": 221, "S": 210, "Cl": 203, "Br": 222},
    "S": {"S": 204, "Cl": 207, "Br": 225, "I": 234},
    "Cl": {"B": 175, "Cl": 199, "Br": 214},
    "Br": {"Br": 228},
    "I": {"I": 266},
}  # fmt: skip
DOUBLE = {
    "C": {"C": 134, "N": 129, "O": 120, "S": 160},
    "N": {"N": 125, "O": 121},
    "O": {"O": 121, "P": 150},
    "P": {"S": 186},
}
TRIPLE = {"C": {"C": 120, "N": 116, "O": 113}, "N": {"N": 110}}
MARGINS = (10, 5, 3)

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

_ELEMENTS = 119
_HIGHEST_SUM = 64
_HIGHEST_CHARGE = 8
_PAIRS_AT_ONCE = 1_000_000
_LARGE = 1000  # atoms; beyond, only near pairs are looked at


class _Tables(NamedTuple):
    longest: NDArray[np.float32]  # (3, 119, 119) pm, a bond of order k is shorter; 0 where none
    allowed: NDArray[np.bool_]  # (119, 65), by element and sum of orders


@cache
def _tables() -> _Tables:
    longest = np.zeros((3, _ELEMENTS, _ELEMENTS), np.float32)
    for order, (table, margin) in enumerate(zip((SINGLE, DOUBLE, TRIPLE), MARGINS, strict=True)):
        for first, row in table.items():
            for second, length in row.items():
                i, j = atomic_number(first), atomic_number(second)
                longest[order, i, j] = longest[order, j, i] = length + margin
    allowed = np.zeros((_ELEMENTS, _HIGHEST_SUM + 1), bool)
    for symbol, sums in VALENCES.items():
        allowed[atomic_number(symbol), list(sums)] = True
    return _Tables(longest, allowed)


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


def _orders(
    difference: NDArray[np.float32], first: NDArray[np.uint8], second: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Bond orders (…) of pairs at a difference (…, 3) in Å, of two elements (…)."""
    longest = _tables().longest
    picometres = 100 * np.linalg.norm(difference, axis=-1)
    # Lengths fall with the order, so counting the thresholds that fit gives the highest order.
    orders = np.zeros(picometres.shape, np.uint8)
    for order in range(3):
        orders += picometres < longest[order, first, second]
    return orders


@np.errstate(over="ignore")  # what is beyond float32's squares is infinitely far
def perceive(molecules: Molecules) -> Molecules:
    """The molecules with bonds perceived from distances, in place of any bonds and charges.

    A bond runs from the lower to the higher atom number, and those of a molecule are in ascending
    order. Work goes in pieces, so that memory beyond the bonds themselves stays bounded.
    """
    owners, indices, orders = [], [], []
    small = molecules.sizes <= _LARGE
    (few,) = np.nonzero(small)
    for piece in batch_by_size(molecules.sizes[few], _PAIRS_AT_ONCE):
        which = few[piece]
        positions, numbers = molecules.select(which).padded()
        i, j = np.triu_indices(positions.shape[1], k=1)
        found = _orders(positions[:, i] - positions[:, j], numbers[:, i], numbers[:, j])
        molecule, pair = np.nonzero(found)
        owners.append(which[molecule])
        indices.append(np.stack([i[pair], j[pair]], axis=1))
        orders.append(found[molecule, pair])
    for number in np.flatnonzero(~small):
        index, order = _near_bonds(molecules[int(number)])
        owners.append(np.full(len(order), number))
        indices.append(index)
        orders.append(order)
    owner = np.concatenate(owners) if owners else np.zeros(0, np.int64)
    index = np.concatenate(indices) if indices else np.zeros((0, 2), np.int64)
    order = np.concatenate(orders) if orders else np.zeros(0, np.uint8)
    in_turn = np.argsort(owner, kind="stable")
    bonds = Bonds(
        index[in_turn].astype(np.uint16),
        order[in_turn],
        offsets_from_sizes(np.bincount(owner, minlength=len(molecules))),
    )
    return replace(molecules, bonds=bonds, formal_charges=None)


def _near_bonds(molecule: Molecule) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Bonds of one large molecule: atoms (E, 2) and orders (E,), without all of its pairs."""
    from scipy.spatial import cKDTree

    reach = float(_tables().longest.max()) / 100 * 1.001
    pairs = cKDTree(molecule.positions).query_pairs(reach, output_type="ndarray").astype(np.int64)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    i, j = pairs.T
    numbers, positions = molecule.atomic_numbers, molecule.positions
    orders = _orders(positions[i] - positions[j], numbers[i], numbers[j])
    return pairs[orders > 0], orders[orders > 0]


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
    stable: NDArray[np.bool_] = _tables().allowed[molecules.atomic_numbers, sums]
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
    known: NDArray[np.bool_] = np.any(_tables().allowed, axis=1)[atomic_numbers]
    return known
