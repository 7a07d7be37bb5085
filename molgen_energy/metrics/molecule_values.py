"""Geometry and composition of single molecules, kept to draw subsets of real molecules."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import Molecules

_ELEMENTS = 119


@dataclass(frozen=True)
class TypeValues:
    """Lengths, angles or dihedrals of one type."""

    value: NDArray[np.float32]  # (V,)
    molecule: NDArray[np.int64]  # (V,), index of the molecule


@dataclass(frozen=True)
class MoleculeValues:
    """What the distances of M molecules are computed from."""

    key: NDArray[np.uint64]
    """Random numbers that choose molecules, (M,)."""
    independent: NDArray[np.uint64]
    """Equal for molecules that are not independent, such as conformers, (M,)."""
    sizes: NDArray[np.int64]
    """Numbers of atoms, (M,)."""
    elements: NDArray[np.int32]
    """Number of atoms of each element, (M, 119)."""
    geometry: dict[str, dict[int, TypeValues]]
    """By kind and code of the type."""
    descriptors: NDArray[np.float32]
    """`molgen_energy.chemistry.descriptors.DESCRIPTORS`, (M, D); NaN where there are none."""

    def __len__(self) -> int:
        return len(self.key)

    @classmethod
    def of(
        cls,
        molecules: Molecules,
        key: NDArray[np.uint64],
        independent: NDArray[np.uint64],
        geometry: dict[str, dict[int, TypeValues]],
        descriptors: NDArray[np.float32],
    ) -> MoleculeValues:
        """Values of molecules, with a random number and `independent` of each, (M,)."""
        count = len(molecules)
        place = molecules.molecule_index * _ELEMENTS + molecules.atomic_numbers
        elements = np.bincount(place, minlength=count * _ELEMENTS).reshape(count, _ELEMENTS)
        sizes = molecules.sizes.astype(np.int64)
        return cls(key, independent, sizes, elements.astype(np.int32), geometry, descriptors)

    @classmethod
    def join(cls, parts: list[MoleculeValues]) -> MoleculeValues:
        """The molecules of all parts, of which there is at least one."""
        start = np.cumsum([0, *map(len, parts)])
        found: dict[str, dict[int, list[TypeValues]]] = {}
        for first, part in zip(start.tolist(), parts, strict=False):
            for kind, by_type in part.geometry.items():
                for code, values in by_type.items():
                    moved = TypeValues(values.value, values.molecule + first)
                    found.setdefault(kind, {}).setdefault(code, []).append(moved)
        geometry = {
            kind: {
                code: TypeValues(
                    np.concatenate([v.value for v in each]),
                    np.concatenate([v.molecule for v in each]),
                )
                for code, each in by_type.items()
            }
            for kind, by_type in found.items()
        }
        return cls(
            np.concatenate([part.key for part in parts]),
            np.concatenate([part.independent for part in parts]),
            np.concatenate([part.sizes for part in parts]),
            np.concatenate([part.elements for part in parts]),
            geometry,
            np.concatenate([part.descriptors for part in parts]),
        )

    def smallest(self, count: int) -> MoleculeValues:
        """At most `count` molecules, those with the smallest random numbers."""
        chosen = np.argsort(self.key, kind="stable")[:count]
        place = np.full(len(self), -1)
        place[chosen] = np.arange(len(chosen))
        geometry: dict[str, dict[int, TypeValues]] = {}
        for kind, by_type in self.geometry.items():
            geometry[kind] = {}
            for code, values in by_type.items():
                molecule = place[values.molecule]
                kept = molecule >= 0
                geometry[kind][code] = TypeValues(values.value[kept], molecule[kept])
        return MoleculeValues(
            self.key[chosen],
            self.independent[chosen],
            self.sizes[chosen],
            self.elements[chosen],
            geometry,
            self.descriptors[chosen],
        )


class KeptMolecules:
    """The values of at most `limit` random molecules of a file."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[MoleculeValues] = []

    def add(self, part: MoleculeValues) -> None:
        """Add the molecules of a chunk."""
        self._parts.append(part)
        if sum(map(len, self._parts)) > 2 * self._limit:
            self._shrink()

    def _shrink(self) -> None:
        self._parts = [MoleculeValues.join(self._parts).smallest(self._limit)]

    @property
    def values(self) -> MoleculeValues | None:
        """The values of the kept molecules; None if there are none."""
        if not self._parts or not self._limit:
            return None
        self._shrink()
        return self._parts[0]
