"""The HDF5 store: schema 1, ragged, versioned.

Data sets are the arrays of `molgen_energy.data.molecules` under the same names, with bonds in
`bonds/index`, `bonds/order`, `bonds/offsets`, properties in `properties/<name>` (attribute `unit`),
and `split` (M,) uint8: 0 train, 1 valid, 2 test. File attributes: `schema`, `system`, `source`,
`created_by`, `units`. A file is written under a temporary name and renamed, and only ever read
after that.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from molgen_energy import __version__
from molgen_energy.data.molecules import (
    Bonds,
    MoleculeChunk,
    Molecules,
    Property,
    gather_ragged,
    offsets_from_sizes,
)
from molgen_energy.data.splits import SPLITS
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.output import atomic_replace, check_writable

SCHEMA = 1
_CHUNK_ROWS = 65536
_MARGIN = 1 << 20  # bytes for the library's own tables
_SLICE = 1 << 20  # most atoms of one slice: 12 MB of positions
_GAP = 1 << 11  # atoms that are read over rather than skipped; a call costs about as much


def _chunk_rows(values: NDArray[Any]) -> int:
    """A chunk holds a whole small data set and at most 64k rows of a large one."""
    return min(_CHUNK_ROWS, max(1024, len(values)))


def _room(values: NDArray[Any]) -> int:
    """Bytes that appending these values can take, a begun chunk included."""
    row = values.nbytes // max(1, len(values))
    texts = sum(map(len, values)) + 32 * len(values) if values.dtype == object else 0
    return values.nbytes + texts + _CHUNK_ROWS * row


class DeferredErrorFile(io.FileIO):
    """A file for the HDF5 library, which ends the process where a write fails.

    Space is reserved before the library writes, so that a full disk is noticed by `reserve`. What
    fails all the same is remembered and raised by `check`; the library is never told.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self._fault: OSError | None = None
        self._end = 0

    def reserve(self, size: int) -> None:
        """Make sure of `size` bytes behind what is written, where the system offers to."""
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
        """Raise what was remembered."""
        if self._fault is not None:
            raise self._fault


def check_hdf5_name(output: Path) -> None:
    """Raise `InputError` unless a path can be that of an HDF5 file to write."""
    if output.suffix.lower() not in (".h5", ".hdf5"):
        raise InputError(f"{output}: the name of an HDF5 file must end in .h5 or .hdf5")
    check_writable(output)


def system_of(path: Path) -> str:
    """Which physical system an HDF5 file is of.

    Raises
    ------
    InputError
        It is missing, no HDF5, or not written by this package.
    """
    with _opened(path, "`molgen-energy preprocess`") as file:
        return str(file.attrs.get("system", "molecules"))


def open_store(path: Path, system: str, remedy: str) -> h5py.File:
    """Open a file of a physical system for reading; `remedy` says how it is made.

    Raises
    ------
    InputError
        It is missing, no HDF5, cut off, of another schema or another physical system.
    """
    file = _opened(path, remedy.format(path=path))
    found = str(file.attrs.get("system", "molecules"))
    if found != system:
        file.close()
        raise InputError(
            f"{path} holds {found}, not {system}; name a file of {system}, or a --config or a "
            f"--checkpoint of {found}"
        )
    return file


def _opened(path: Path, remedy: str) -> h5py.File:
    if not path.is_file():
        raise InputError(f"{path} does not exist; make it with {remedy}")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        why = "is cut off" if "truncated" in str(error) else "is not a readable HDF5 file"
        raise InputError(f"{path} {why}; make one with `molgen-energy preprocess`") from error
    schema = file.attrs.get("schema")
    if np.ndim(schema) == 0 and schema == SCHEMA:
        return file
    file.close()
    if schema is None:
        raise InputError(f"{path} was not written by molgen-energy (no schema attribute)")
    newer = isinstance(schema, (int, np.integer)) and schema > SCHEMA
    remedy = "upgrade molgen-energy" if newer else "make it again"
    raise InputError(f"{path} has schema {schema}, this version reads schema {SCHEMA}; {remedy}")


def check_columns(file: h5py.File, path: Path, names: Iterable[str]) -> None:
    """Raise `InputError` where a data set is missing."""
    for name in names:
        if name not in file:
            raise InputError(f"{path} lacks the data set '{name}'; make it again")


class MoleculeWriter:
    """Write molecules piece by piece, in memory that does not grow with their number.

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
        """Add molecules behind those that are there; all calls must carry the same fields.

        Raises
        ------
        OSError
            No space is left on the device (errno ENOSPC), or another fault of the disk.
        """
        first = self.count == 0
        columns: dict[str, NDArray[Any]] = {
            "positions": molecules.positions,
            "atomic_numbers": molecules.atomic_numbers,
            "offsets": molecules.offsets[0 if first else 1 :] + self._atoms,
        }
        if molecules.formal_charges is not None:
            columns["formal_charges"] = molecules.formal_charges
        if (bonds := molecules.bonds) is not None:
            columns["bonds/index"] = bonds.index
            columns["bonds/order"] = bonds.order
            columns["bonds/offsets"] = bonds.offsets[0 if first else 1 :] + self._bonds
            self._bonds += len(bonds.order)
        if molecules.smiles is not None:
            columns["smiles"] = molecules.smiles
        columns |= {f"properties/{name}": p.values for name, p in molecules.properties.items()}
        self._file.flush()
        self._raw.reserve(sum(map(_room, columns.values())) + _MARGIN)
        for name, values in columns.items():
            self._extend(name, values)
        for name, data in molecules.properties.items():
            self._file[f"properties/{name}"].attrs["unit"] = data.unit
        self._atoms += len(molecules.atomic_numbers)
        self.count += len(molecules)
        self._raw.check()

    def _extend(self, name: str, values: NDArray[Any]) -> None:
        if name not in self._file:
            self._file.create_dataset(
                name,
                data=values,
                dtype=h5py.string_dtype() if values.dtype == object else values.dtype,
                maxshape=(None, *values.shape[1:]),
                chunks=(_chunk_rows(values), *values.shape[1:]),
                **self._compression,
            )
            return
        data = self._file[name]
        data.resize(len(data) + len(values), axis=0)
        data[len(data) - len(values) :] = values

    def set_split(self, split: NDArray[np.uint8]) -> None:
        """Say which molecules are for training (0), validation (1) and test (2), shape (M,)."""
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
    """What one pass over a file finds, in memory that does not grow with it."""

    first_atoms: dict[int, int]
    """By atomic number: the first atom of the file that has it, counted from 0."""
    size_histogram: dict[int, int]
    """Training molecules by number of atoms, ascending."""
    fingerprint: str
    """Of sizes, elements and positions of the training molecules, in their order."""

    @property
    def training_molecules(self) -> int:
        """How many there are."""
        return sum(self.size_histogram.values())


class MoleculeFile:
    """A schema 1 file, opened read-only and checked.

    Raises
    ------
    InputError
        The file is missing, no HDF5, cut off, of another schema or another physical system.
    """

    def __init__(self, path: Path) -> None:
        remedy = "`molgen-energy preprocess qm9 -o {path}` or from your own SDF or XYZ file"
        self._file = open_store(path, "molecules", remedy)
        self.path = path
        try:
            self._size = self._bytes()
            self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        check_columns(self._file, self.path, ("positions", "atomic_numbers", "offsets", "split"))
        self.offsets: NDArray[np.int64] = self._file["offsets"][:]
        self.split: NDArray[np.uint8] = self._file["split"][:]
        atoms = len(self._file["atomic_numbers"])
        consistent = (
            len(self.offsets) == len(self.split) + 1
            and self.offsets[0] == 0
            and self.offsets[-1] == atoms == len(self._file["positions"])
            and bool((self.offsets[1:] > self.offsets[:-1]).all())
        )
        if not consistent:
            raise InputError(f"{self.path}: the lengths of its data sets disagree; make it again")

    @property
    def source(self) -> str:
        """What the file was made from."""
        return str(self._file.attrs.get("source", self.path.name))

    @property
    def provenance(self) -> dict[str, str]:
        """Where sampled molecules come from: checkpoint, seed, configuration."""
        text = self._file.attrs.get("provenance")
        return {"source": self.source} if text is None else dict(json.loads(text))

    @property
    def has_bonds(self) -> bool:
        """Whether the molecules carry bonds."""
        return "bonds" in self._file

    def __len__(self) -> int:
        return len(self.split)

    def split_indices(self, split: str | None) -> NDArray[np.int64]:
        """Numbers of the molecules of a split (`train`, `valid`, `test`), or of all."""
        if split is None:
            return np.arange(len(self), dtype=np.int64)
        if split not in SPLITS:
            raise InputError(unknown_name("split", split, SPLITS))
        return np.flatnonzero(self.split == SPLITS.index(split)).astype(np.int64)

    def load(self, split: str | None = None) -> Molecules:
        """All molecules of a split, or of the file, in memory."""
        molecules = self.slice(0, len(self))
        return molecules if split is None else molecules.select(self.split_indices(split))

    def chunks(
        self, size: int, split: str | None = None, skip_bad: bool = False
    ) -> Iterator[MoleculeChunk]:
        """The molecules of a split in pieces of at most `size`, read one piece at a time.

        With `skip_bad`, molecules whose coordinates are not finite are left out and counted in
        `skipped`.
        """
        wanted = self.split_indices(split)
        self.skipped = 0
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            chosen = wanted[slice(*np.searchsorted(wanted, [start, stop]))]
            if not len(chosen):
                continue
            molecules = self._read(start, stop)
            usable = molecules.finite()[chosen - start]
            if not skip_bad and not usable.all():
                raise self._not_finite(int(chosen[~usable][0]))
            self.skipped += int((~usable).sum())
            chosen = chosen[usable]
            if len(chosen):
                yield MoleculeChunk(chosen + 1, molecules.select(chosen - start))

    def summarize(self) -> DatasetSummary:
        """Read the file once and check every molecule.

        Raises
        ------
        InputError
            A position is not a finite number, which names the molecule; or the file breaks off.
        """
        first_atoms: dict[int, int] = {}
        histogram = np.zeros(0, np.int64)
        # One digest for each field, so that it does not matter where the pieces are cut.
        digests = [hashlib.sha256() for _ in range(3)]
        start = 0
        while start < len(self):
            end = np.searchsorted(self.offsets, self.offsets[start] + _SLICE, "right") - 1
            stop = max(start + 1, int(end))
            piece = self.read(np.arange(start, stop))
            present = np.flatnonzero(np.bincount(piece.atomic_numbers, minlength=256)).tolist()
            for element in set(present) - first_atoms.keys():
                atom = int((piece.atomic_numbers == element).argmax())
                first_atoms[element] = int(self.offsets[start]) + atom
            train = piece.select(np.flatnonzero(self.split[start:stop] == SPLITS.index("train")))
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
        """Atoms of the molecules of these numbers; nothing is read."""
        return self.offsets[which + 1] - self.offsets[which]

    def read(
        self,
        which: NDArray[np.int64],
        bonds: bool = False,
        go_on: Callable[[], None] = lambda: None,
    ) -> Molecules:
        """Positions, atomic numbers and, where asked for and there, bonds of some molecules.

        Molecules that stand close together are read by one slice of each data set, of at most a
        million atoms, so that memory is that of the result and a slice.

        Parameters
        ----------
        which
            Numbers of the molecules in the file, ascending.
        bonds
            Whether bonds are asked for.
        go_on
            Called before each slice; may raise, so that no more is read.

        Raises
        ------
        InputError
            A position is not a finite number, which names the molecule; or the file breaks off.
        """
        offsets = offsets_from_sizes(self.sizes(which))
        positions = np.empty((offsets[-1], 3), np.float32)
        atomic_numbers = np.empty(offsets[-1], np.uint8)
        read_bonds = []
        for start, stop in self._slices(which):
            go_on()
            part, at = which[start:stop], slice(offsets[start], offsets[stop])
            first, last = int(part[0]), int(part[-1]) + 1
            with self._readable(first, last):
                self._fill(positions[at], "positions", self.offsets, part)
                self._fill(atomic_numbers[at], "atomic_numbers", self.offsets, part)
                if bonds and self.has_bonds:
                    read_bonds.append(self._bonds(first, last, part - first))
            if not np.isfinite(positions[at]).all():
                atom = offsets[start] + int(np.isfinite(positions[at]).all(axis=1).argmin())
                raise self._not_finite(int(which[np.searchsorted(offsets, atom, "right") - 1]))
        found = None
        if bonds and self.has_bonds:
            found = Bonds(
                np.concatenate([np.zeros((0, 2), np.uint16), *(b.index for b in read_bonds)]),
                np.concatenate([np.zeros(0, np.uint8), *(b.order for b in read_bonds)]),
                offsets_from_sizes(
                    np.concatenate(
                        [np.zeros(0, np.int64), *(np.diff(b.offsets) for b in read_bonds)]
                    )
                ),
            )
        return Molecules(positions, atomic_numbers, offsets, bonds=found)

    def _slices(self, which: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """Where to cut ascending molecule numbers so that each part is worth one slice."""
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

    def _bonds(self, start: int, stop: int, which: NDArray[np.int64] | None = None) -> Bonds:
        """Bonds of molecules `start` to `stop`, or of those of these numbers among them."""
        file = self._file
        offsets = file["bonds/offsets"][start : stop + 1].astype(np.int64)
        rows = slice(offsets[0], offsets[-1])
        index, order, offsets = (
            file["bonds/index"][rows],
            file["bonds/order"][rows],
            offsets - offsets[0],
        )
        if which is None or len(which) == stop - start:
            return Bonds(index, order, offsets)
        chosen, among = gather_ragged(offsets, which)
        return Bonds(index[chosen], order[chosen], among)

    @contextmanager
    def _readable(self, start: int, stop: int) -> Iterator[None]:
        """Say which molecules cannot be read, where the HDF5 library only says how, or nothing."""
        where = f"{self.path}: molecules {start + 1} to {stop} cannot be read"
        fault = None
        try:
            yield
        except (OSError, RuntimeError, KeyError, ValueError) as error:  # the library's, of any kind
            fault = error
        if self._bytes() < self._size:  # the library reads zeros behind the end
            raise InputError(f"{where}: the file was cut off meanwhile; make it again") from fault
        if fault is not None:
            reason = " ".join(str(fault).split())
            raise InputError(f"{where} ({reason}); the file is damaged, make it again") from fault

    def _bytes(self) -> int:
        """Present size of the opened file, whatever has its name meanwhile."""
        return os.fstat(self._file.id.get_vfd_handle()).st_size

    def _not_finite(self, number: int) -> InputError:
        return InputError(f"{self.path}: molecule {number + 1} has coordinates that are not finite")

    def slice(self, start: int, stop: int) -> Molecules:
        """Molecules `start` to `stop`, read from the file.

        Raises
        ------
        InputError
            A position is not a finite number; names the molecule.
        """
        molecules = self._read(start, stop)
        finite = molecules.finite()
        if not finite.all():
            raise self._not_finite(start + int(np.flatnonzero(~finite)[0]))
        return molecules

    def _read(self, start: int, stop: int) -> Molecules:
        with self._readable(start, stop):
            return self._everything(start, stop)

    def _everything(self, start: int, stop: int) -> Molecules:
        file = self._file
        offsets = self.offsets[start : stop + 1]
        atoms = slice(offsets[0], offsets[-1])
        bonds = self._bonds(start, stop) if self.has_bonds else None
        properties: Mapping[str, Property] = {
            name: Property(data[start:stop].astype(np.float64), str(data.attrs.get("unit", "")))
            for name, data in file.get("properties", {}).items()
        }
        return Molecules(
            file["positions"][atoms],
            file["atomic_numbers"][atoms],
            (offsets - offsets[0]).astype(np.int64),
            file["formal_charges"][atoms] if "formal_charges" in file else None,
            bonds,
            file["smiles"].asstr()[start:stop] if "smiles" in file else None,
            properties,
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MoleculeFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
