"""Read molecules of SDF and XYZ files."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from molgen_energy.chemistry.fields import BONDS, FieldSelection
from molgen_energy.chemistry.molfiles import sdf, xyz
from molgen_energy.chemistry.molfiles.bond_scan import (
    NO_BONDS,
    GivenBonds,
    find_given_bonds,
    scan_sdf,
)
from molgen_energy.chemistry.molfiles.lines import Lines, Record
from molgen_energy.data.molecules import Molecule, MoleculeChunk, Molecules
from molgen_energy.elements import atomic_number, symbol
from molgen_energy.errors import InputError
from molgen_energy.output import check_file

_MOST_NAMED = 5
_GZIP_ERRORS = (EOFError, gzip.BadGzipFile, zlib.error)


class BadRecord(NamedTuple):
    """A record that was skipped: its number and line in the file, both from 1, and why."""

    number: int
    line: int
    reason: str


class MoleculeReader:
    """Iterate over the molecules of an SDF or multi-XYZ file (plain or gzip).

    Parameters
    ----------
    path
        Ends in .sdf, .mol, .xyz, or one of these and .gz.
    skip_bad
        Go on after a bad record and remember it in `skipped`; else raise.
    elements
        Symbols that may occur, a record with another is bad; None allows all.
    selection
        Which data fields become properties, SMILES and groups. Bonds and charges of a record that
        says that they were perceived from distances are then left out. None reads atoms and bonds
        alone.

    Raises
    ------
    InputError
        The file is missing, empty or of another kind; a record is bad and `skip_bad` is false.
    """

    def __init__(
        self,
        path: Path,
        skip_bad: bool = False,
        elements: list[str] | None = None,
        selection: FieldSelection | None = None,
    ) -> None:
        if path.is_dir():
            raise InputError(f"{path} is a folder; name an SDF or XYZ file")
        check_file(path)
        self.path = path
        self.skip_bad = skip_bad
        self._allowed = None if elements is None else {atomic_number(name) for name in elements}
        self.selection = selection
        self.skipped: list[BadRecord] = []
        self.skipped_count = 0
        self.count = 0
        self.number = 0
        """Of the record that was read last, from 1."""
        self.fields: dict[str, str] = {}
        """Data fields of the first record."""
        self.bonds_perceived = False
        """Whether the record that was read last says that its bonds were found from distances."""
        kind = path.name.lower().removesuffix(".gz").rsplit(".", 1)[-1]
        if kind not in ("sdf", "mol", "xyz"):
            raise InputError(f"{path} is no SDF or XYZ file (.sdf, .xyz, also .gz)")
        self._records = xyz.read_records if kind == "xyz" else sdf.read_records

    def detect_fields(self, group: str | None = None) -> FieldSelection:
        """The fields that hold numbers in the first records of the file, without reading more."""
        with closing(Lines(self.path)) as lines:
            try:
                fields = (record.fields for record in self._records(lines))
                return FieldSelection.detect(fields, group)
            except _GZIP_ERRORS:  # reading the molecules says where
                return FieldSelection(group=group)

    def given_bonds(self) -> GivenBonds:
        """Which records have bonds that were not perceived from distances."""
        if self._records is not sdf.read_records:
            return NO_BONDS
        with closing(Lines(self.path)) as lines:
            try:
                return find_given_bonds(scan_sdf(lines, sdf.parse_mol_block))
            except _GZIP_ERRORS:  # reading the molecules says where
                return NO_BONDS

    def __iter__(self) -> Iterator[Molecule]:
        self.count = self.skipped_count = self.number = 0
        self.skipped = []
        lines = Lines(self.path)
        try:
            for record in self._records(lines):
                self.number += 1
                if self.number == 1:
                    self.fields = record.fields
                self.bonds_perceived = record.fields.get(BONDS, "").startswith("perceived")
                molecule = self._usable(record)
                if isinstance(molecule, str):
                    self._skip(record.line, molecule)
                else:
                    self.count += 1
                    yield molecule
        except _GZIP_ERRORS as error:
            self.number += 1
            if not (self.skip_bad and self.count):
                raise InputError(
                    f"{self.path} is cut off or no gzip file, after record {self.number - 1} "
                    f"({error}); --skip-bad takes what can be read"
                ) from error
            self._skip(lines.number, f"the file is cut off ({error})")
        finally:
            lines.close()
        if self.count == 0:
            bad = self.skipped_count
            what = f"no usable molecule ({bad} bad records)" if bad else "no molecule"
            raise InputError(f"{self.path} holds {what}")

    def _skip(self, line: int, reason: str) -> None:
        """Remember the record that was read last as a bad one, or raise."""
        self.skipped_count += 1
        if len(self.skipped) < _MOST_NAMED:
            self.skipped.append(BadRecord(self.number, line, reason))
        if not self.skip_bad:
            raise InputError(
                f"{self.path}: record {self.number} (line {line}): {reason}; "
                "mend it or pass --skip-bad to leave out such records"
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
        if self._allowed is not None:
            foreign = set(molecule.atomic_numbers.tolist()) - self._allowed
            if foreign:
                allowed = ", ".join(symbol(z) for z in sorted(self._allowed))
                return f"it holds {symbol(min(foreign))}, which is not among {allowed}"
        if self.selection is None:
            return molecule
        try:
            columns = self.selection.columns(record.fields)
        except ValueError as error:
            return str(error)
        if self.bonds_perceived:
            columns |= {"bond_index": None, "bond_order": None, "formal_charges": None}
        return replace(molecule, **columns)

    def chunks(self, size: int) -> Iterator[MoleculeChunk]:
        """The molecules in chunks of at most `size`."""
        molecules = ((self.number, molecule) for molecule in self)
        while part := list(islice(molecules, size)):
            records, chunk = zip(*part, strict=True)
            yield MoleculeChunk(np.array(records, np.int64), Molecules.from_list(chunk))
