"""What `preprocess NAME` makes: datasets, and what is shared by those of molecules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import MoleculeChunk, Molecules
from molgen_energy.data.splits import check_fractions, check_seed, parse_fractions, random_split
from molgen_energy.datasets.log import DatasetLog
from molgen_energy.datasets.screening import Screen, allowed_elements
from molgen_energy.elements import symbol
from molgen_energy.errors import InputError, counted
from molgen_energy.progress import ProgressCallback, no_progress

if TYPE_CHECKING:
    from molgen_energy.chemistry.fields import FieldSelection
    from molgen_energy.chemistry.rdkit_properties import DescriptorProperty

_JOINED = 2000  # molecules
_FEW = 100  # molecules, of which whole groups seldom make the shares that were asked for
_FAR = 0.05  # difference of a share from the one that was asked for


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


def workers_option() -> Any:
    """The field of the number of worker processes."""
    return option(None, "Worker processes, 0 for none; default: one for each processor.")


def argument(text: str, metavar: str) -> Any:
    """A field of a dataset that its command takes by position, as one or more values."""
    return field(metadata={"help": text, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class MoleculeDataset(Dataset):
    """A dataset of molecules: yields chunks with all the columns that it has.

    Writing, the split, progress and checks are shared. A dataset says what its molecules are,
    `chunks`, where they come from, `source_name`, and how they are split, `split_labels`.
    """

    samples = "molecules"

    property: tuple[str, ...] = option(
        (),
        "A property to compute by RDKit, such as logp=rdkit:MolLogP, of the given bonds, else of "
        "the SMILES, else of bonds perceived from distances; may be repeated.",
    )

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

    def split_warnings(
        self, labels: NDArray[np.uint8], groups: NDArray[np.int64] | None
    ) -> Iterator[str]:
        """What may be wrong with the labels (M,) that `split_labels` gave."""
        yield from ()

    def check(self) -> None:
        """Raise `InputError` where an option has a bad value, before anything is read."""

    def screen(self) -> Screen:
        """What is done to the molecules before they are written."""
        return Screen()

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
        descriptors = self._descriptors()
        check_hdf5_name(output)
        log, survey, screen = (
            DatasetLog(progress, output),
            _Survey(self.source_name()),
            self.screen(),
        )
        with MoleculeWriter(output, source=survey.source) as writer:
            for molecules in _joined(self._screened(screen, survey, log, descriptors)):
                writer.append(molecules)
            survey.check(log)
            groups = survey.all_groups()
            labels = self.split_labels(writer.count, groups)
            writer.set_split(labels)
        log.facts += [f"{name} is RDKit's {descriptor}" for name, descriptor in descriptors]
        counts = (f"{number:,} {what}" for what, number in (+log.counts).items())
        return PreprocessResult(
            output,
            self.samples,
            split_counts(output),
            "; ".join([survey.summary(), *log.facts, *counts]),
            tuple(log.skipped),
            log.skipped_count,
            (
                *log.notes,
                *screen.notes(),
                *survey.warnings(),
                *self.split_warnings(labels, groups),
            ),
        )

    def _descriptors(self) -> tuple[DescriptorProperty, ...]:
        """Those that `property` names; raises `InputError` where it names something else."""
        if not self.property:  # the import takes time
            return ()
        from molgen_energy.chemistry.rdkit_properties import parse_descriptors

        texts = (self.property,) if isinstance(self.property, str) else self.property
        return parse_descriptors(texts)

    def _screened(
        self,
        screen: Screen,
        survey: _Survey,
        log: DatasetLog,
        descriptors: tuple[DescriptorProperty, ...],
    ) -> Iterator[Molecules]:
        """The molecules to write, with RDKit's descriptors among their properties."""
        for chunk in self.chunks(log):
            screened = screen.apply(chunk, survey.source, log)
            parts = screened.parts(_JOINED) if descriptors else (screened,)
            for part in parts:
                molecules = part.molecules
                if descriptors:
                    from molgen_energy.chemistry.rdkit_properties import add_descriptors

                    molecules = add_descriptors(molecules, descriptors)
                survey.add(molecules)
                yield molecules


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

    def split_warnings(
        self, labels: NDArray[np.uint8], groups: NDArray[np.int64] | None
    ) -> Iterator[str]:
        """That the shares are far from those of `split`, since a large group stays together."""
        if groups is None or len(labels) < _FEW:
            return
        asked = np.array(parse_fractions(self.split))
        shares = np.bincount(labels, minlength=3) / len(labels)
        if np.abs(shares - asked).max() > _FAR:
            found, wanted = (", ".join(f"{100 * x:.0f}" for x in each) for each in (shares, asked))
            largest = int(np.unique(groups, return_counts=True)[1].max())
            yield (
                f"the split is {found} % instead of {wanted} %, since groups stay together, the "
                f"largest of {counted(largest, self.samples)}; another --seed may come nearer"
            )


@dataclass(frozen=True, kw_only=True)
class ScreenedDataset(RandomSplitDataset):
    """A dataset with options for what is done about bad and suspicious molecules."""

    remedies: ClassVar[Mapping[str, str]] = {
        "no_hydrogens": "add hydrogens, or leave such records out with --require-hydrogens",
        "few_hydrogens": "add hydrogens, or leave such records out with --require-hydrogens",
        "fragments": "--largest-fragment keeps the largest of each",
        "duplicates": "--drop-duplicates leaves them out",
    }
    """What to do about kinds of `molgen_energy.chemistry.anomalies`."""

    elements: str | None = option(None, "The elements that may occur, such as H,C,N,O,F.")
    skip_bad: bool = option(False, "Leave out broken records instead of stopping.")
    largest_fragment: bool = option(False, "Keep only the largest fragment of each record.")
    require_hydrogens: bool = option(False, "Leave out records that lack hydrogens.")
    drop_duplicates: bool = option(False, "Leave out exact copies of earlier records.")

    def check(self) -> None:
        """Raise `InputError` unless split, seed and elements can be used."""
        super().check()
        self.allowed_elements()

    def allowed_elements(self) -> NDArray[np.bool_]:
        """(256,): which atomic numbers may occur; raises `InputError` for other names."""
        return allowed_elements(self.elements)

    def screen(self) -> Screen:
        """As the options say."""
        return Screen(
            self.allowed_elements(),
            self.skip_bad,
            self.largest_fragment,
            self.require_hydrogens,
            self.drop_duplicates,
            self.remedies,
        )


def choose_properties(found: FieldSelection, names: str | None) -> FieldSelection:
    """The fields that `--properties` names, such as gap=eV,mu; None takes those that were found."""
    from molgen_energy.chemistry.fields import FieldSelection

    if names is None:
        return found
    chosen: dict[str, str] = {}
    for text in filter(None, map(str.strip, names.split(","))):
        name, _, unit = text.partition("=")
        chosen[name.strip()] = unit.strip() or found.known_units.get(name.strip(), "")
    return FieldSelection.of(chosen, found.group)


class _Survey:
    """What is found in the molecules of a dataset, in memory that grows with groups alone."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.count = 0
        self._elements = np.zeros(256, bool)
        self._fewest, self._most = 1 << 62, 0
        self._groups: list[NDArray[np.int64]] = []
        self._values: dict[str, int] = {}

    def add(self, molecules: Molecules) -> None:
        """Take in some molecules."""
        sizes = molecules.sizes
        self.count += len(molecules)
        self._elements[np.unique(molecules.atomic_numbers)] = True
        self._fewest = min(self._fewest, int(sizes.min(initial=self._fewest)))
        self._most = max(self._most, int(sizes.max(initial=0)))
        if molecules.groups is not None:
            self._groups.append(molecules.groups)
        for name, column in molecules.properties.items():
            present = int(np.isfinite(column.values).sum())
            self._values[name] = self._values.get(name, 0) + present

    def check(self, log: DatasetLog) -> None:
        """Raise `InputError` where there is no molecule, or a property without any value."""
        if not self.count:
            left = [f"{n:,} {what}" for what, n in (+log.counts).items()]
            if log.skipped_count:
                left.append(f"{log.skipped_count:,} bad, the first: {log.skipped[0]}")
            reason = f"usable molecule ({'; '.join(left)})" if left else "molecule"
            raise InputError(f"{self.source} holds no {reason}")
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
        fewest = "" if self._fewest == self._most else f"{self._fewest} to "
        text = f"{fewest}{counted(int(self._most), 'atoms')} of {elements}"
        if self._values:
            text += f"; properties {', '.join(self._values)}"
        if self._groups:
            text += f"; {counted(len(np.unique(np.concatenate(self._groups))), 'groups')}"
        return text

    def warnings(self) -> Iterator[str]:
        """What may be wrong."""
        for name, present in self._values.items():
            if present < self.count:
                missing = self.count - present
                yield f"property {name} is missing in {missing:,} of {self.count:,} molecules (NaN)"


def _joined(parts: Iterator[Molecules]) -> Iterator[Molecules]:
    """Small parts with the same columns as one, because writing each takes some milliseconds."""
    waiting: list[Molecules] = []
    for part in parts:
        count = sum(map(len, waiting)) + len(part)
        if waiting and (count > _JOINED or _columns(part) != _columns(waiting[0])):
            yield Molecules.concatenate(waiting)
            waiting = []
        waiting.append(part)
    if waiting:
        yield Molecules.concatenate(waiting)


def _columns(molecules: Molecules) -> tuple[bool, bool, bool, dict[str, str]]:
    optional = (molecules.bonds, molecules.formal_charges, molecules.groups)
    bonds, charges, groups = (column is None for column in optional)
    return bonds, charges, groups, dict(molecules.units)
