"""HDF5 files of molecules: schema 1, ragged, versioned.

Data sets are the arrays of `molgen_energy.data.molecules` under the same names, with the attribute
`unit` at each of `properties/<name>`, and `split` (M,) uint8: 0 train, 1 valid, 2 test. File
attributes: `schema`, `system`, `source`, `created_by`, `units`, `provenance` (JSON). A file is
written under a temporary name and renamed, and never changed after that.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import h5py
import numpy as np
from numpy.typing import NDArray

from molgen_energy import __version__
from molgen_energy.data.molecules import (
    AROMATIC,
    PROPERTIES,
    Bonds,
    MoleculeChunk,
    Molecules,
    gather_ragged,
    offsets_from_sizes,
)
from molgen_energy.data.splits import SPLITS
from molgen_energy.elements import ELEMENTS
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.formats.declaration import (
    FILE_ATTRIBUTES,
    SCHEMA,
    SPLIT,
    AttributeSpec,
    DatasetSpec,
    HDF5Format,
    Relation,
    Size,
    check_relation,
    check_values,
    wrong_rows,
)
from molgen_energy.formats.hdf5 import open_hdf5
from molgen_energy.formats.limits import check_memory
from molgen_energy.output import atomic_replace, check_writable

_CHUNK_ROWS = 65536
_MARGIN = 1 << 20  # bytes for the library's own tables
_SLICE = 1 << 20  # most atoms of one slice: 12 MB of positions
_GAP = 1 << 11  # atoms that are read over rather than skipped; a call costs about as much
_OPTIONAL = {"formal_charges", "smiles", "group"}
_TABLE = 100  # bytes of a table for each bond
_LARGE = 1 << 28  # bytes to read at once that are compared with the available memory
_ALL_OR_NONE = {"formal_charges": "formal charges", "bonds/index": "bonds", "group": "groups"}
"""Columns that all molecules of a file have, or none, since no value says that it is missing."""


def _not_ascending(offsets: NDArray[np.int64], total: int, least: int) -> NDArray[np.bool_]:
    """Which records do not begin where the one before ends, (M,), or are of less than `least`."""
    wrong = np.diff(offsets) < least
    wrong[0] |= offsets[0] != 0
    wrong[-1] |= offsets[-1] != total
    return wrong


def _any_of_records(rows: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which records have a row that is true, (M,)."""
    if not rows.any():
        return np.zeros(len(offsets) - 1, bool)
    before = np.concatenate([[0], np.cumsum(rows)])
    return np.diff(before[offsets]) > 0


def _unfit_bonds(
    index: NDArray[np.integer[Any]], offsets: NDArray[np.int64], bonds: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which molecules have a bond of one atom, of an atom that they lack, or the same twice, (M,).

    Equal bonds are found in a table of all pairs of atoms, or by sorting where it would be large.
    """
    sizes, counts = np.diff(offsets), np.diff(bonds)
    size = np.repeat(sizes, counts)
    one, other = index[:, 0].astype(np.int64), index[:, 1].astype(np.int64)
    low, high = np.minimum(one, other), np.maximum(one, other)
    unfit: NDArray[np.bool_] = (low == high) | (low < 0) | (high >= size)
    first = offsets_from_sizes(sizes**2)
    pair = np.repeat(first[:-1], counts) + low * size + high
    fit = pair[~unfit] if unfit.any() else pair
    if first[-1] <= _TABLE * len(pair):
        seen = np.zeros(first[-1], bool)
        seen[fit] = True
        if np.count_nonzero(seen) == len(fit):
            return _any_of_records(unfit, bonds)
    pair[unfit] = -1 - np.arange(np.count_nonzero(unfit))  # none is that of another
    order = np.argsort(pair, kind="stable")
    unfit[order[1:]] |= pair[order[1:]] == pair[order[:-1]]
    return _any_of_records(unfit, bonds)


MOLECULES = HDF5Format(
    "molecules",
    "Molecules",
    "Molecules of any size one after another, with their split. `preprocess` writes it, and "
    "`sample` where the output is HDF5; `train` and `evaluate` read it.",
    sizes={
        "M": Size("molecules"),
        "N_total": Size("atoms of all molecules"),
        "B": Size("bonds of all molecules", low=0),
    },
    records="molecules",
    attributes=(
        *FILE_ATTRIBUTES,
        AttributeSpec("units", "text", "units of positions and charges", required=False),
    ),
    datasets=(
        DatasetSpec(
            "split", ("M",), "integer", "0 training, 1 validation, 2 test", low=0, high=2,
            dtype="u1",
        ),
        DatasetSpec(
            "offsets", ("M+1",), "integer",
            "atoms of molecule i are offsets[i] to offsets[i+1] - 1", low=0,
        ),
        DatasetSpec(
            "atomic_numbers", ("N_total",), "integer", "nuclear charges", low=1,
            high=ELEMENTS, dtype="u1",
        ),
        DatasetSpec("positions", ("N_total", 3), "float", "coordinates", unit="Å", dtype="f4"),
        DatasetSpec(
            "formal_charges", ("N_total",), "integer", "formal charges", unit="e",
            required=False, dtype="i1",
        ),
        DatasetSpec(
            "bonds/offsets", ("M+1",), "integer",
            "bonds of molecule i are offsets[i] to offsets[i+1] - 1", required=False,
            required_with="bonds", low=0,
        ),
        DatasetSpec(
            "bonds/index", ("B", 2), "integer", "numbers of two atoms within their molecule, from "
            "0", required=False, required_with="bonds", low=0, dtype="u4",
        ),
        DatasetSpec(
            "bonds/order", ("B",), "integer", "single, double, triple, or 12 for aromatic",
            required=False, required_with="bonds", choices=(1, 2, 3, AROMATIC), dtype="u1",
        ),
        DatasetSpec(
            "smiles", ("M",), "text", "SMILES, empty where it is missing", required=False,
            fill=True,
        ),
        DatasetSpec(
            "group", ("M",), "integer", "molecules of one group stay in one split",
            required=False,
        ),
        DatasetSpec(
            f"{PROPERTIES}*", ("M",), "float", "a property, NaN where it is missing",
            required=False, finite=False, fill=True,
            attributes=(AttributeSpec("unit", "text", "unit of the values", required=False),),
        ),
    ),
    relations=(
        Relation(
            "offsets that ascend from 0 to the number of atoms",
            ("offsets", "N_total"),
            lambda offsets, atoms: _not_ascending(offsets, atoms, 1),
            at_opening=True,
        ),
        Relation(
            "offsets that ascend from 0 to the number of bonds",
            ("bonds/offsets", "B"),
            lambda offsets, bonds: _not_ascending(offsets, bonds, 0),
            at_opening=True,
        ),
        Relation(
            "bonds of two atoms of their molecule, none twice",
            ("bonds/index", "offsets", "bonds/offsets"),
            _unfit_bonds,
        ),
    ),
)  # fmt: skip
"""The declaration of files of molecules."""

_SAMPLES = HDF5Format(
    None, "Samples", "Files of every physical system.", datasets=(SPLIT,), records="samples"
)


def _chunk_rows(rows: int) -> int:
    """A chunk holds a whole small data set and at most 64k rows of a large one."""
    return min(_CHUNK_ROWS, max(1024, rows))


def _missing(name: str, count: int) -> NDArray[Any]:
    """The missing values of a column."""
    return np.full(count, "", object) if name == "smiles" else np.full(count, np.nan)


def _allocation(values: NDArray[Any]) -> int:
    """Bytes that appending these values can take, with a partly filled chunk."""
    row = values.nbytes // max(1, len(values))
    texts = sum(map(len, values)) + 32 * len(values) if values.dtype == object else 0
    return values.nbytes + texts + _CHUNK_ROWS * row


class DeferredErrorFile(io.FileIO):
    """A file for the HDF5 library, which ends the process where a write fails.

    `reserve` allocates space before the library writes, so that it raises where a disk is full. An
    error of a write itself is hidden from the library; `check` raises it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self._fault: OSError | None = None
        self._end = 0

    def reserve(self, size: int) -> None:
        """Allocate `size` bytes after what is written, where the system supports it."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.fileno(), self._end, size)

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        self._end = max(self._end, self.tell() + len(rest))
        try:
            while len(rest) and self._fault is None:
                rest = rest[super().write(rest) :]
        except OSError as fault:
            self._fault = fault
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as fault:
            self._fault = self._fault or fault
            return size or 0

    def check(self) -> None:
        """Raise the first error of a write, if there was one."""
        if self._fault is not None:
            raise self._fault


def check_hdf5_name(output: Path) -> None:
    """Raise `InputError` unless an HDF5 file can be written to a path."""
    check_writable(output)
    if output.suffix.lower() not in (".h5", ".hdf5"):
        raise InputError(f"{output}: the name of an HDF5 file must end in .h5 or .hdf5")


def system_of(path: Path) -> str:
    """Which physical system an HDF5 file is of.

    Raises
    ------
    InputError
        It is missing, no HDF5, or not written by this package.
    """
    with open_hdf5(path, _SAMPLES) as file:
        return file.system


def split_counts(path: Path) -> dict[str, int]:
    """Samples of each split of a file of any physical system.

    Raises
    ------
    InputError
        It is missing, no HDF5, not written by this package, or has no `split`.
    """
    with open_hdf5(path, _SAMPLES) as file:
        counts = np.bincount(file.read("split"), minlength=len(SPLITS)).tolist()
    return dict(zip(SPLITS, counts, strict=True))


class MoleculeWriter:
    """Write molecules chunk by chunk, in memory that does not grow with their number.

    Use as a context manager; the file appears under its name only when the block succeeds.

    >>> with MoleculeWriter(path, source="my molecules") as writer:
    ...     writer.append(molecules)
    ...     writer.set_split(split)
    """

    def __init__(
        self,
        path: Path,
        *,
        source: str,
        compress: bool = False,
        provenance: Mapping[str, str] | None = None,
    ) -> None:
        self._path = path
        self._source = source
        self._provenance = dict(provenance or {})
        self._compression = {"compression": "gzip", "shuffle": True} if compress else {}
        self._columns: set[str] = set()
        self._units: dict[str, str] = {}
        self._atoms = 0
        self._bonds = 0
        self.count = 0

    def __enter__(self) -> MoleculeWriter:
        self._stack = ExitStack()
        self.output = self._stack.enter_context(atomic_replace(self._path))
        self._raw = self._stack.enter_context(DeferredErrorFile(self.output.temporary))
        self._file = self._stack.enter_context(h5py.File(self._raw, "w"))
        self._file.attrs.update(
            schema=SCHEMA,
            system="molecules",
            source=self._source,
            created_by=f"molgen-energy {__version__}",
            units="positions: angstrom; charges: e",
        )
        if self._provenance:
            self._file.attrs["provenance"] = json.dumps(self._provenance)
        return self

    def append(self, molecules: Molecules) -> None:
        """Add molecules after those that are there.

        Where only some calls have a property, it is NaN for the molecules of the others; so is a
        SMILES empty.

        Raises
        ------
        InputError
            Only some calls have formal charges, bonds or groups, a property has two units, or its
            name cannot be that of a data set.
        OSError
            No space is left on the device (errno ENOSPC), or another fault of the disk.
        """
        if not len(molecules):
            return
        columns = molecules.to_arrays()
        self._check(columns, molecules.units)
        if self.count:  # the zero in front of offsets is there
            for name, rows in (("offsets", self._atoms), ("bonds/offsets", self._bonds)):
                if name in columns:
                    columns[name] = columns[name][1:] + rows
        for name in (self._columns - columns.keys()) & self._optional():
            columns[name] = _missing(name, len(molecules))
        self._file.flush()
        self._raw.reserve(sum(map(_allocation, columns.values())) + _MARGIN)
        for name, values in columns.items():
            self._extend(name, values)
        for name, unit in molecules.units.items():
            self._file[f"{PROPERTIES}{name}"].attrs["unit"] = unit
        self._columns |= columns.keys()
        self._units |= molecules.units
        self._atoms += len(molecules.atomic_numbers)
        self._bonds += len(columns.get("bonds/order", ()))
        self.count += len(molecules)
        self._raw.check()

    def _optional(self) -> set[str]:
        """Columns of the file that later molecules may lack."""
        return {name for name in self._columns if name == "smiles" or name.startswith(PROPERTIES)}

    def _check(self, columns: Mapping[str, NDArray[Any]], units: Mapping[str, str]) -> None:
        """Raise `InputError` where molecules cannot follow those that are there."""
        last = self.count + len(columns["offsets"]) - 1
        where = f"{self._path}: molecules {self.count + 1:,} to {last:,}"
        for name, what in _ALL_OR_NONE.items():
            if self.count and (name in columns) != (name in self._columns):
                here, there = ("have", "have none") if name in columns else ("have no", "have")
                raise InputError(
                    f"{where} {here} {what}, those before {there}; write molecules with {what} and "
                    "molecules without into two files"
                )
        for name, unit in units.items():
            if "/" in name or name in ("", ".", ".."):
                raise InputError(f"{where}: '{name}' cannot be the name of a property; rename it")
            if self._units.get(name, unit) != unit:
                raise InputError(
                    f"{where}: property {name} is in '{unit}', before in '{self._units[name]}'"
                )

    def _extend(self, name: str, values: NDArray[Any]) -> None:
        text = values.dtype == object
        if name not in self._file:
            # The molecules before lack this column.
            before = self.count if name == "smiles" or name.startswith(PROPERTIES) else 0
            data = self._file.create_dataset(
                name,
                shape=(before, *values.shape[1:]),
                dtype=h5py.string_dtype() if text else values.dtype,
                maxshape=(None, *values.shape[1:]),
                chunks=(_chunk_rows(before + len(values)), *values.shape[1:]),
                fillvalue=np.nan if name.startswith(PROPERTIES) else None,
                **self._compression,
            )
        data = self._file[name]
        data.resize(len(data) + len(values), axis=0)
        data[len(data) - len(values) :] = values

    def set_split(self, split: NDArray[np.uint8]) -> None:
        """Set which molecules are for training (0), validation (1) and test (2), shape (M,).

        Raises
        ------
        ValueError
            The shape is another.
        """
        if split.shape != (self.count,):
            raise ValueError(f"split has shape {split.shape}, expected ({self.count},)")
        self._file.create_dataset("split", data=split.astype(np.uint8), **self._compression)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._stack:
            if kind is None:
                if "split" not in self._file:
                    self.set_split(np.zeros(self.count, np.uint8))
                self._file.close()
                self._raw.check()
            else:
                # Hand the error on to the stack, so that the temporary file is removed.
                self._stack.__exit__(kind, error, traceback)


@dataclass(frozen=True)
class DatasetSummary:
    """Summary of a file, computed in one pass and in bounded memory."""

    first_atoms: dict[int, int]
    """By atomic number: the first atom of the file that has it, counted from 0."""
    size_histogram: dict[int, int]
    """Training molecules by number of atoms, ascending."""
    fingerprint: str
    """Hash of sizes, elements and positions of the training molecules, in their order."""

    @property
    def training_molecules(self) -> int:
        """How many there are."""
        return sum(self.size_histogram.values())

    @property
    def training_atoms(self) -> int:
        """How many atoms they have."""
        return sum(size * count for size, count in self.size_histogram.items())


class MoleculeFile:
    """A file of molecules, opened read-only and checked by its declaration, `MOLECULES`.

    Offsets and split are checked when it is opened, other values when they are read.

    Parameters
    ----------
    path
        Its name.
    bonds
        Whether bonds are needed, for the message where there is no file.

    Raises
    ------
    InputError
        The file is missing, no HDF5, cut off, of another schema or another physical system, holds
        no molecules, or is not as declared.
    """

    def __init__(self, path: Path, bonds: bool = False) -> None:
        option, own = (" --bonds", "SDF with bonds") if bonds else ("", "SDF or XYZ file")
        remedy = f"`molgen-energy preprocess qm9{option} -o {{path}}` or from your own {own}"
        if (
            path.suffix.lower() not in (".h5", ".hdf5")
            and path.is_file()
            and not h5py.is_hdf5(path)
        ):
            raise InputError(
                f"{path} is no HDF5 file; if it holds molecules, make one with "
                f"`molgen-energy preprocess {shlex.quote(str(path))}`"
            )
        self._file = open_hdf5(path, MOLECULES, remedy)
        self.path = path
        try:
            self._size = self._bytes()
            self.offsets: NDArray[np.int64] = self._file.read("offsets")
            self.split: NDArray[np.uint8] = self._file.read("split")
        except BaseException:
            self.close()
            raise
        present = {name for name in self._file.specs if name.startswith(PROPERTIES)}
        present |= _OPTIONAL & self._file.specs.keys()
        self._columns = frozenset(present | ({"bonds"} if "bonds/index" in self._file else set()))

    @property
    def source(self) -> str:
        """What the file was made from."""
        return str(self._file.attributes.get("source", self.path.name))

    @property
    def provenance(self) -> dict[str, str]:
        """Checkpoint, seed and configuration that sampled molecules come from."""
        return dict(self._file.attributes.get("provenance", {"source": self.source}))

    @property
    def columns(self) -> frozenset[str]:
        """The optional columns that there are, as `read` takes them.

        Of `formal_charges`, `bonds`, `smiles`, `group` and each `properties/<name>`.
        """
        return self._columns

    @property
    def property_units(self) -> dict[str, str]:
        """Units of the properties by name, empty where unknown."""
        return {
            name.removeprefix(PROPERTIES): str(self._file.attributes_of(name).get("unit", ""))
            for name in self._columns
            if name.startswith(PROPERTIES)
        }

    def __len__(self) -> int:
        return len(self.split)

    def split_indices(self, split: str | None) -> NDArray[np.int64]:
        """Numbers of the molecules of a split (`train`, `valid`, `test`), or of all, (M,).

        Raises
        ------
        InputError
            There is no such split.
        """
        if split is None:
            return np.arange(len(self), dtype=np.int64)
        if split not in SPLITS:
            raise InputError(unknown_name("split", split, SPLITS))
        return np.flatnonzero(self.split == SPLITS.index(split)).astype(np.int64)

    def load(self, split: str | None = None) -> Molecules:
        """All molecules of a split, or of the file, in memory with all their columns."""
        return self.read(self.split_indices(split), self.columns)

    def chunks(
        self, size: int, split: str | None = None, skip_bad: bool = False
    ) -> Iterator[MoleculeChunk]:
        """The molecules of a split in chunks of at most `size`, with all their columns.

        With `skip_bad`, molecules with values that are not allowed, such as coordinates that are
        not finite, are left out and counted in `skipped`.
        """
        members = self.split_indices(split)
        self.skipped = 0
        for start in range(0, len(self), size):
            chosen = members[slice(*np.searchsorted(members, [start, start + size]))]
            if not len(chosen):
                continue
            arrays = self._arrays(chosen, self.columns)
            wrong = _wrong(arrays)
            if wrong.any() and not skip_bad:
                self._refuse(arrays, chosen, int(wrong.argmax()))
            self.skipped += int(wrong.sum())
            molecules = self._molecules(arrays)
            if not wrong.any():
                yield MoleculeChunk(chosen + 1, molecules)
            elif not wrong.all():
                yield MoleculeChunk(chosen[~wrong] + 1, molecules.select(np.flatnonzero(~wrong)))

    def summarize(self) -> DatasetSummary:
        """Read the file once and check every molecule.

        Raises
        ------
        InputError
            A value is not allowed, which names the molecule; or the file breaks off.
        """
        first_atoms: dict[int, int] = {}
        histogram = np.zeros(0, np.int64)
        # One digest for each field, so that it does not matter where slices end.
        digests = [hashlib.sha256() for _ in range(3)]
        start = 0
        while start < len(self):
            end = np.searchsorted(self.offsets, self.offsets[start] + _SLICE, "right") - 1
            stop = max(start + 1, int(end))
            part = self.read(np.arange(start, stop))
            present = np.flatnonzero(np.bincount(part.atomic_numbers, minlength=256)).tolist()
            for element in set(present) - first_atoms.keys():
                atom = int((part.atomic_numbers == element).argmax())
                first_atoms[element] = int(self.offsets[start]) + atom
            train = part.select(np.flatnonzero(self.split[start:stop] == SPLITS.index("train")))
            counts = np.bincount(train.sizes, minlength=len(histogram))
            counts[: len(histogram)] += histogram
            histogram = counts
            for digest, array in zip(
                digests, (train.sizes, train.atomic_numbers, train.positions), strict=True
            ):
                digest.update(np.ascontiguousarray(array).tobytes())
            start = stop
        sizes = np.flatnonzero(histogram)
        whole = hashlib.sha256(b"".join(digest.digest() for digest in digests))
        return DatasetSummary(
            first_atoms,
            dict(zip(sizes.tolist(), histogram[sizes].tolist(), strict=True)),
            whole.hexdigest()[:16],
        )

    def sizes(self, which: NDArray[np.int64]) -> NDArray[np.int64]:
        """Number of atoms of the molecules of these numbers; nothing is read."""
        return self.offsets[which + 1] - self.offsets[which]

    def read(
        self,
        which: NDArray[np.int64],
        columns: Collection[str] = (),
        check_cancelled: Callable[[], None] = lambda: None,
    ) -> Molecules:
        """Positions, atomic numbers and some of the optional columns of some molecules.

        Molecules that are close together in the file are read by one slice of each data set, of at
        most a million atoms, so that memory is that of the result and a slice.

        Parameters
        ----------
        which
            Numbers of the molecules in the file, ascending.
        columns
            Some of `columns`; exactly these are read.
        check_cancelled
            Called before each slice; raises to stop.

        Raises
        ------
        InputError
            The file lacks a column; a value is not allowed, which names the molecule; the file
            breaks off; or the molecules are larger than the available memory.
        """
        arrays = self._arrays(which, columns, check_cancelled)
        wrong = _wrong(arrays)
        if wrong.any():
            self._refuse(arrays, which, int(wrong.argmax()))
        return self._molecules(arrays)

    def _arrays(
        self,
        which: NDArray[np.int64],
        columns: Collection[str],
        check_cancelled: Callable[[], None] = lambda: None,
    ) -> dict[str, NDArray[Any]]:
        """What `read` returns, by the names of data sets, as it is stored and not checked."""
        columns = sorted(columns)  # so that the order of properties is always the same
        for name in columns:
            if name not in self.columns:
                present = ", ".join(sorted(self.columns)) or "none"
                raise InputError(
                    f"{self.path} has no column '{name}' (optional columns: {present}); make it "
                    "from data that have it"
                )
        offsets = offsets_from_sizes(self.sizes(which))
        arrays: dict[str, NDArray[Any]] = {"offsets": offsets}
        per_atom = ["positions", "atomic_numbers"]
        per_atom += [name for name in columns if name == "formal_charges"]
        per_molecule = [name for name in columns if name not in ("formal_charges", "bonds")]
        size = int(offsets[-1]) * sum(self._row_bytes(name) for name in per_atom)
        if size > _LARGE:
            what = f"{self.path}: {len(which):,} molecules at once"
            check_memory(size, what, "use a machine with more memory, or a part of the file")
        for name in per_atom:
            shape = (offsets[-1], *self._file[name].shape[1:])
            arrays[name] = np.empty(shape, self._dtype(name))
        for name in per_molecule:
            arrays[name] = np.empty(len(which), self._dtype(name))
        bonds = []
        for start, stop in self._slices(which):
            check_cancelled()
            chosen = which[start:stop]
            first, last = int(chosen[0]), int(chosen[-1]) + 1
            with self._readable(first, last):
                for name in per_atom:
                    atoms = arrays[name][offsets[start] : offsets[stop]]
                    self._fill(atoms, name, self.offsets, chosen)
                for name in per_molecule:
                    data = self._file[name]
                    values = (data.asstr() if name == "smiles" else data)[first:last]
                    arrays[name][start:stop] = values[chosen - first]
                if "bonds" in columns:
                    bonds.append(self._bonds(first, last, chosen - first))
        if "bonds" in columns:
            joined = Bonds.concatenate(bonds)
            arrays |= {
                "bonds/index": joined.index,
                "bonds/order": joined.order,
                "bonds/offsets": joined.offsets,
            }
        return arrays

    def _molecules(self, arrays: Mapping[str, NDArray[Any]]) -> Molecules:
        """The molecules of arrays that were read."""
        units = self.property_units if any(name.startswith(PROPERTIES) for name in arrays) else None
        declared = {
            name: array.astype(MOLECULES.spec(name).read_dtype, copy=False)
            for name, array in arrays.items()
        }
        return Molecules.from_arrays(declared, units)

    def _dtype(self, name: str) -> np.dtype[Any]:
        """Type to read a data set as: the declared one if it holds all values of the stored one.

        Other integers are checked before they are converted.
        """
        declared = self._file.specs[name].read_dtype
        stored: np.dtype[Any] = self._file[name].dtype
        return stored if declared.kind in "iu" and not np.can_cast(stored, declared) else declared

    def _row_bytes(self, name: str) -> int:
        return int(np.prod(self._file[name].shape[1:], dtype=np.int64)) * self._dtype(name).itemsize

    def _slices(self, which: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """Begin and end of runs of ascending molecule numbers that are worth one slice each."""
        first, last = self.offsets[which], self.offsets[which + 1]
        far = np.flatnonzero(first[1:] - last[:-1] > _GAP) + 1
        ends = [*far.tolist(), len(which)]
        start = 0
        for end in ends:
            while start < end:
                stop = int(np.searchsorted(last[start:end], first[start] + _SLICE, "right"))
                stop = start + max(1, stop)
                yield start, stop
                start = stop

    def _fill(
        self,
        target: NDArray[Any],
        name: str,
        offsets: NDArray[np.int64],
        which: NDArray[np.int64],
    ) -> None:
        """Write the rows of some molecules (ascending) of a data set into an array."""
        first, last = which[0], which[-1] + 1
        rows = slice(offsets[first], offsets[last])
        if len(target) == rows.stop - rows.start:
            self._file[name].read_direct(target, rows)
        else:
            among = offsets[first : last + 1] - offsets[first]
            target[...] = self._file[name][rows][gather_ragged(among, which - first)[0]]

    def _bonds(self, start: int, stop: int, which: NDArray[np.int64]) -> Bonds:
        """Bonds of the molecules of these numbers among molecules `start` to `stop`."""
        file = self._file
        offsets = file.read("bonds/offsets")[start : stop + 1]
        rows = slice(offsets[0], offsets[-1])
        bonds = Bonds(file["bonds/index"][rows], file["bonds/order"][rows], offsets - offsets[0])
        if len(which) == stop - start:
            return bonds
        chosen, among = gather_ragged(bonds.offsets, which)
        return Bonds(bonds.index[chosen], bonds.order[chosen], among)

    @contextmanager
    def _readable(self, start: int, stop: int) -> Iterator[None]:
        """Name the molecules that cannot be read, which the HDF5 library does not."""
        where = f"{self.path}: molecules {start + 1} to {stop} cannot be read"
        fault = None
        try:
            yield
        except Exception as error:  # the library's, of any type
            fault = error
        if self._bytes() < self._size:  # the library reads zeros after the end
            raise InputError(f"{where}: the file was cut off meanwhile; make it again") from fault
        if fault is not None:
            reason = " ".join(str(fault).split())
            raise InputError(f"{where} ({reason}); the file is damaged, make it again") from fault

    def _bytes(self) -> int:
        """Present size of the opened file, whatever has its name meanwhile."""
        return os.fstat(self._file.descriptor).st_size

    def _refuse(
        self, arrays: Mapping[str, NDArray[Any]], which: NDArray[np.int64], k: int
    ) -> NoReturn:
        """Say what is wrong with molecule k of those that were read."""
        one = _select(arrays, k)
        record = int(which[k]) + 1
        for name, values in one.items():
            offsets = np.array([0, len(values)])
            check_values(self.path, MOLECULES.spec(name), values, record, offsets=offsets)
        for relation in MOLECULES.relations:
            if not relation.at_opening:
                check_relation(self.path, relation, one, record)
        raise AssertionError("nothing is wrong")

    def slice(self, start: int, stop: int) -> Molecules:
        """Molecules `start` to `stop`, read from the file with all their columns.

        Raises
        ------
        InputError
            A value is not allowed; names the molecule.
        """
        return self.read(np.arange(start, min(stop, len(self))), self.columns)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MoleculeFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _offsets_of(name: str) -> str | None:
    """The data set that says where the rows of each molecule begin; None where each is one."""
    if name in ("bonds/index", "bonds/order"):
        return "bonds/offsets"
    return "offsets" if name in ("positions", "atomic_numbers", "formal_charges") else None


def _wrong(arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Which molecules have values that their declaration does not allow, (M,)."""
    wrong = np.zeros(len(arrays["offsets"]) - 1, bool)
    for name, values in arrays.items():
        if name in ("offsets", "bonds/offsets"):
            continue
        rows = wrong_rows(MOLECULES.spec(name), values)
        if rows.any():
            offsets = _offsets_of(name)
            wrong |= rows if offsets is None else _any_of_records(rows, arrays[offsets])
    for relation in MOLECULES.relations:
        if not relation.at_opening and arrays.keys() >= {*relation.needs}:
            wrong |= relation.check(*(arrays[name] for name in relation.needs))
    return wrong


def _select(arrays: Mapping[str, NDArray[Any]], k: int) -> dict[str, NDArray[Any]]:
    """The arrays of one molecule."""
    one = {}
    for name, values in arrays.items():
        offsets = _offsets_of(name)
        if name in ("offsets", "bonds/offsets"):
            one[name] = values[k : k + 2] - values[k]
        elif offsets is None:
            one[name] = values[k : k + 1]
        else:
            one[name] = values[arrays[offsets][k] : arrays[offsets][k + 1]]
    return one
