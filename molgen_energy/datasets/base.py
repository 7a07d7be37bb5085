"""What `preprocess NAME` makes: datasets, and what is shared by those of molecules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import MoleculeChunk, Molecules
from molgen_energy.data.splits import check_fractions, check_seed, parse_fractions, random_split
from molgen_energy.elements import symbol
from molgen_energy.errors import InputError
from molgen_energy.progress import ProgressCallback, no_progress


@dataclass(frozen=True)
class PreprocessResult:
    """The result of preprocessing a dataset."""

    path: Path
    """The HDF5 file."""
    samples: str
    """The plural noun of its records: molecules, polygons, …"""
    counts: dict[str, int]
    """Samples of each split: train, valid, test."""
    summary: str
    """What is in the file, in a line."""
    skipped: tuple[str, ...] = ()
    """The first records that were left out, and why."""
    skipped_count: int = 0
    """How many were left out."""
    warnings: tuple[str, ...] = ()
    """What may be wrong with the data."""

    @property
    def count(self) -> int:
        """How many samples the file holds."""
        return sum(self.counts.values())


class Dataset(ABC):
    """What `preprocess NAME` makes. A frozen dataclass: each field is an option of the command.

    The first line of its docstring is the command's help. Registered in
    `molgen_energy.systems.datasets.DATASETS`.
    """

    name: ClassVar[str]
    samples: ClassVar[str]
    """The plural noun of its records."""
    output: ClassVar[str]
    """The file that is written where none is named."""

    def default_output(self) -> Path:
        """The file that is written where none is named."""
        return Path(self.output)

    @abstractmethod
    def write(self, output: Path, progress: ProgressCallback) -> str:
        """Make the data and write the file; returns what is in it, in a line.

        Raises
        ------
        InputError
            An option has a bad value, or the file cannot be written.
        """

    def make(self, output: Path, progress: ProgressCallback = no_progress) -> PreprocessResult:
        """Write the file and return its summary; raises as `write` does."""
        from molgen_energy.data.hdf5 import split_counts

        summary = self.write(output, progress)
        return PreprocessResult(output, self.samples, split_counts(output), summary)


def option(default: Any, text: str) -> Any:
    """A field of a dataset, with its default and the help of its option."""
    return field(default=default, metadata={"help": text})


def argument(text: str, metavar: str) -> Any:
    """A field of a dataset that its command takes by position, as one or more values."""
    return field(metadata={"help": text, "metavar": metavar})


class DatasetLog:
    """What a dataset of molecules reports while it is read."""

    MOST_NAMED = 5

    def __init__(self, progress: ProgressCallback = no_progress) -> None:
        self.progress = progress
        self.skipped: list[str] = []
        self.skipped_count = 0
        self.notes: list[str] = []
        """What the reader drops or may misunderstand; they become warnings of the result."""

    def skip(self, record: str) -> None:
        """Report a record that is left out, and why; the first are named."""
        if len(self.skipped) < self.MOST_NAMED:
            self.skipped.append(record)
        self.skipped_count += 1


class MoleculeDataset(Dataset):
    """A dataset of molecules: yields chunks with all the columns that it has.

    Writing, the split, progress and checks are shared. A dataset says what its molecules are,
    `chunks`, where they come from, `source_name`, and how they are split, `split_labels`.
    """

    samples = "molecules"

    @abstractmethod
    def source_name(self) -> str:
        """Where the molecules come from, an attribute of the file."""

    @abstractmethod
    def chunks(self, log: DatasetLog) -> Iterator[MoleculeChunk]:
        """The molecules with all their columns, some thousands at a time.

        Calls `log.progress(done, total)` as it goes on, and `log.skip` where a record is left out.

        Raises
        ------
        InputError
            A record is bad; names it.
        """

    @abstractmethod
    def split_labels(self, count: int, groups: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        """Of each molecule 0 for training, 1 validation, 2 test, (count,).

        ``groups`` (count,) are those of the molecules, if they have any.
        """

    def check(self) -> None:
        """Raise `InputError` where an option has a bad value, before anything is read."""

    def write(self, output: Path, progress: ProgressCallback) -> str:
        """Write the molecules."""
        return self.make(output, progress).summary

    def make(self, output: Path, progress: ProgressCallback = no_progress) -> PreprocessResult:
        """Write the molecules with their split, and return the summary.

        Raises
        ------
        InputError
            An option has a bad value, a record is bad, there is no molecule, a property has no
            value at all, or the file cannot be written.
        """
        from molgen_energy.data.hdf5 import MoleculeWriter, check_hdf5_name, split_counts

        self.check()
        check_hdf5_name(output)
        log, survey = DatasetLog(progress), _Survey(self.source_name())
        with MoleculeWriter(output, source=survey.source) as writer:
            for chunk in self.chunks(log):
                survey.add(chunk)
                writer.append(chunk.molecules)
            survey.check()
            writer.set_split(self.split_labels(writer.count, survey.all_groups()))
        return PreprocessResult(
            output,
            self.samples,
            split_counts(output),
            survey.summary(),
            tuple(log.skipped),
            log.skipped_count,
            (*log.notes, *survey.warnings()),
        )


class RandomSplitDataset(MoleculeDataset):
    """A dataset of molecules without a split of its own, with options for a random one.

    Molecules of one group are in one split.
    """

    split: str
    seed: int

    def check(self) -> None:
        """Raise `InputError` unless split and seed can be used."""
        check_seed(self.seed)
        check_fractions(parse_fractions(self.split))

    def split_labels(self, count: int, groups: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        """In the shares of `split`, at random."""
        return random_split(count, parse_fractions(self.split), self.seed, groups)


class _Survey:
    """What is found in the molecules of a dataset, in memory that grows with groups alone."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.count = 0
        self._elements = np.zeros(256, bool)
        self._fewest, self._most = 1 << 62, 0
        self._flat = True
        self._groups: list[NDArray[np.int64]] = []
        self._values: dict[str, int] = {}

    def add(self, chunk: MoleculeChunk) -> None:
        """Take in some molecules; raises `InputError` where a molecule cannot be stored."""
        molecules = chunk.molecules
        sizes = molecules.sizes
        for bad, what in (
            (sizes == 0, "no atoms"),
            (_not_finite(molecules), "coordinates that are not finite"),
        ):
            if bad.any():
                raise InputError(f"{self.source}: record {chunk.records[bad][0]} has {what}")
        self.count += len(molecules)
        self._elements[np.unique(molecules.atomic_numbers)] = True
        self._fewest = min(self._fewest, int(sizes.min(initial=self._fewest)))
        self._most = max(self._most, int(sizes.max(initial=0)))
        self._flat = self._flat and not molecules.positions[:, 2].any()
        if molecules.groups is not None:
            self._groups.append(molecules.groups)
        for name, column in molecules.properties.items():
            present = int(np.isfinite(column.values).sum())
            self._values[name] = self._values.get(name, 0) + present

    def check(self) -> None:
        """Raise `InputError` where there is no molecule, or a property without any value."""
        if not self.count:
            raise InputError(f"{self.source} holds no molecule")
        for name, present in self._values.items():
            if not present:
                raise InputError(
                    f"{self.source}: no molecule has a number for the property '{name}'; leave it "
                    "out, or correct its name"
                )

    def all_groups(self) -> NDArray[np.int64] | None:
        """The groups of all molecules, (M,)."""
        return np.concatenate(self._groups) if self._groups else None

    def summary(self) -> str:
        """What there is, in a line."""
        elements = ", ".join(symbol(z) for z in np.flatnonzero(self._elements).tolist())
        text = f"{self._fewest} to {self._most} atoms of {elements}"
        if self._values:
            text += f"; properties {', '.join(self._values)}"
        if self._groups:
            text += f"; {len(np.unique(np.concatenate(self._groups))):,} groups"
        return text

    def warnings(self) -> Iterator[str]:
        """What may be wrong."""
        if not self._elements[1]:
            yield "no molecule holds a hydrogen; models and metrics here take hydrogens as atoms"
        if self._flat:
            yield "all molecules lie in the plane z = 0; is this a file of 2D drawings?"
        for name, present in self._values.items():
            if present < self.count:
                missing = self.count - present
                yield f"property {name} is missing in {missing:,} of {self.count:,} molecules (NaN)"


def _not_finite(molecules: Molecules) -> NDArray[np.bool_]:
    """Which molecules have coordinates that are not finite, (M,); some may have no atoms."""
    bad = np.zeros(len(molecules), bool)
    atoms = ~np.isfinite(molecules.positions).all(axis=1)
    bad[molecules.molecule_index[atoms]] = True
    return bad
