"""Bonds from distances, and which sums of bond orders make an atom stable (EDM's protocol).

Typical bond lengths are public chemistry tables, with the selection and the margins of Hoogeboom
et al., "Equivariant Diffusion for Molecule Generation in 3D", ICML 2022. A pair has a bond of order
k when its distance is below the length of order k plus the margin of order k; the highest order
that fits counts, and a pair without a single-bond length has no bond.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import Molecules, by_size
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

_ELEMENTS = 119
_HIGHEST_SUM = 64
_PAIRS_AT_ONCE = 1_000_000


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


def bond_orders(
    positions: NDArray[np.float32], atomic_numbers: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Perceive bonds in many molecules at once.

    Parameters
    ----------
    positions
        (B, N, 3) in Å.
    atomic_numbers
        (B, N), zero at padding.

    Returns
    -------
    Bond orders (B, N, N): 0 (none), 1, 2 or 3; symmetric, zero on the diagonal.
    """
    longest = _tables().longest
    i, j = np.triu_indices(positions.shape[1], k=1)
    picometres = 100 * np.linalg.norm(positions[:, i] - positions[:, j], axis=-1)
    first, second = atomic_numbers[:, i], atomic_numbers[:, j]
    # Lengths fall with the order, so counting the thresholds that fit gives the highest order.
    pairs = np.zeros(picometres.shape, np.uint8)
    for order in range(3):
        pairs += picometres < longest[order, first, second]
    orders = np.zeros((*atomic_numbers.shape, atomic_numbers.shape[1]), np.uint8)
    orders[:, i, j] = orders[:, j, i] = pairs
    return orders


class Perceived(NamedTuple):
    """Molecules of about one size with their bonds, padded."""

    which: NDArray[np.int64]  # (B,), their numbers
    atomic_numbers: NDArray[np.uint8]  # (B, N), zero at padding
    orders: NDArray[np.uint8]  # (B, N, N)


def perceive(molecules: Molecules) -> Iterator[Perceived]:
    """Bonds of all molecules, by ascending size and in pieces, so that memory stays bounded."""
    for which in by_size(molecules.sizes, _PAIRS_AT_ONCE):
        positions, numbers = molecules.select(which).padded()
        yield Perceived(which, numbers, bond_orders(positions, numbers))


def stable_atoms(atomic_numbers: NDArray[np.uint8], orders: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which atoms have an allowed sum of bond orders.

    Parameters
    ----------
    atomic_numbers
        (B, N), zero at padding.
    orders
        Bond orders (B, N, N) of neutral atoms.

    Returns
    -------
    (B, N), false at padding.
    """
    sums = np.minimum(orders.sum(axis=-1, dtype=np.int64), _HIGHEST_SUM)
    stable: NDArray[np.bool_] = _tables().allowed[atomic_numbers, sums]
    return stable


def has_valence(atomic_numbers: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which atoms are of an element that the table of valences knows; same shape."""
    known: NDArray[np.bool_] = np.any(_tables().allowed, axis=1)[atomic_numbers]
    return known
