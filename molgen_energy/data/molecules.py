"""Molecules as arrays. Every shape and unit of molecular data is stated here and only here.

M molecules, N_i atoms in molecule i, ΣN atoms and ΣE bonds in all. The first three are always
there, the others are optional. The name is that of the data set in an HDF5 file and of the array in
`Molecules.to_arrays`:

===================  ============  =======  ======================================================
positions            (ΣN, 3)       float32  Å
atomic_numbers       (ΣN,)         uint8    nuclear charge Z
offsets              (M+1,)        int64    atoms of molecule i are offsets[i]:offsets[i+1]
formal_charges       (ΣN,)         int8     e
bonds/index          (ΣE, 2)       uint32   atom numbers within their molecule
bonds/order          (ΣE,)         uint8    1, 2, 3, or 12 for aromatic
bonds/offsets        (M+1,)        int64    bonds of molecule i are offsets[i]:offsets[i+1]
smiles               (M,)          object   str, empty where it is missing
group                (M,)          int64    molecules of one group stay in one split
properties/<name>    (M,)          float64  in the unit beside the values, NaN where it is missing
===================  ============  =======  ======================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from molgen_energy.errors import InputError

if TYPE_CHECKING:  # its import would take longer than all others of a worker process
    from molgen_energy.formats.tensors import Shapes

AROMATIC = 12
"""The bond order that stands for an aromatic bond; 1.5 does not fit an integer."""

DTYPES: Mapping[str, str] = {
    "positions": "f4",
    "atomic_numbers": "u1",
    "offsets": "i8",
    "formal_charges": "i1",
    "bonds/index": "u4",
    "bonds/order": "u1",
    "bonds/offsets": "i8",
    "smiles": "O",
    "group": "i8",
}
"""Of each array; that of `properties/<name>` is float64."""

PROPERTIES = "properties/"
"""Names of the arrays of properties begin with this."""

SHAPES: Shapes = {
    "positions": ("float32", ("atoms", 3)),
    "atomic_numbers": ("uint8", ("atoms",)),
    "offsets": ("int64", ("ends",)),
    "formal_charges?": ("int8", ("atoms",)),
    "bonds/index?": ("uint32", ("bonds", 2)),
    "bonds/order?": ("uint8", ("bonds",)),
    "bonds/offsets?": ("int64", ("ends",)),
}
"""Of the arrays of a shard of molecules, besides those of properties."""

_ORDERS = (1, 2, 3, AROMATIC)
_LAST_ELEMENT = 118
_T = TypeVar("_T")


@dataclass(frozen=True)
class Property:
    """A number for each molecule: values (M,), NaN where it is missing, and their unit."""

    values: NDArray[np.float64]
    unit: str


@dataclass(frozen=True)
class Molecule:
    """One molecule: positions (N, 3) in Å, atomic numbers (N,); see the module for the rest.

    ``properties`` are numbers by name; ``units`` are theirs, where they are known.
    """

    positions: NDArray[np.float32]
    atomic_numbers: NDArray[np.uint8]
    formal_charges: NDArray[np.int8] | None = None
    bond_index: NDArray[np.integer[Any]] | None = None
    bond_order: NDArray[np.uint8] | None = None
    smiles: str | None = None
    properties: Mapping[str, float] = field(default_factory=dict)
    group: int | None = None
    units: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.atomic_numbers)


@dataclass(frozen=True)
class Bonds:
    """Bonds of many molecules, concatenated; see the module for shapes."""

    index: NDArray[np.integer[Any]]
    order: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    @classmethod
    def concatenate(cls, parts: Sequence[Bonds]) -> Bonds:
        """The bonds of all the molecules of all parts, one after another."""
        return cls(
            np.concatenate([np.zeros((0, 2), np.uint32), *(part.index for part in parts)]),
            np.concatenate([np.zeros(0, np.uint8), *(part.order for part in parts)]),
            _concatenate_offsets([part.offsets for part in parts]),
        )


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
    groups: NDArray[np.int64] | None = None

    @classmethod
    def from_list(cls, molecules: Sequence[Molecule]) -> Molecules:
        """Concatenate single molecules.

        Formal charges, bonds and groups are kept where every molecule has them. A SMILES that only
        some molecules lack is empty there, and a property is NaN.

        Raises
        ------
        ValueError
            A property has two units.
        """
        bonds = None
        indices = _of_all([m.bond_index for m in molecules])
        orders = _of_all([m.bond_order for m in molecules])
        if indices is not None and orders is not None:
            offsets = offsets_from_sizes([len(order) for order in orders])
            bonds = Bonds(np.concatenate(indices), np.concatenate(orders), offsets)
        charges = _of_all([m.formal_charges for m in molecules])
        groups = _of_all([m.group for m in molecules])
        smiles = None
        if any(m.smiles is not None for m in molecules):
            smiles = _texts(m.smiles or "" for m in molecules)
        units = merge_units(m.units for m in molecules)
        names = dict.fromkeys(name for m in molecules for name in m.properties)
        return cls(
            np.concatenate([np.zeros((0, 3), np.float32), *(m.positions for m in molecules)]),
            np.concatenate([np.zeros(0, np.uint8), *(m.atomic_numbers for m in molecules)]),
            offsets_from_sizes([len(m) for m in molecules]),
            None if charges is None else np.concatenate(charges),
            bonds,
            smiles,
            {
                name: Property(
                    np.array([m.properties.get(name, np.nan) for m in molecules], np.float64),
                    units.get(name, ""),
                )
                for name in names
            },
            None if groups is None else np.array(groups, np.int64),
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Molecules]) -> Molecules:
        """The molecules of all parts, one after another, with all their columns.

        A property that only some parts have is NaN in the others, a SMILES is empty. Parts without
        any molecule do not count.

        Raises
        ------
        ValueError
            Only some parts have formal charges, bonds or groups, or a property has two units.
        """
        parts = [part for part in parts if len(part)] or list(parts[:1])
        charges = _of_all_or_none("formal charges", [part.formal_charges for part in parts])
        bonds = _of_all_or_none("bonds", [part.bonds for part in parts])
        groups = _of_all_or_none("groups", [part.groups for part in parts])
        smiles = None
        if any(part.smiles is not None for part in parts):
            empty = (p.smiles if p.smiles is not None else _texts([""] * len(p)) for p in parts)
            smiles = np.concatenate(list(empty))
        units = merge_units(part.units for part in parts)
        return cls(
            np.concatenate([np.zeros((0, 3), np.float32), *(part.positions for part in parts)]),
            np.concatenate([np.zeros(0, np.uint8), *(part.atomic_numbers for part in parts)]),
            _concatenate_offsets([part.offsets for part in parts]),
            None if charges is None else np.concatenate(charges),
            None if bonds is None else Bonds.concatenate(bonds),
            smiles,
            {
                name: Property(
                    np.concatenate(
                        [
                            part.properties[name].values
                            if name in part.properties
                            else np.full(len(part), np.nan)
                            for part in parts
                        ]
                    ),
                    unit,
                )
                for name, unit in units.items()
            },
            None if groups is None else np.concatenate(groups),
        )

    def check(self) -> None:
        """Check what shapes do not tell, of arrays from a file.

        Raises
        ------
        InputError
            Offsets do not ascend from 0 to the number of atoms or bonds, a bond joins atoms of two
            molecules, or there is no such element or bond order.
        """
        _check_offsets("offsets", self.offsets, len(self.atomic_numbers))
        if not np.all((self.atomic_numbers >= 1) & (self.atomic_numbers <= _LAST_ELEMENT)):
            raise InputError("array 'atomic_numbers': expected 1 to 118")
        if self.bonds is None:
            return
        _check_offsets("bonds/offsets", self.bonds.offsets, len(self.bonds.order))
        atoms = np.repeat(np.diff(self.offsets), np.diff(self.bonds.offsets))
        if np.any(self.bonds.index >= atoms[:, None]):
            raise InputError("array 'bonds/index': expected atoms of the molecule")
        if not np.isin(self.bonds.order, _ORDERS).all():
            raise InputError(f"array 'bonds/order': expected {', '.join(map(str, _ORDERS))}")

    def to_arrays(self, encode_text: bool = False) -> dict[str, NDArray[Any]]:
        """All columns by the names of the module's table; units are in `units`.

        Parameters
        ----------
        encode_text
            Give numeric arrays only, as safetensors needs them: in place of ``smiles`` its UTF-8
            bytes one after another, ``smiles/bytes`` (uint8), and ``smiles/offsets`` (M+1,).
        """
        arrays: dict[str, NDArray[Any]] = {
            "positions": self.positions,
            "atomic_numbers": self.atomic_numbers,
            "offsets": self.offsets,
        }
        if self.formal_charges is not None:
            arrays["formal_charges"] = self.formal_charges
        if self.bonds is not None:
            arrays["bonds/index"] = self.bonds.index
            arrays["bonds/order"] = self.bonds.order
            arrays["bonds/offsets"] = self.bonds.offsets
        if self.smiles is not None and encode_text:
            texts = [text.encode() for text in self.smiles]
            arrays["smiles/bytes"] = np.frombuffer(b"".join(texts), np.uint8)
            arrays["smiles/offsets"] = offsets_from_sizes([len(text) for text in texts])
        elif self.smiles is not None:
            arrays["smiles"] = self.smiles
        if self.groups is not None:
            arrays["group"] = self.groups
        for name, column in self.properties.items():
            arrays[f"{PROPERTIES}{name}"] = column.values
        return {
            name: np.ascontiguousarray(array, DTYPES.get(name)) for name, array in arrays.items()
        }

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[Any]], units: Mapping[str, str] | None = None
    ) -> Molecules:
        """The molecules of `to_arrays`, with text encoded or not.

        Parameters
        ----------
        arrays
            By the names of the module's table; others are left out.
        units
            Of properties, by name without `properties/`; by default none.
        """
        bonds = smiles = None
        if "bonds/index" in arrays:
            bonds = Bonds(arrays["bonds/index"], arrays["bonds/order"], arrays["bonds/offsets"])
        if "smiles/bytes" in arrays:
            text, ends = arrays["smiles/bytes"].tobytes(), arrays["smiles/offsets"].tolist()
            smiles = _texts(text[a:b].decode() for a, b in pairwise(ends))
        elif "smiles" in arrays:
            smiles = arrays["smiles"]
        names = (name for name in arrays if name.startswith(PROPERTIES))
        return cls(
            arrays["positions"],
            arrays["atomic_numbers"],
            arrays["offsets"],
            arrays.get("formal_charges"),
            bonds,
            smiles,
            {
                (short := name.removeprefix(PROPERTIES)): Property(
                    arrays[name], (units or {}).get(short, "")
                )
                for name in names
            },
            arrays.get("group"),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Number of atoms of each molecule, (M,)."""
        return np.diff(self.offsets)

    @cached_property
    def units(self) -> Mapping[str, str]:
        """Of the properties, by name."""
        return {name: column.unit for name, column in self.properties.items()}

    def __getitem__(self, i: int) -> Molecule:
        atoms = slice(self.offsets[i], self.offsets[i + 1])
        index = order = None
        if self.bonds is not None:
            rows = slice(self.bonds.offsets[i], self.bonds.offsets[i + 1])
            index, order = self.bonds.index[rows], self.bonds.order[rows]
        return Molecule(
            self.positions[atoms],
            self.atomic_numbers[atoms],
            None if self.formal_charges is None else self.formal_charges[atoms],
            index,
            order,
            None if self.smiles is None else self.smiles[i],
            {name: float(column.values[i]) for name, column in self.properties.items()},
            None if self.groups is None else int(self.groups[i]),
            self.units,
        )

    def __iter__(self) -> Iterator[Molecule]:
        return (self[i] for i in range(len(self)))

    @property
    def molecule_index(self) -> NDArray[np.int64]:
        """The number of the molecule of each atom, (ΣN,); PyTorch Geometric's batch vector."""
        return np.repeat(np.arange(len(self)), self.sizes)

    @property
    def molecule_index_of_bonds(self) -> NDArray[np.int64]:
        """The number of the molecule of each bond, (ΣE,); none where no bonds."""
        counts = 0 if self.bonds is None else np.diff(self.bonds.offsets)
        return np.repeat(np.arange(len(self)), counts)

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
            rows, bond_offsets = gather_ragged(self.bonds.offsets, which)
            bonds = Bonds(self.bonds.index[rows], self.bonds.order[rows], bond_offsets)
        return Molecules(
            self.positions[atoms],
            self.atomic_numbers[atoms],
            offsets,
            None if self.formal_charges is None else self.formal_charges[atoms],
            bonds,
            None if self.smiles is None else self.smiles[which],
            {k: Property(p.values[which], p.unit) for k, p in self.properties.items()},
            None if self.groups is None else self.groups[which],
        )

    def keep_atoms(self, atoms: NDArray[np.bool_]) -> Molecules:
        """The molecules with some of their atoms (ΣN,), and the bonds among these.

        Other columns stay.
        """
        number = np.cumsum(atoms) - 1
        owner = self.molecule_index
        offsets = offsets_from_sizes(np.bincount(owner[atoms], minlength=len(self)))
        bonds = None
        if self.bonds is not None:
            ends = self.atoms_of_bonds()
            rows = atoms[ends].all(axis=1)
            owner = owner[ends[rows, 0]]
            bonds = Bonds(
                (number[ends[rows]] - offsets[owner][:, None]).astype(np.uint32),
                self.bonds.order[rows],
                offsets_from_sizes(np.bincount(owner, minlength=len(self))),
            )
        charges = self.formal_charges
        return replace(
            self,
            positions=self.positions[atoms],
            atomic_numbers=self.atomic_numbers[atoms],
            offsets=offsets,
            formal_charges=None if charges is None else charges[atoms],
            bonds=bonds,
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

    @property
    def independent(self) -> NDArray[np.int64]:
        """Equal numbers for molecules that are not independent, (M,): groups, or else records."""
        return self.records if self.molecules.groups is None else self.molecules.groups

    def parts(self, size: int) -> Iterator[MoleculeChunk]:
        """The molecules in chunks of at most `size`."""
        for start in range(0, len(self), size):
            yield self.select(np.arange(start, min(start + size, len(self))))

    def select(self, which: NDArray[np.int64]) -> MoleculeChunk:
        """The molecules of these numbers within the chunk."""
        return MoleculeChunk(self.records[which], self.molecules.select(which))


def batch_by_size(sizes: NDArray[np.int64], pairs: int) -> Iterator[NDArray[np.int64]]:
    """Every molecule once, by ascending size, in batches of at most so many pairs of atoms.

    A batch counts as padded to its largest molecule, and holds one molecule at least.
    """
    order = np.argsort(sizes, kind="stable")
    while len(order):
        padded = np.arange(1, len(order) + 1) * sizes[order] ** 2
        count = max(1, int(np.searchsorted(padded, pairs, side="right")))
        yield order[:count]
        order = order[count:]


def batch_with_least_work(
    sizes: NDArray[np.int64], pairs: int, overhead: int
) -> Iterator[NDArray[np.int64]]:
    """As `batch_by_size`, with the least work of all batches, by dynamic programming.

    The work of a batch is its pairs, padded to its largest molecule, and `overhead` pairs more,
    the cost of the calls that it takes. So batches of one size need not be full.
    """
    order = np.argsort(sizes, kind="stable")
    squares = sizes[order] ** 2
    least, begins = np.zeros(len(order) + 1), np.zeros(len(order), np.int64)
    for end, square in enumerate(squares, start=1):
        first = max(0, end - max(1, pairs // max(1, int(square))))
        work = least[first:end] + np.arange(end - first, 0, -1) * square
        best = int(work.argmin())
        least[end], begins[end - 1] = work[best] + overhead, first + best
    ends = [len(order)]
    while ends[-1]:
        ends.append(int(begins[ends[-1] - 1]))
    for end, begin in reversed(list(pairwise(ends))):
        yield order[begin:end]


def _check_offsets(name: str, offsets: NDArray[np.int64], end: int) -> None:
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != end or np.any(np.diff(offsets) < 0):
        raise InputError(f"array '{name}': expected numbers that ascend from 0 to {end:,}")


def offsets_from_sizes(sizes: Sequence[int] | NDArray[np.integer]) -> NDArray[np.int64]:
    """Cumulative sum of the sizes, which begins with zero: (M,) → (M+1,)."""
    return np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))]).astype(np.int64)


def gather_ragged(
    offsets: NDArray[np.int64], which: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row numbers of the chosen segments, one after another, and the offsets among them."""
    sizes = np.diff(offsets)[which]
    chosen = offsets_from_sizes(sizes)
    rows = np.arange(chosen[-1]) + np.repeat(offsets[:-1][which] - chosen[:-1], sizes)
    return rows, chosen


def merge_units(units: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """The units of all properties; `ValueError` where a property has two."""
    merged: dict[str, str] = {}
    previous = None
    for part in units:
        if part is previous:  # molecules of one file share theirs
            continue
        previous = part
        for name, unit in part.items():
            if merged.setdefault(name, unit) != unit:
                raise ValueError(f"property {name} has two units, '{merged[name]}' and '{unit}'")
    return merged


def _concatenate_offsets(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return offsets_from_sizes(np.concatenate([np.zeros(0, np.int64), *map(np.diff, parts)]))


def _of_all(values: Sequence[_T | None]) -> list[_T] | None:
    """The values, if there are any and none is missing."""
    present = [value for value in values if value is not None]
    return present if present and len(present) == len(values) else None


def _of_all_or_none(what: str, values: Sequence[_T | None]) -> list[_T] | None:
    found = _of_all(values)
    if found is None and any(value is not None for value in values):
        raise ValueError(f"only some of the molecules have {what}")
    return found


def _texts(values: Iterable[str]) -> NDArray[np.object_]:
    texts = list(values)
    array = np.empty(len(texts), object)
    array[:] = texts
    return array
