"""Molecules of anybody's SDF and XYZ files, folders and patterns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from molgen_energy.data.molecules import MoleculeChunk, Molecules
from molgen_energy.datasets.base import DatasetLog, RandomSplitDataset, argument, option
from molgen_energy.errors import InputError

if TYPE_CHECKING:
    from molgen_energy.chemistry.molfiles import FieldSelection, MoleculeReader

_CHUNK = 2000
_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class MoleculeFiles(RandomSplitDataset):
    """Molecules of your own SDF or XYZ files (also .gz), or folders, with their data fields."""

    name = "files"
    output = "FILE.h5"

    files: tuple[Path, ...] = argument(
        "SDF or XYZ files (also .gz), folders of them, or patterns in quotes: 'molecule_*.xyz'.",
        "FILE…",
    )
    properties: str | None = option(
        None,
        "Data fields (SDF) or keys of the comment (XYZ) to keep as properties, with units if you "
        "like: gap=eV,mu. Default: all that hold numbers in the first records; '' keeps none.",
    )
    group: str | None = option(
        None, "A field; records with equal values stay in one split, such as conformers."
    )
    split: str = option("0.8,0.1,0.1", "Shares for training, validation, test.")
    seed: int = option(0, "Seed of the split.")
    elements: str | None = option(None, "The elements that may occur, such as H,C,N,O,F.")
    skip_bad: bool = option(False, "Leave out broken records instead of stopping.")

    def __post_init__(self) -> None:
        if "" in map(str, self.files):
            raise InputError("a file name is empty; is a variable of the shell not set?")
        object.__setattr__(self, "files", tuple(map(Path, self.files)))

    def default_output(self) -> Path:
        """Named after the first file, or its folder where that is a folder or pattern."""
        from molgen_energy.chemistry.molfiles import base_name

        if not self.files:
            raise InputError("name an SDF or XYZ file")
        return Path(f"{base_name(self.files[0])}.h5")

    def source_name(self) -> str:
        """The names of the first files, and how many there are."""
        names = [path.name or str(path.resolve()) for path in self.files[:_MOST_NAMED]]
        more = len(self.files) - len(names)
        return ", ".join(names) + (f" and {more:,} more files" if more else "")

    def check(self) -> None:
        """Raise `InputError` where an option has a bad value or a file is missing."""
        super().check()
        if not self.files:
            raise InputError("name an SDF or XYZ file")
        self._readers()

    def chunks(self, log: DatasetLog) -> Iterator[MoleculeChunk]:
        """The molecules of all files, one after another."""
        return _joined(self._chunks_of_files(log))

    def _chunks_of_files(self, log: DatasetLog) -> Iterator[MoleculeChunk]:
        done = 0
        for reader in self._readers():
            several = len(self.files) > 1 or len(reader.files) > 1
            reader.selection = self._selection(reader)
            for chunk in reader.chunks(_CHUNK):
                done += len(chunk)
                log.progress(done, None)
                yield chunk
            for bad in reader.skipped:
                place = f"record {bad.number} (line {bad.line}): {bad.reason}"
                log.skip(f"{bad.path.name}: {place}" if several else place)
            log.skipped_count += reader.skipped_count - len(reader.skipped)
            log.notes += reader.notes

    def _readers(self) -> list[MoleculeReader]:
        from molgen_energy.chemistry.molfiles import MoleculeReader

        allowed = None
        if self.elements is not None:
            allowed = [name.strip() for name in self.elements.split(",")]
        return [MoleculeReader(path, self.skip_bad, allowed) for path in self.files]

    def _selection(self, reader: MoleculeReader) -> FieldSelection:
        from molgen_energy.chemistry.molfiles import FieldSelection

        found = reader.detect_fields(self.group)
        if self.properties is None:
            return found
        chosen: dict[str, str] = {}
        for text in filter(None, map(str.strip, self.properties.split(","))):
            name, _, unit = text.partition("=")
            chosen[name.strip()] = unit.strip() or found.known_units.get(name.strip(), "")
        return FieldSelection.of(chosen, self.group)


def _joined(chunks: Iterator[MoleculeChunk]) -> Iterator[MoleculeChunk]:
    """Small chunks with the same columns as one, because writing each takes some milliseconds."""
    waiting: list[MoleculeChunk] = []
    for chunk in chunks:
        count = sum(map(len, waiting)) + len(chunk)
        if waiting and (count > _CHUNK or _columns(chunk) != _columns(waiting[0])):
            yield _join(waiting)
            waiting = []
        waiting.append(chunk)
    if waiting:
        yield _join(waiting)


def _columns(chunk: MoleculeChunk) -> tuple[bool, bool, bool, dict[str, str]]:
    molecules = chunk.molecules
    optional = (molecules.bonds, molecules.formal_charges, molecules.groups)
    bonds, charges, groups = (column is None for column in optional)
    return bonds, charges, groups, dict(molecules.units)


def _join(chunks: list[MoleculeChunk]) -> MoleculeChunk:
    records = np.concatenate([chunk.records for chunk in chunks])
    return MoleculeChunk(records, Molecules.concatenate([chunk.molecules for chunk in chunks]))
