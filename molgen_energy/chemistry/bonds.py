"""Bonds perceived from distances (EDM's protocol).

Typical bond lengths are public chemistry tables, with the selection and the margins of Hoogeboom
et al., "Equivariant Diffusion for Molecule Generation in 3D", ICML 2022. A pair has a bond of order
k when its distance is below the length of order k plus the margin of order k; the highest order
that fits counts, and a pair without a single-bond length has no bond.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import (
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

_ELEMENTS = 119
_PAIRS_AT_ONCE = 1_000_000
_LARGE = 1000  # atoms; beyond, only near pairs are looked at


@cache
def _longest() -> NDArray[np.float32]:
    """(3, 119, 119) in pm: a bond of order k + 1 is shorter than this; 0 where there is none."""
    longest = np.zeros((3, _ELEMENTS, _ELEMENTS), np.float32)
    for order, (table, margin) in enumerate(zip((SINGLE, DOUBLE, TRIPLE), MARGINS, strict=True)):
        for first, row in table.items():
            for second, length in row.items():
                i, j = atomic_number(first), atomic_number(second)
                longest[order, i, j] = longest[order, j, i] = length + margin
    return longest


def _orders(
    difference: NDArray[np.float32],
    first: NDArray[np.uint8],
    second: NDArray[np.uint8],
    shift: float = 0.0,
) -> NDArray[np.uint8]:
    """Bond orders (…) of pairs at a difference (…, 3) in Å, of two elements (…).

    `shift` (Å) is added to all distances.
    """
    longest = _longest()
    picometres = 100 * np.linalg.norm(difference, axis=-1)
    if shift:
        picometres = picometres + 100 * shift
    # Lengths fall with the order, so counting the thresholds that fit gives the highest order.
    orders = np.zeros(picometres.shape, np.uint8)
    for order in range(3):
        orders += picometres < longest[order, first, second]
    return orders


@np.errstate(over="ignore")  # what is beyond float32's squares is infinitely far
def perceive(molecules: Molecules) -> Molecules:
    """The molecules with bonds perceived from distances, in place of any bonds and charges.

    A bond runs from the lower to the higher atom number, and those of a molecule are in ascending
    order. Molecules are taken in batches, so that memory beyond the bonds themselves is bounded.
    """
    molecule_of_bonds, indices, orders = [], [], []
    atoms = Molecules(molecules.positions, molecules.atomic_numbers, molecules.offsets)
    small = molecules.sizes <= _LARGE
    (few,) = np.nonzero(small)
    for batch in batch_by_size(molecules.sizes[few], _PAIRS_AT_ONCE):
        which = few[batch]
        positions, numbers = atoms.select(which).padded()
        i, j = np.triu_indices(positions.shape[1], k=1)
        found = _orders(positions[:, i] - positions[:, j], numbers[:, i], numbers[:, j])
        molecule, pair = np.nonzero(found)
        molecule_of_bonds.append(which[molecule])
        indices.append(np.stack([i[pair], j[pair]], axis=1))
        orders.append(found[molecule, pair])
    for number in np.flatnonzero(~small):
        index, order = _near_bonds(atoms[int(number)])
        molecule_of_bonds.append(np.full(len(order), number))
        indices.append(index)
        orders.append(order)
    molecule = np.concatenate([np.zeros(0, np.int64), *molecule_of_bonds])
    index = np.concatenate([np.zeros((0, 2), np.int64), *indices])
    order = np.concatenate([np.zeros(0, np.uint8), *orders])
    ascending = np.argsort(molecule, kind="stable")
    bonds = Bonds(
        index[ascending].astype(np.uint32),
        order[ascending],
        offsets_from_sizes(np.bincount(molecule, minlength=len(molecules))),
    )
    return replace(molecules, bonds=bonds, formal_charges=None)


def _near_bonds(
    molecule: Molecule, tolerance: float = 0.0
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Bonds of one molecule: atoms (E, 2) and orders (E,); of a large one without all its pairs.

    Distances may be longer by `tolerance` (Å).
    """
    if len(molecule) <= _LARGE:
        pairs = np.stack(np.triu_indices(len(molecule), k=1), axis=1)
    else:
        from scipy.spatial import cKDTree

        reach = float(_longest().max()) / 100 * 1.001 + tolerance
        tree = cKDTree(molecule.positions)
        pairs = tree.query_pairs(reach, output_type="ndarray").astype(np.int64)
        pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    i, j = pairs.T
    numbers, positions = molecule.atomic_numbers, molecule.positions
    orders = _orders(positions[i] - positions[j], numbers[i], numbers[j], -tolerance)
    return pairs[orders > 0], orders[orders > 0]


@np.errstate(over="ignore")  # as in `perceive`
def are_perceived(molecule: Molecule, tolerance: float = 0.002) -> bool:
    """Whether a molecule's bonds are those that `perceive` finds.

    Parameters
    ----------
    tolerance
        Distances may differ by this much (Å), which the decimals of a file round away.
    """
    if molecule.bond_index is None or molecule.bond_order is None:
        return False
    given = {
        (min(i, j), max(i, j)): order
        for (i, j), order in zip(
            molecule.bond_index.tolist(), molecule.bond_order.tolist(), strict=True
        )
    }
    near, _ = _near_bonds(molecule, tolerance)
    pairs = np.array(sorted({*map(tuple, near.tolist()), *given}), np.int64).reshape(-1, 2)
    orders = np.array([given.get((i, j), 0) for i, j in pairs.tolist()], np.uint8)
    i, j = pairs.T
    positions, numbers = molecule.positions, molecule.atomic_numbers
    difference, elements = positions[i] - positions[j], (numbers[i], numbers[j])
    fewest, most = (_orders(difference, *elements, shift) for shift in (tolerance, -tolerance))
    return bool(((fewest <= orders) & (orders <= most)).all())
