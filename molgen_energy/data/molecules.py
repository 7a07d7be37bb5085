"""Molecules as arrays. Every shape and unit of molecular data is stated here and only here.

M molecules, N_i atoms in molecule i, ΣN atoms and ΣE bonds in all:

=================  ============  =======  ====================================================
positions          (ΣN, 3)       float32  Å
atomic_numbers     (ΣN,)         uint8    nuclear charge Z
offsets            (M+1,)        int64    atoms of molecule i are offsets[i]:offsets[i+1]
formal_charges     (ΣN,)         int8     e, optional
bonds.index        (ΣE, 2)       uint16   atom numbers within their molecule, optional
bonds.order        (ΣE,)         uint8    1, 2, 3, or 12 for aromatic
bonds.offsets      (M+1,)        int64    bonds of molecule i are offsets[i]:offsets[i+1]
properties[name]   (M,)          float64  in the unit that stands beside the values
=================  ============  =======  ====================================================
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

AROMATIC = 12
"""The bond order that stands for an aromatic bond; 1.5 does not fit an integer."""


@dataclass(frozen=True)
class Property:
    """A number for each molecule: values (M,) and their unit."""

    values: NDArray[np.float64]
    unit: str


@dataclass(frozen=True)
class Molecule:
    """One molecule: positions (N, 3) in Å, atomic numbers (N,); see the module for the rest."""

    positions: NDArray[np.float32]
    atomic_numbers: NDArray[np.uint8]
    formal_charges: NDArray[np.int8] | None = None
    bond_index: NDArray[np.uint16] | None = None
    bond_order: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.atomic_numbers)


@dataclass(frozen=True)
class Bonds:
    """Bonds of many molecules, concatenated; see the module for shapes."""

    index: NDArray[np.uint16]
    order: NDArray[np.uint8]
    offsets: NDArray[np.int64]


@dataclass(frozen=True)
class Molecules:
    """Many molecules, concatenated without padding; see the module for shapes and units."""

    positions: NDArray[np.float32]
    atomic_numbers: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    formal_charges: NDArray[np.int8] | None = None
    bonds: Bonds | None = None
    smiles: NDArray[np.object_] | None = None
    properties: Mapping[str, Property] = field(default_factory=dict)

    @classmethod
    def from_list(cls, molecules: Sequence[Molecule]) -> Molecules:
        """Concatenate. Charges and bonds are kept where every molecule has them."""
        charges = [m.formal_charges for m in molecules if m.formal_charges is not None]
        indices = [m.bond_index for m in molecules if m.bond_index is not None]
        orders = [m.bond_order for m in molecules if m.bond_order is not None]
        bonds = None
        if molecules and len(indices) == len(orders) == len(molecules):
            sizes = offsets_from_sizes([len(order) for order in orders])
            bonds = Bonds(np.concatenate(indices), np.concatenate(orders), sizes)
        empty = not molecules
        return cls(
            np.zeros((0, 3), "f4") if empty else np.concatenate([m.positions for m in molecules]),
            np.zeros(0, "u1") if empty else np.concatenate([m.atomic_numbers for m in molecules]),
            offsets_from_sizes([len(m) for m in molecules]),
            np.concatenate(charges) if charges and len(charges) == len(molecules) else None,
            bonds,
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Number of atoms of each molecule, (M,)."""
        return np.diff(self.offsets)

    def __getitem__(self, i: int) -> Molecule:
        atoms = slice(self.offsets[i], self.offsets[i + 1])
        index = order = None
        if self.bonds is not None:
            edges = slice(self.bonds.offsets[i], self.bonds.offsets[i + 1])
            index, order = self.bonds.index[edges], self.bonds.order[edges]
        charges = None if self.formal_charges is None else self.formal_charges[atoms]
        return Molecule(self.positions[atoms], self.atomic_numbers[atoms], charges, index, order)

    def __iter__(self) -> Iterator[Molecule]:
        return (self[i] for i in range(len(self)))

    @property
    def owners(self) -> NDArray[np.int64]:
        """The number of the molecule of each atom, (ΣN,)."""
        return np.repeat(np.arange(len(self)), self.sizes)

    def finite(self) -> NDArray[np.bool_]:
        """Which molecules have finite coordinates, (M,)."""
        if not len(self):
            return np.zeros(0, bool)
        finite = np.isfinite(self.positions).all(axis=1)
        return np.logical_and.reduceat(finite, self.offsets[:-1])

    def atoms_of_bonds(self) -> NDArray[np.int64]:
        """Both atoms of each bond by their number among all atoms, (ΣE, 2); none where no bonds."""
        if self.bonds is None:
            return np.zeros((0, 2), np.int64)
        first = np.repeat(self.offsets[:-1], np.diff(self.bonds.offsets))
        return first[:, None] + self.bonds.index.astype(np.int64)

    def select(self, which: NDArray[np.int64]) -> Molecules:
        """The molecules with the given numbers, in the given order."""
        atoms, offsets = gather_ragged(self.offsets, which)
        bonds = None
        if self.bonds is not None:
            edges, edge_offsets = gather_ragged(self.bonds.offsets, which)
            bonds = Bonds(self.bonds.index[edges], self.bonds.order[edges], edge_offsets)
        return Molecules(
            self.positions[atoms],
            self.atomic_numbers[atoms],
            offsets,
            None if self.formal_charges is None else self.formal_charges[atoms],
            bonds,
            None if self.smiles is None else self.smiles[which],
            {k: Property(p.values[which], p.unit) for k, p in self.properties.items()},
        )

    def padded(self) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Positions (M, N, 3) and atomic numbers (M, N), N the largest size; padding is zero."""
        inside = np.arange(self.sizes.max(initial=0))[None] < self.sizes[:, None]
        positions = np.zeros((*inside.shape, 3), np.float32)
        atomic_numbers = np.zeros(inside.shape, np.uint8)
        positions[inside] = self.positions
        atomic_numbers[inside] = self.atomic_numbers
        return positions, atomic_numbers


@dataclass(frozen=True)
class MoleculeChunk:
    """Some molecules of a file with the numbers of their records, from 1."""

    records: NDArray[np.int64]
    molecules: Molecules

    def __len__(self) -> int:
        return len(self.records)

    def parts(self, size: int) -> Iterator[MoleculeChunk]:
        """The molecules in pieces of at most `size`."""
        for start in range(0, len(self), size):
            yield self.select(np.arange(start, min(start + size, len(self))))

    def select(self, which: NDArray[np.int64]) -> MoleculeChunk:
        """The molecules of these numbers within the piece."""
        return MoleculeChunk(self.records[which], self.molecules.select(which))


def batch_by_size(sizes: NDArray[np.int64], pairs: int) -> Iterator[NDArray[np.int64]]:
    """Every molecule once, by ascending size, in pieces of at most so many pairs of atoms.

    A piece counts as padded to its largest molecule, and holds one molecule at least.
    """
    order = np.argsort(sizes, kind="stable")
    while len(order):
        padded = np.arange(1, len(order) + 1) * sizes[order] ** 2
        count = max(1, int(np.searchsorted(padded, pairs, side="right")))
        yield order[:count]
        order = order[count:]


def offsets_from_sizes(sizes: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
    """Cumulated sizes with a zero in front: (M,) → (M+1,)."""
    return np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))]).astype(np.int64)


def gather_ragged(
    offsets: NDArray[np.int64], which: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers of the chosen segments, one after another, and the offsets among them."""
    sizes = np.diff(offsets)[which]
    chosen = offsets_from_sizes(sizes)
    rows = np.arange(chosen[-1]) + np.repeat(offsets[:-1][which] - chosen[:-1], sizes)
    return rows, chosen
