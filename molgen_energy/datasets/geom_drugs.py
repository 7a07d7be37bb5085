"""GEOM-Drugs: conformers of 304,000 drug-like molecules, from the files in which it is passed on.

Axelrod and Gómez-Bombarelli, Scientific Data 9, 185 (2022), doi:10.7910/DVN/JNGTDF: conformers of
CREST at GFN2-xTB. Each of `molgen_energy.datasets.geom` reads one layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import Molecule, MoleculeChunk, Molecules
from molgen_energy.datasets.base import RandomSplitDataset, option, workers_option
from molgen_energy.datasets.log import DatasetLog
from molgen_energy.datasets.screening import Screen, allowed_elements
from molgen_energy.distributed import check_workers, worker_count
from molgen_energy.errors import MEND_OR_SKIP, InputError, counted, unknown_name
from molgen_energy.output import display_path, named_path, real_path

if TYPE_CHECKING:
    from molgen_energy.datasets.geom.layout import Entry, Layout
    from molgen_energy.datasets.geom.processing import EntryChunk, ProcessedEntry

_CONFORMERS = 200  # that a worker process takes at a time
_TIMEOUT = 60.0  # s for one molecule
_LAYOUT, _RANDOM, _SCAFFOLD = "layout", "random", "scaffold"
_LABELS = 3
_ELEMENTS = "H,B,C,N,O,F,Al,Si,P,S,Cl,As,Br,I,Hg,Bi"
_ENERGY, _UNIT = "energy", "hartree"


@dataclass(frozen=True, kw_only=True)
class GeomDrugs(RandomSplitDataset):
    """GEOM-Drugs: drug-like molecules with conformers, from any of the forms it is passed on in."""

    name = "geom-drugs"
    output = "geom_drugs.h5"

    source: Path | None = option(  # noqa: RUF009
        None, "The folder or file; its layout is recognised, docs/how_to/data.md lists them."
    )
    conformers: int = option(
        5, "Conformers of each molecule, those of lowest energy or the first; 0 keeps all."
    )
    elements: str | None = option(
        None, "The elements that may occur; default: the 16 of GEOM-Drugs."
    )
    max_atoms: int = option(181, "Largest number of atoms, hydrogens included.")
    clean: bool = option(
        False, "Leave out what the cleaning of GEOM-Drugs Revisited does; needs bonds."
    )
    skip_bad: bool = option(False, "Leave out broken records instead of stopping.")
    split_by: str | None = option(
        None,
        "layout: the split that the files have; random: by molecule; scaffold: by ring system. "
        "Default: layout where it keeps the conformers of a molecule together, else random.",
    )
    split: str = option("0.8,0.1,0.1", "Shares for training, validation, test, unless by layout.")
    seed: int = option(0, "Seed of the split.")
    workers: int | None = workers_option()

    def __post_init__(self) -> None:
        if self.source is not None:
            object.__setattr__(self, "source", named_path(self.source))

    def source_name(self) -> str:
        """The layout and its file or folder."""
        path = self._source
        name = display_path(Path((path if path.name else real_path(path)).name))
        return f"GEOM-Drugs ({self._layout.name}, {name})"

    def check(self) -> None:
        """Raise `InputError` where an option has a bad value or the source is not recognised."""
        super().check()
        self._allowed()
        for flag, value, least in (
            ("--conformers", self.conformers, 0),
            ("--max-atoms", self.max_atoms, 1),
        ):
            if value < least:
                raise InputError(f"{flag} {value}: expected {least} or more")
        check_workers(self.workers)
        if self.split_by not in (None, _LAYOUT, _RANDOM, _SCAFFOLD):
            valid = (_LAYOUT, _RANDOM, _SCAFFOLD)
            raise InputError(unknown_name("--split-by", self.split_by, valid))
        layout = self._layout
        if self.split_by == _SCAFFOLD and not (layout.has_bonds or layout.has_smiles):
            raise InputError(
                f"--split-by scaffold: {layout.name} have no bonds and no SMILES; pass random"
            )
        if self.clean and not layout.has_bonds:
            raise InputError(f"--clean: {layout.name} has no bonds to check; leave it out")
        if self._by_layout:
            layout.check_split()

    def screen(self) -> Screen:
        """Bad molecules are left out or refused."""
        return Screen(skip_bad=self.skip_bad)

    def split_labels(self, count: int, groups: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        """The layout's, which is a part of the number of each group, or a random one."""
        if not self._by_layout:
            return super().split_labels(count, groups)
        assert groups is not None
        return (groups % _LABELS).astype(np.uint8)

    def split_warnings(
        self, labels: NDArray[np.uint8], groups: NDArray[np.int64] | None
    ) -> Iterator[str]:
        """Those of a random split."""
        if not self._by_layout:
            yield from super().split_warnings(labels, groups)

    def chunks(self, log: DatasetLog) -> Iterator[MoleculeChunk]:
        """The conformers of the molecules that pass the filters, in the order of the layout."""
        from molgen_energy.datasets.geom.processing import process_entries, processing_failed
        from molgen_energy.workers import WorkerPool

        groups = _Groups(self._by_layout)
        layout = self._layout
        number = 0
        places: dict[int, str] = {}
        log.locate = lambda record: places.get(record, f"molecule {record}")
        workers = worker_count(self.workers)
        preload = ["molgen_energy.datasets.geom.processing"]
        with WorkerPool(workers, _TIMEOUT * _CONFORMERS, preload=preload) as pool:
            for chunk, results in pool.map(process_entries, self._chunks(), processing_failed):
                records, kept, numbers = [], [], []
                for entry, found in zip(chunk.entries, results, strict=True):
                    number += 1
                    places[number] = entry.place
                    if not self._keeps(entry, found, log):
                        continue
                    key = self._key(found, number)
                    for k, molecule in zip(found.chosen, found.molecules, strict=True):
                        records.append(number)
                        kept.append(_with_columns(molecule, entry, found, k))
                        numbers.append(groups.number(key, entry.splits[k] if entry.splits else 0))
                log.progress(number, layout.total)
                if kept:
                    yield MoleculeChunk(
                        np.array(records, np.int64),
                        replace(Molecules.from_list(kept), groups=np.array(numbers, np.int64)),
                    )
                places.clear()
        log.notes += groups.notes()

    def _allowed(self) -> NDArray[np.bool_]:
        return allowed_elements(_ELEMENTS if self.elements is None else self.elements)

    @property
    def _source(self) -> Path:
        if self.source is None:
            raise InputError(
                "name the folder or file of GEOM-Drugs with --source; docs/how_to/data.md says "
                "where it is found"
            )
        return self.source

    @cached_property
    def _layout(self) -> Layout:
        from molgen_energy.datasets.geom.recognition import recognise

        return recognise(self._source)

    @property
    def _by_layout(self) -> bool:
        if self.split_by is None:
            return self._layout.splits_molecules
        return self.split_by == _LAYOUT

    def _chunks(self) -> Iterator[EntryChunk]:
        """The molecules of the layout in chunks of about the same work."""
        from molgen_energy.datasets.geom.processing import EntryChunk, Rules

        rules = Rules(
            self._layout.decode,
            self.conformers,
            self._allowed(),
            self.max_atoms,
            self.clean,
        )
        entries: list[Entry] = []
        waiting = 0
        for entry in self._layout.entries(self._by_layout):
            entries.append(entry)
            used = len(entry.conformers)
            waiting += max(1, min(used, self.conformers or used))
            if waiting >= _CONFORMERS:
                yield EntryChunk(entries, rules)
                entries, waiting = [], 0
        if entries:
            yield EntryChunk(entries, rules)

    def _keeps(self, entry: Entry, found: ProcessedEntry, log: DatasetLog) -> bool:
        """Whether a molecule is kept; counts one that is not, and raises for a bad one."""
        if found.filtered:
            log.counts[found.filtered] += 1
        elif found.failure:
            record = f"{entry.place}: {found.failure}"
            if not self.skip_bad:
                record = record.removeprefix(f"{self._source.name}: ")  # of a single file
                raise InputError(f"{self._source}: {record}; {MEND_OR_SKIP}")
            log.skip(record)
        return not (found.filtered or found.failure)

    def _key(self, found: ProcessedEntry, number: int) -> str:
        """Molecules of the same key stay in one split."""
        named = found.identity
        scaffold = named.scaffold if self.split_by == _SCAFFOLD else ""
        return scaffold or named.smiles or f"molecule {number}"


class _Groups:
    """Numbers of groups by their key and split, in 16 bytes and a place in a mapping for each."""

    def __init__(self, by_layout: bool) -> None:
        self._by_layout = by_layout
        self._numbers: dict[int, int] = {}
        self._shared = 0

    def number(self, key: str, label: int) -> int:
        """The number of a group; by the layout its remainder by 3 is the label."""
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        first = int.from_bytes(digest, "little") * _LABELS
        known = self._numbers.get(first + label)
        if known is None:
            others = sum(first + other in self._numbers for other in range(_LABELS))
            self._shared += others == 1
            known = len(self._numbers) * (_LABELS if self._by_layout else 1) + label
            self._numbers[first + label] = known
        return known

    def notes(self) -> list[str]:
        """What is wrong with the layout's split."""
        if not self._shared:
            return []
        return [
            f"the layout has {counted(self._shared, 'molecules')} in several splits, compared "
            "without stereochemistry, so that its test set is not independent; --split-by random "
            "keeps each in one"
        ]


def _with_columns(molecule: Molecule, entry: Entry, found: ProcessedEntry, k: int) -> Molecule:
    """A conformer with SMILES and energy, where the layout has them."""
    known = bool(entry.energies)
    return replace(
        molecule,
        smiles=found.identity.smiles or None,
        properties={_ENERGY: float(entry.energies[k])} if known else {},
        units={_ENERGY: _UNIT} if known else {},
    )
