"""Read molecules of SDF and XYZ files, one file or a set of them."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from molgen_energy.chemistry.fields import BONDS, FIRST_RECORDS, FieldSelection
from molgen_energy.chemistry.molfiles import sdf, xyz
from molgen_energy.chemistry.molfiles.bond_scan import (
    GivenBonds,
    ScannedRecord,
    find_given_bonds,
    scan_sdf,
    scan_xyz,
)
from molgen_energy.chemistry.molfiles.files import SDF, kind_of, molecule_files
from molgen_energy.chemistry.molfiles.lines import DAMAGED, Lines, Record, TooLargeError
from molgen_energy.data.molecules import Molecule, MoleculeChunk, Molecules
from molgen_energy.errors import MEND_OR_SKIP, InputError

_MOST_NAMED = 5


class BadRecord(NamedTuple):
    """A record that was skipped: its number and line in its file, both from 1, and why."""

    number: int
    line: int
    reason: str
    path: Path

    def __str__(self) -> str:
        return f"{self.path.name}: record {self.number} (line {self.line}): {self.reason}"


class MoleculeReader:
    """Iterate over the molecules of an SDF or XYZ file, or of a set of files as one.

    Files may be packed (gzip, bzip2, xz); their content tells their kind, see `kind_of`.

    Parameters
    ----------
    path
        A file, a folder or a pattern, see `molecule_files`.
    skip_bad
        Go on after a bad record and remember it in `skipped`; else raise.
    selection
        Which data fields become properties, SMILES and groups. Bonds and charges of a record that
        says that they were perceived from distances, and were, are then left out. None reads atoms
        and bonds alone.

    Raises
    ------
    InputError
        A file is missing, empty or of another kind; a record is bad and `skip_bad` is false. A
        file of a set that cannot be read counts as one bad record.
    """

    def __init__(
        self,
        path: Path,
        skip_bad: bool = False,
        selection: FieldSelection | None = None,
    ) -> None:
        self.files, self._is_set, self._notes = molecule_files(path)
        self.path = path
        self.skip_bad = skip_bad
        self.selection = selection
        self.skipped: list[BadRecord] = []
        self.skipped_count = 0
        self.count = 0
        self.number = 0
        """Of the record that was read last, from 1; it runs on over the files of a set."""
        self.fields: dict[str, str] = {}
        """Data fields of the first record."""
        self.bonds_perceived = False
        """Whether the record that was read last says that its bonds were found from distances."""
        self._remarks: Counter[str] = Counter()
        self._first_numbers: list[int] = []
        """Number of the first record of each file of a set."""
        if not self._is_set:
            with closing(Lines(path)) as lines:
                kind_of(path, lines)

    @property
    def notes(self) -> list[str]:
        """What the user should know of the files, and of the records that were read so far."""
        remarks = [
            f"{text} ({count:,} record{'s' if count > 1 else ''})"
            for text, count in self._remarks.items()
        ]
        return self._notes + remarks

    def detect_fields(self, group: str | None = None) -> FieldSelection:
        """The fields that hold numbers in the first records of each file."""
        fields = (
            record.fields
            for path in self.files
            for _, record in islice(self._records(path), FIRST_RECORDS)
        )
        return FieldSelection.detect(fields, group)

    @cached_property
    def given_bonds(self) -> GivenBonds:
        """Which records have bonds that were not perceived from distances."""
        return find_given_bonds(record for path in self.files for record in self._scanned(path))

    def _scanned(self, path: Path) -> Iterator[ScannedRecord]:
        """The bonds of the records of a file; what cannot be read is left out."""
        try:
            with closing(Lines(path)) as lines:
                scan = scan_sdf if kind_of(path, lines) == SDF else scan_xyz
                yield from scan(lines)
        except (*DAMAGED, TooLargeError, InputError):  # reading the molecules says where and why
            return

    def locate(self, number: int) -> str:
        """Where a record is, by its number in the set, as far as the files were read."""
        if not self._is_set:
            return f"record {number}"
        k = bisect_right(self._first_numbers, number) - 1
        return f"{self.files[k].name}: record {number - self._first_numbers[k] + 1}"

    def __iter__(self) -> Iterator[Molecule]:
        self.count = self.skipped_count = self.number = 0
        self.skipped = []
        self._remarks = Counter()
        self._first_numbers = []
        for path in self.files:
            self._first_numbers.append(self.number + 1)
            for number, record in self._records(path):
                self.number += 1
                if self.number == 1:
                    self.fields = record.fields
                if record.note:
                    self._remarks[record.note] += 1
                self.bonds_perceived = record.fields.get(BONDS, "").startswith("perceived")
                molecule = self._usable(record)
                if isinstance(molecule, str):
                    self._skip(BadRecord(number, record.line, molecule, path))
                else:
                    self.count += 1
                    yield molecule
        if self.count == 0:
            bad = self.skipped_count
            what = f"no usable molecule ({bad} bad records)" if bad else "no molecule"
            raise InputError(f"{self.path} holds {what}")

    def _records(self, path: Path) -> Iterator[tuple[int, Record]]:
        """The records of a file with their numbers in it, from 1.

        A damaged or too large end is a bad record, and so is a file of a set that holds none.
        """
        number = 0
        try:
            lines = Lines(path)
        except InputError as error:
            if not (self._is_set and self.skip_bad):
                raise
            yield 1, Record(1, str(error), {})
            return
        with closing(lines):
            try:
                read = sdf.read_records if kind_of(path, lines) == SDF else xyz.read_records
                for record in read(lines):
                    number += 1
                    yield number, record
            except DAMAGED as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                yield number + 1, Record(lines.number + 1, f"the file is cut off ({error})", {})
                return
            except TooLargeError as error:
                yield number + 1, Record(lines.number + 1, str(error), {})
                return
            except InputError as error:
                if not (self._is_set and self.skip_bad):
                    raise
                yield 1, Record(1, str(error), {})
                return
        if self._is_set and not number:
            yield 1, Record(1, "the file is empty", {})

    def _skip(self, bad: BadRecord) -> None:
        """Remember a bad record, or raise."""
        self.skipped_count += 1
        if len(self.skipped) < _MOST_NAMED:
            self.skipped.append(bad)
        if not self.skip_bad:
            raise InputError(
                f"{bad.path}: record {bad.number} (line {bad.line}): {bad.reason}; {MEND_OR_SKIP}"
            )

    def _usable(self, record: Record) -> Molecule | str:
        """The molecule of a record with its columns, or what is wrong with it."""
        molecule = record.molecule
        if isinstance(molecule, str):
            return molecule
        if len(molecule) == 0:
            return "no atoms"
        if not np.isfinite(molecule.positions).all():
            atom = int(np.flatnonzero(~np.isfinite(molecule.positions).all(axis=1))[0]) + 1
            return f"the coordinates of atom {atom} are not finite"
        if self.selection is None:
            return molecule
        try:
            columns = self.selection.columns(record.fields)
        except ValueError as error:
            return str(error)
        if self.bonds_perceived and self.given_bonds.declared_perceived:
            columns |= {"bond_index": None, "bond_order": None, "formal_charges": None}
        return replace(molecule, **columns)

    def chunks(self, size: int) -> Iterator[MoleculeChunk]:
        """The molecules in chunks of at most `size`; all of a chunk have bonds, or none has."""
        molecules = ((self.number, molecule) for molecule in self)
        for _, alike in groupby(molecules, key=lambda pair: pair[1].bond_index is None):
            while part := list(islice(alike, size)):
                records, chunk = zip(*part, strict=True)
                yield MoleculeChunk(np.array(records, np.int64), Molecules.from_list(chunk))
