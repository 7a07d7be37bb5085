"""Conformers of the molecules of SMILES files."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy import __version__
from molgen_energy.data.molecules import MoleculeChunk, Property
from molgen_energy.datasets.base import (
    PreprocessResult,
    ScreenedDataset,
    argument,
    choose_properties,
    option,
    workers_option,
)
from molgen_energy.datasets.log import DatasetLog
from molgen_energy.datasets.screening import foreign_elements, foreign_reason
from molgen_energy.distributed import check_workers
from molgen_energy.errors import MEND_OR_SKIP, InputError
from molgen_energy.output import check_file, display_path, named_path, remove
from molgen_energy.progress import ProgressCallback, no_progress

if TYPE_CHECKING:
    from molgen_energy.chemistry.conformers import Embedding
    from molgen_energy.chemistry.fields import FieldSelection
    from molgen_energy.chemistry.molfiles.lines import Lines
    from molgen_energy.datasets.conformers import Computed
    from molgen_energy.datasets.smiles_shards import SmilesManifest

_SUFFIXES = (".smi", ".smiles", ".csv", ".tsv")
_CHUNK = 100  # molecules in a shard: some seconds of work
_SHOWN = 200  # characters of a header


def is_smiles_file(path: str | PathLike[str]) -> bool:
    """Whether the name of a file says that it holds SMILES."""
    return str(path).lower().removesuffix(".gz").endswith(_SUFFIXES)


class _Record(NamedTuple):
    """A SMILES that can be embedded."""

    number: int
    """From 1, over all files."""
    name: str
    """Its place: line 3, or a.smi: line 3."""
    smiles: str
    """Canonical, of the fragment that is kept."""
    group: int
    """The number of the first record with the same SMILES."""
    columns: dict[str, Any]
    """Its properties, as arguments of `Molecule`."""


@dataclass(frozen=True, kw_only=True)
class SmilesFiles(ScreenedDataset):
    """Conformers of the SMILES in .smi or .csv files (also .gz), by ETKDG.

    Finished conformers are kept in FILE.shards. After an interruption the same command continues
    there.
    """

    name = "smiles"
    output = "FILE.h5"

    files: tuple[Path, ...] = argument("SMILES in .smi, .csv or .tsv files (also .gz).", "FILE…")
    column: str | None = option(
        None, "The column (CSV) of the SMILES; default: the one named smiles, in any case."
    )
    properties: str | None = option(
        None,
        "Columns (CSV) to keep as properties, with units if you like: gap=eV,mu. Default: all that "
        "hold numbers in the first rows; '' keeps none.",
    )
    conformers: int = option(1, "Conformers of each molecule; they stay in one split.")
    relax: str = option("mmff94", "mmff94 (or mmff), gfn2-xtb (or xtb; extra `xtb`), or none.")
    timeout: float = option(60.0, "Most seconds for one molecule.")
    workers: int | None = workers_option()
    split: str = option("0.8,0.1,0.1", "Shares for training, validation, test.")
    seed: int = option(0, "Seed of conformers and split.")

    def __post_init__(self) -> None:
        from molgen_energy.chemistry.conformers import relaxation_named

        object.__setattr__(self, "files", tuple(map(named_path, self.files)))
        object.__setattr__(self, "relax", relaxation_named(self.relax))

    def default_output(self) -> Path:
        """Named after the first file."""
        from molgen_energy.chemistry.molfiles import base_name

        return Path(f"{base_name(self.files[0])}.h5")

    def source_name(self) -> str:
        """The names of the files, and how the conformers were made."""
        names = (display_path(Path(path.name)) for path in self.files)
        return f"{', '.join(names)}, ETKDGv3, {self.relax}"

    def check(self) -> None:
        """Raise `InputError` where an option has a bad value or a file is missing."""
        from molgen_energy.chemistry.conformers import check_relaxation

        super().check()
        for path in self.files:
            check_file(path)
            if not is_smiles_file(path):
                kinds = ", ".join(_SUFFIXES)
                raise InputError(f"{path} is no file of SMILES ({kinds}, also .gz)")
        if self.conformers < 1:
            raise InputError(f"--conformers {self.conformers}: expected 1 or more")
        check_workers(self.workers)
        check_relaxation(self.relax, self.timeout)

    def make(self, output: Path, progress: ProgressCallback = no_progress) -> PreprocessResult:
        """Embed the molecules and write them; continues from what is in FILE.shards."""
        from molgen_energy.data.shards import shards_folder

        result = super().make(output, progress)
        remove(shards_folder(output))
        return result

    def chunks(self, log: DatasetLog) -> Iterator[MoleculeChunk]:
        """The conformers of all files, in order."""
        from molgen_energy.chemistry.conformers import embed
        from molgen_energy.datasets.conformers import ConformerWork

        records = list(self._records(log))
        self._report_repeated(records, log)
        parts = [records[k : k + _CHUNK] for k in range(0, len(records), _CHUNK)]
        work = ConformerWork(
            self._manifest(), self._embedding, embed, _shard_name, self.timeout, self.workers
        )
        with closing(work.run(parts, log)) as results:
            for part, found in results:
                yield from self._chunk(part, found, log)

    def _manifest(self) -> SmilesManifest:
        """What the conformers depend on, besides the SMILES."""
        from rdkit import rdBase

        from molgen_energy.data.shards import FORMAT
        from molgen_energy.datasets.smiles_shards import SmilesManifest

        return SmilesManifest(
            format=FORMAT,
            seed=self.seed,
            conformers=self.conformers,
            relax=self.relax,
            rdkit=rdBase.rdkitVersion,
            version=__version__,
        )

    def _embedding(self, record: _Record) -> Embedding:
        from molgen_energy.chemistry.conformers import Embedding

        seed = self._seed_of(record)
        return Embedding(record.name, record.smiles, seed, self.conformers, self.relax)

    def _seed_of(self, record: _Record) -> int:
        """Of the conformers of a record: 31 bits, as RDKit takes them."""
        return int(np.random.SeedSequence([self.seed, record.number]).generate_state(1)[0] >> 1)

    def _chunk(
        self, part: Sequence[_Record], found: Computed, log: DatasetLog
    ) -> Iterator[MoleculeChunk]:
        """The conformers of some records with their columns, if there are any."""
        for k, reason in found.failures:
            self._skip(part[k].name, reason, log)
        if found.molecules is None:
            return
        units = part[0].columns["units"]
        chosen = [part[k] for k in found.which.tolist()]
        yield MoleculeChunk(
            np.array([record.number for record in chosen], np.int64),
            replace(
                found.molecules,
                smiles=np.array([record.smiles for record in chosen], object),
                groups=np.array([record.group for record in chosen], np.int64),
                properties={
                    name: Property(
                        np.array([r.columns["properties"][name] for r in chosen], np.float64), unit
                    )
                    for name, unit in units.items()
                },
            ),
        )

    def _skip(self, place: str, reason: str, log: DatasetLog) -> None:
        """Leave out a bad record, or raise."""
        if not self.skip_bad:
            where = place if len(self.files) > 1 else f"{self.files[0].name}: {place}"
            raise InputError(f"{where}: {reason}; {MEND_OR_SKIP}")
        log.skip(f"{place}: {reason}")

    def _records(self, log: DatasetLog) -> Iterator[_Record]:
        """The SMILES that can be embedded; bad ones are left out or raise."""
        from rdkit import Chem

        from molgen_energy.chemistry.conformers import parse_smiles

        allowed = self.allowed_elements()
        first: dict[str, int] = {}
        number = 0
        selection = self._selection()
        for path in self.files:
            for line, text, fields in smiles_rows(path, self.column):
                number += 1
                place = f"line {line}" if len(self.files) == 1 else f"{path.name}: line {line}"
                try:
                    molecule, reduced = parse_smiles(text, self.largest_fragment)
                    _check_elements(molecule, allowed)
                except ValueError as error:
                    self._skip(place, str(error), log)
                    continue
                log.counts["reduced to the largest fragment"] += reduced
                smiles = Chem.MolToSmiles(Chem.RemoveHs(molecule))
                group = first.setdefault(smiles, number)
                if self.drop_duplicates and group != number:
                    log.counts["left out as duplicates"] += 1
                    continue
                yield _Record(number, place, smiles, group, selection.columns(fields))

    def _report_repeated(self, records: list[_Record], log: DatasetLog) -> None:
        repeated = [record for record in records if record.group != record.number]
        if repeated:
            log.notes.append(
                f"{len(repeated):,} of {len(records):,} SMILES repeat the molecule of an earlier "
                f"one, the first in {repeated[0].name}; --drop-duplicates leaves them out"
            )

    def _selection(self) -> FieldSelection:
        """The properties of all files; those that a file lacks are NaN there."""
        from molgen_energy.chemistry.fields import FIRST_RECORDS, FieldSelection

        fields = (
            fields
            for path in self.files
            for _, _, fields in islice(smiles_rows(path, self.column), FIRST_RECORDS)
        )
        return choose_properties(FieldSelection.detect(fields), self.properties)


def smiles_rows(
    path: Path,
    column: str | None = None,
    remedy: str = "name that of the SMILES with --column",
) -> Iterator[tuple[int, str, dict[str, str]]]:
    """Line number, SMILES and the other columns of each row of a file.

    Parameters
    ----------
    column
        Of the SMILES in a table; None takes the one named smiles, in any case.
    remedy
        What to do about a table without it, for the message.

    Raises
    ------
    InputError
        The file cannot be read, or has no such column.
    """
    from molgen_energy.chemistry.molfiles.lines import DAMAGED, Lines, TooLargeError

    table = path.name.lower().removesuffix(".gz").endswith((".csv", ".tsv"))
    with closing(Lines(path)) as lines:
        try:
            yield from _table(path, lines, column, remedy) if table else _lines(lines)
        except TooLargeError as error:
            raise InputError(f"{path}: line {lines.number + 1}: {error}") from error
        except (*DAMAGED, csv.Error) as error:
            raise InputError(
                f"{path} cannot be read after line {lines.number} ({error}); make it again"
            ) from error


def _texts(lines: Lines) -> Iterator[str]:
    """The lines, each a record of its own, with the empty ones before it."""
    while (line := lines.next()) is not None:
        if not line.isspace():
            lines.begin_record()
        yield line


def _lines(lines: Lines) -> Iterator[tuple[int, str, dict[str, str]]]:
    """Each line begins with a SMILES; a name may follow. A header and empty lines do not count."""
    for line, text in enumerate(_texts(lines), start=1):
        words = text.split(None, 1)
        if words and not (line == 1 and "smiles" in words[0].lower()):
            yield line, words[0], {}


def _table(
    path: Path, lines: Lines, column: str | None, remedy: str
) -> Iterator[tuple[int, str, dict[str, str]]]:
    """The rows under a header; the delimiter is the one that the header has most of."""
    from molgen_energy.chemistry.fields import MOST_FIELDS

    texts = _texts(lines)
    header = next(texts, "")
    delimiter = max(",;\t", key=header.count)
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    if len(names) > MOST_FIELDS:
        raise InputError(f"{path} has more than {MOST_FIELDS:,} columns; leave out some")
    found = [k for k, name in enumerate(names) if name.lower() == "smiles"]
    if column is not None:
        found = [k for k, name in enumerate(names) if name == column]
    if not found:
        wanted = "smiles" if column is None else column
        raise InputError(
            f"{path} has no column '{wanted}' (columns: {', '.join(names)[:_SHOWN]}); {remedy}"
        )
    rows = csv.reader(texts, delimiter=delimiter)
    for row in rows:
        if any(row):
            fields = dict(zip(names, row, strict=False))
            smiles = row[found[0]].strip() if found[0] < len(row) else ""
            yield rows.line_num + 1, smiles, fields


def _check_elements(molecule: Any, allowed: NDArray[np.bool_]) -> None:
    """Raise `ValueError` where a molecule holds an element that may not occur."""
    numbers = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()], np.uint8)
    if names := foreign_elements(numbers, allowed):
        raise ValueError(foreign_reason(names, allowed))


def _shard_name(part: Sequence[_Record]) -> str:
    """Of the conformers of some records: changes with their SMILES and numbers."""
    text = json.dumps([(record.number, record.smiles) for record in part])
    return f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.shard"
