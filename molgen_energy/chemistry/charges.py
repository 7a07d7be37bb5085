"""Formal charges that fit the bonds of an atom, by the atoms of the training molecules.

An atom is described by its element, its formal charge, its number of aromatic bonds and the sum of
the orders of its other bonds. Aromatic bonds count apart: nitrogen with two aromatic bonds and a
single one is neutral in pyrrole and has a charge in pyridinium, both with a sum of 4, and nitrogen
with four single bonds always has a charge.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.valence import aromatic_valences
from molgen_energy.data.molecules import Molecules
from molgen_energy.elements import ELEMENTS

MOST_AROMATIC = 4
"""Aromatic bonds of an atom; more fit no charge."""
HIGHEST_SUM = 12
"""Sum of the orders of the other bonds of an atom; a higher one fits no charge."""
NONE_FITS = 127
"""In place of a charge."""

_CHARGES = 256  # of int8, from -128


class AtomKind(NamedTuple):
    """What charges depend on, of an atom."""

    element: int
    """Atomic number."""
    charge: int
    aromatic: int
    """Number of aromatic bonds."""
    others: int
    """Sum of the orders of its other bonds."""


def count_atoms(molecules: Molecules) -> Counter[AtomKind]:
    """How many atoms of each kind molecules have that hold bonds and formal charges.

    Atoms with more bonds than `MOST_AROMATIC` and `HIGHEST_SUM` do not count.
    """
    assert molecules.bonds is not None and molecules.formal_charges is not None
    aromatic, others = aromatic_valences(molecules)
    fits = (aromatic <= MOST_AROMATIC) & (others <= HIGHEST_SUM)
    shape = (ELEMENTS + 1, _CHARGES, MOST_AROMATIC + 1, HIGHEST_SUM + 1)
    charges = molecules.formal_charges.astype(np.int64) + _CHARGES // 2
    columns = (molecules.atomic_numbers.astype(np.int64), charges, aromatic, others)
    codes = np.ravel_multi_index([column[fits] for column in columns], shape)
    counts = np.bincount(codes)
    (found,) = np.nonzero(counts)
    rows = np.stack(np.unravel_index(found, shape), axis=1) - [0, _CHARGES // 2, 0, 0]
    return Counter(
        {AtomKind(*row): n for row, n in zip(rows.tolist(), counts[found].tolist(), strict=True)}
    )


def without_radicals(kinds: Iterable[AtomKind]) -> list[AtomKind]:
    """The kinds that RDKit accepts without implicit hydrogens and radical electrons.

    Of the aromatic bonds of an atom at most one is double in a Kekulé form.
    """
    from molgen_energy.chemistry.rdkit import is_closed_shell

    return [
        kind
        for kind in kinds
        if any(
            is_closed_shell(kind.element, kind.charge, kind.others + kind.aromatic + double)
            for double in range(1 + (kind.aromatic > 0))
        )
    ]


def nearest_charges(kinds: Counter[AtomKind], lowest: int, highest: int) -> NDArray[np.int8]:
    """The charge that fits an atom and is nearest to the one that it has.

    Of two charges that are equally near, it is the one nearer to 0, then the one that more atoms
    have, then the positive one.

    Parameters
    ----------
    kinds
        Of charges that fit, with their numbers of atoms.
    lowest, highest
        Charges that an atom may have before.

    Returns
    -------
    (119, highest − lowest + 1, 5, 13): by element, charge − lowest, number of aromatic bonds, and
    sum of the orders of the others; `NONE_FITS` where there is none.
    """
    table = np.full(
        (ELEMENTS + 1, highest - lowest + 1, MOST_AROMATIC + 1, HIGHEST_SUM + 1),
        NONE_FITS,
        np.int8,
    )
    for before in range(lowest, highest + 1):

        def preference(kind: AtomKind, before: int = before) -> tuple[int, int, int, int]:
            return (
                -abs(kind.charge - before), -abs(kind.charge), kinds[kind], kind.charge
            )  # fmt: skip

        for kind in sorted(kinds, key=preference):  # the last one stays
            table[kind.element, before - lowest, kind.aromatic, kind.others] = kind.charge
    return table
