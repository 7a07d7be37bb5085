"""What relaxation changes in molecules with given bonds: energy, positions, lengths of bonds."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.geometry import Measured, measure, rmsd, type_name
from molgen_energy.data.molecules import Molecules

_LENGTHS = "bond length"
_NAMED = 5  # types of bonds


def length_changes(before: Molecules, after: Molecules) -> Measured:
    """The change (Å) of the length of each bond of the same molecules in two geometries."""
    first, second = (measure(molecules, [_LENGTHS])[_LENGTHS] for molecules in (before, after))
    return first._replace(value=second.value - first.value)


def displacements(before: Molecules, after: Molecules) -> NDArray[np.float64]:
    """RMSD (Å) of all atoms of each molecule in two geometries after superposition, (M,)."""
    return np.array(
        [
            rmsd(a.positions.astype(np.float64), b.positions.astype(np.float64))
            for a, b in zip(before, after, strict=True)
        ],
        np.float64,
    )


class RelaxationChanges:
    """What relaxation changed, collected over the molecules of a data set."""

    def __init__(self) -> None:
        self._energies = [np.zeros(0)]
        self._displacements = [np.zeros(0)]
        self._bonds: Counter[int] = Counter()
        self._changes: Counter[int] = Counter()

    def add(self, before: Molecules, after: Molecules, energies: NDArray[np.float64]) -> None:
        """Take in molecules with their positions before and after, and the energies (M,) lost."""
        self._energies.append(energies)
        self._displacements.append(displacements(before, after))
        found = length_changes(before, after)
        codes, which = np.unique(found.code, return_inverse=True)
        sums = np.bincount(which, np.abs(found.value), len(codes))
        for code, count, total in zip(codes, np.bincount(which), sums, strict=True):
            self._bonds[int(code)] += int(count)
            self._changes[int(code)] += total

    def __len__(self) -> int:
        return sum(map(len, self._energies))

    def summary(self) -> str:
        """The medians of energy and RMSD, and the mean absolute change of lengths by type.

        The most frequent types of bonds are named as in `molgen_energy.chemistry.geometry`.
        """
        energy, distance = (
            float(np.median(np.concatenate(parts)))
            for parts in (self._energies, self._displacements)
        )
        text = f"median energy lost {energy:.3g} kcal/mol, median RMSD {distance:.2g} Å"
        if not self._bonds:
            return text
        mean = self._changes.total() / self._bonds.total()
        common = ", ".join(
            f"{type_name(_LENGTHS, code)} {self._changes[code] / count:.3f}"
            for code, count in self._bonds.most_common(_NAMED)
        )
        return f"{text}, bonds change by {mean:.3f} Å ({common})"
