"""Molecules of anybody's SDF and XYZ files, folders and patterns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import MoleculeChunk
from molgen_energy.datasets.base import ScreenedDataset, argument, choose_properties, option
from molgen_energy.datasets.log import DatasetLog
from molgen_energy.datasets.smiles import is_smiles_file
from molgen_energy.elements import atomic_number
from molgen_energy.errors import InputError
from molgen_energy.output import display_path, named_path, real_path

if TYPE_CHECKING:
    from molgen_energy.chemistry.molfiles import MoleculeReader

_CHUNK = 2000
_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class MoleculeFiles(ScreenedDataset):
    """Molecules of your own SDF or XYZ files (also .gz), or folders, with their data fields."""

    name = "files"
    output = "FILE.h5"
    remedies: ClassVar[Mapping[str, str]] = {
        **ScreenedDataset.remedies,
        "types": "name their elements: --types C,O,H",
    }

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
    types: str | None = option(
        None, "Elements of the atom types 1, 2, … that stand for elements, such as C,O,H (LAMMPS)."
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", tuple(map(named_path, self.files)))

    def default_output(self) -> Path:
        """Named after the first file, or its folder where that is a folder or pattern."""
        from molgen_energy.chemistry.molfiles import base_name

        if not self.files:
            raise InputError("name an SDF or XYZ file")
        return Path(f"{base_name(self.files[0])}.h5")

    def source_name(self) -> str:
        """The names of the first files, and how many there are."""
        paths = [path if path.name else real_path(path) for path in self.files[:_MOST_NAMED]]
        names = [display_path(Path(path.name)) for path in paths]
        more = len(self.files) - len(names)
        return ", ".join(names) + (f" and {more:,} more files" if more else "")

    def check(self) -> None:
        """Raise `InputError` where an option has a bad value or a file is missing."""
        super().check()
        if not self.files:
            raise InputError("name an SDF or XYZ file")
        for path in filter(is_smiles_file, self.files):
            raise InputError(f"{path} holds SMILES; `preprocess smiles {path}` embeds them")
        self._readers()
        if self.types is not None:
            self._elements_of_types()

    def chunks(self, log: DatasetLog) -> Iterator[MoleculeChunk]:
        """The molecules of all files, one after another."""
        done = 0
        for reader in self._readers():
            several = len(self.files) > 1 or len(reader.files) > 1
            found = reader.detect_fields(self.group)
            reader.selection = choose_properties(found, self.properties)
            log.file = reader.path.name if len(self.files) > 1 else ""
            log.locate = reader.locate
            for chunk in reader.chunks(_CHUNK):
                if self.types is not None:
                    chunk = self._named(chunk, reader.path)
                done += len(chunk)
                log.progress(done, None)
                yield chunk
            for bad in reader.skipped:
                place = f"record {bad.number} (line {bad.line}): {bad.reason}"
                log.skip(f"{bad.path.name}: {place}" if several else place)
            log.skipped_count += reader.skipped_count - len(reader.skipped)
            log.notes += [f"{reader.path}: {note}" for note in reader.notes]

    def _readers(self) -> list[MoleculeReader]:
        from molgen_energy.chemistry.molfiles import MoleculeReader

        return [MoleculeReader(path, self.skip_bad) for path in self.files]

    def _named(self, chunk: MoleculeChunk, path: Path) -> MoleculeChunk:
        """The molecules with the elements of their atom types."""
        elements = self._elements_of_types()
        numbers = chunk.molecules.atomic_numbers
        beyond = np.flatnonzero(numbers >= len(elements))
        if len(beyond):
            record = chunk.records[chunk.molecules.molecule_index[beyond[0]]]
            raise InputError(
                f"{path}: record {record} has the atom type {numbers[beyond[0]]}, and --types "
                f"{self.types} names {len(elements) - 1}"
            )
        return replace(chunk, molecules=replace(chunk.molecules, atomic_numbers=elements[numbers]))

    def _elements_of_types(self) -> NDArray[np.uint8]:
        """Atomic numbers by the number of the type, from 1."""
        names = map(str.strip, (self.types or "").split(","))
        return np.array([0, *map(atomic_number, names)], np.uint8)
