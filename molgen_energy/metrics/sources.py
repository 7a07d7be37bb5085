"""Molecules to evaluate, from a file or from RDKit, in chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from molgen_energy.chemistry.convert import molecule_from_rdkit
from molgen_energy.chemistry.fields import BONDS, provenance
from molgen_energy.chemistry.molfiles import MoleculeReader, molecule_files
from molgen_energy.chemistry.molfiles.bond_scan import (
    NO_BONDS,
    GivenBonds,
    ScannedRecord,
    find_given_bonds,
)
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecule, MoleculeChunk, Molecules
from molgen_energy.errors import InputError

CHUNK_SIZE = 500


class ChunkSource(Protocol):
    """Molecules in chunks."""

    def chunks(self) -> Iterator[MoleculeChunk]:
        """Iterate over the molecules, with one chunk in memory at a time."""
        ...


class FileSource:
    """The molecules of an SDF, XYZ (also packed) or HDF5 file, or of a set of SDF or XYZ files.

    Parameters
    ----------
    path
        The file; or a folder or a pattern, see
        `molgen_energy.chemistry.molfiles.molecule_files`.
    split
        Take only this split (`train`, `test`) of an HDF5 file that has it; None takes all.
    skip_bad
        Skip broken records and count them.
    limit
        Maximum number of molecules, chosen at random (HDF5 only).

    Raises
    ------
    InputError
        The file does not exist, or an HDF5 file has no molecules.
    """

    def __init__(
        self,
        path: Path,
        split: str | None = None,
        skip_bad: bool = False,
        limit: int | None = None,
    ) -> None:
        molecule_files(path)
        self.path, self.split, self.skip_bad, self.limit = path, split, skip_bad, limit
        self.skipped = 0
        """Number of records skipped by the last iteration."""
        self.notes: list[str] = []
        """Remarks about the last iteration, for the report."""
        self.provenance: dict[str, str] = {}

    @property
    def is_hdf5(self) -> bool:
        """Whether the file name is that of an HDF5 file."""
        return self.path.suffix.lower() in (".h5", ".hdf5")

    def size(self) -> int | None:
        """Number of molecules; None where it takes reading the whole file."""
        if not self.is_hdf5:
            return None
        with MoleculeFile(self.path) as file:
            count = len(file.split_indices(self._existing_split(file)))
        return count if self.limit is None else min(count, self.limit)

    def has_split(self, split: str) -> bool:
        """Whether the file has molecules of a split."""
        if not self.is_hdf5:
            return False
        with MoleculeFile(self.path) as file:
            return len(file.split_indices(split)) > 0

    @cached_property
    def given_bonds(self) -> GivenBonds:
        """Which records have bonds that were not perceived from distances."""
        if not self.is_hdf5:
            return MoleculeReader(self.path, self.skip_bad).given_bonds
        with MoleculeFile(self.path) as file:
            return GivenBonds(True, None) if "bonds" in file.columns else NO_BONDS

    @cached_property
    def origin(self) -> dict[str, str]:
        """How the file was made, from its first record or attributes; empty where it is unknown.

        Raises
        ------
        InputError
            The first record is bad, and `skip_bad` is false.
        """
        if self.is_hdf5:
            with MoleculeFile(self.path) as file:
                return file.provenance
        reader = MoleculeReader(self.path, self.skip_bad)
        next(iter(reader), None)
        return provenance(reader.fields)

    def is_qm9(self) -> bool:
        """Whether the file was made from QM9."""
        if not self.is_hdf5:
            return False
        with MoleculeFile(self.path) as file:
            return "QM9" in file.source

    def _existing_split(self, file: MoleculeFile) -> str | None:
        return self.split if len(file.split_indices(self.split)) else None

    def chunks(self) -> Iterator[MoleculeChunk]:
        """Iterate over the molecules in chunks of at most 500.

        Molecules with and without bonds come in separate chunks.
        """
        if self.is_hdf5:
            yield from self._hdf5_chunks()
            return
        reader = MoleculeReader(self.path, self.skip_bad)
        numbered = ((reader.number, molecule) for molecule in reader)
        for chunk in _chunks_by_bonds(numbered):
            self.provenance = provenance(reader.fields)
            yield chunk
        self.skipped = reader.skipped_count
        self.notes = [*reader.notes, *_skipped_notes(reader)]

    def _hdf5_chunks(self) -> Iterator[MoleculeChunk]:
        with MoleculeFile(self.path) as file:
            split = self._existing_split(file)
            if split != self.split:
                self.notes = [f"no {self.split} split; all molecules are used"]
            self.provenance = file.provenance
            members = file.split_indices(split)
            included = np.ones(len(file), bool)
            if self.limit is not None and len(members) > self.limit:
                included[:] = False
                rng = np.random.default_rng(0)
                included[rng.choice(members, self.limit, replace=False)] = True
            for chunk in file.chunks(CHUNK_SIZE, split, self.skip_bad):
                chosen = np.flatnonzero(included[chunk.records - 1])
                # No metric reads the other columns, which every worker would get and send back.
                bare = replace(chunk.molecules, smiles=None, properties={})
                chunk = MoleculeChunk(chunk.records, bare)
                if len(chosen):
                    yield chunk if len(chosen) == len(chunk) else chunk.select(chosen)
            self.skipped = file.skipped


class RDKitSource:
    """RDKit molecules with a conformer each; hydrogens must be explicit atoms.

    Parameters
    ----------
    molecules
        `rdkit.Chem.Mol` objects. Positions come from the first conformer, bonds and formal charges
        from the molecule. `sample` writes the property `bonds` into SDF files: `perceived` says
        that bonds come from distances.
    skip_bad
        Skip molecules that cannot be used and count them.
    """

    path = None

    def __init__(self, molecules: Sequence[Any], skip_bad: bool = False) -> None:
        self._molecules, self.skip_bad = molecules, skip_bad
        self.skipped = 0
        self.notes: list[str] = []
        self.provenance: dict[str, str] = {}

    def size(self) -> int:
        """Number of molecules."""
        return len(self._molecules)

    @cached_property
    def origin(self) -> dict[str, str]:
        """How the first molecule was made, from its properties; empty where it is unknown."""
        first = next((m for m in self._molecules if m is not None), None)
        if first is None:
            return {}
        return provenance({k: str(v) for k, v in first.GetPropsAsDict(False, False).items()})

    @cached_property
    def given_bonds(self) -> GivenBonds:
        """Which molecules have bonds that were not perceived from distances."""
        return find_given_bonds(_scanned(m) for m in self._molecules if m is not None)

    def chunks(self) -> Iterator[MoleculeChunk]:
        """Iterate over the molecules in chunks of at most 500.

        Raises
        ------
        InputError
            A molecule cannot be used and `skip_bad` is false, or there are none.
        """
        self.skipped = 0
        empty = True
        for chunk in _chunks_by_bonds(self._converted()):
            empty = False
            yield chunk
        if empty:
            raise InputError("there are no molecules to evaluate")

    def _converted(self) -> Iterator[tuple[int, Molecule]]:
        for number, molecule in enumerate(self._molecules, start=1):
            try:
                if molecule is None:  # what RDKit's suppliers return for a broken record
                    raise InputError("it is None")
                converted = molecule_from_rdkit(molecule)
                if not np.isfinite(converted.positions).all():
                    raise InputError("its coordinates are not finite")
            except ValueError as error:
                if not self.skip_bad:
                    raise InputError(f"molecule {number}: {error}") from None
                self.skipped += 1
                continue
            yield number, converted


def _chunks_by_bonds(molecules: Iterable[tuple[int, Molecule]]) -> Iterator[MoleculeChunk]:
    """Chunks of numbered molecules, separated by whether they have bonds."""
    molecules = iter(molecules)
    while part := list(islice(molecules, CHUNK_SIZE)):
        for with_bonds in (True, False):
            alike = [(k, m) for k, m in part if (m.bond_index is not None) == with_bonds]
            if alike:
                records, members = zip(*alike, strict=True)
                yield MoleculeChunk(np.array(records, np.int64), Molecules.from_list(members))


def _declares(molecule: Any, bonds: str) -> bool:
    return bool(molecule.HasProp(BONDS)) and str(molecule.GetProp(BONDS)).startswith(bonds)


def _scanned(molecule: Any) -> ScannedRecord:
    """The bonds of an RDKit molecule."""

    def parse() -> Molecule | None:
        try:
            return molecule_from_rdkit(molecule)
        except ValueError:
            return None

    has_bonds = (
        molecule.GetNumBonds() > 0
        or molecule.GetNumAtoms() <= 1
        or any(atom.GetFormalCharge() for atom in molecule.GetAtoms())
        or _declares(molecule, "given")
    )
    return ScannedRecord(has_bonds, _declares(molecule, "perceived"), parse)


def _skipped_notes(reader: MoleculeReader) -> list[str]:
    if not reader.skipped:
        return []
    first = reader.skipped[0]
    where = f"{first.number} of {first.path.name}" if len(reader.files) > 1 else f"{first.number}"
    return [f"the first bad record is {where} (line {first.line}): {first.reason}"]
