"""Results for a whole file, accumulated chunk by chunk in bounded memory.

Everything is a count, a histogram, or a random subset that is chosen by a hash of the record
numbers. So the results do not depend on how the file is divided into chunks.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.agreement import BondAgreement
from molgen_energy.chemistry.anomalies import AnomalyCounts
from molgen_energy.chemistry.descriptors import DESCRIPTORS
from molgen_energy.data.molecules import Molecule, MoleculeChunk, Molecules
from molgen_energy.metrics.checks.chunk import ChunkChecks, smiles_hashes
from molgen_energy.metrics.molecule_values import KeptMolecules, MoleculeValues, TypeValues
from molgen_energy.metrics.statistics import Clusters, Rate

MAX_VALUES = 20_000
"""Maximum number of lengths, angles or dihedrals of one type that are compared (JODO)."""
JACKKNIFE_GROUPS = 10
"""Number of groups of molecules for jackknife intervals."""
GALLERY_SIZE = 12
"""Number of molecules in each gallery of the HTML page: passing all checks, and failing some."""

_ELEMENTS = 119
_KEPT_RECORDS = 5


def hash_numbers(*parts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Pseudo-random 64 bits for each tuple of numbers (V,) (splitmix64: G. L. Steele et al.,
    OOPSLA 2014)."""
    state = np.zeros(np.broadcast_shapes(*(part.shape for part in parts)), np.uint64)
    for part in parts:
        state = (state ^ part.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


def jackknife_group(independent: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The jackknife group of each molecule (V,), below `JACKKNIFE_GROUPS`.

    Molecules of one number of `MoleculeChunk.independent`, such as conformers, stand in one group.
    """
    return (hash_numbers(independent) % np.uint64(JACKKNIFE_GROUPS)).astype(np.uint8)


class ValueSample:
    """A random subset of at most `MAX_VALUES` numbers, each with its molecule's jackknife group."""

    def __init__(self) -> None:
        self.count = 0
        """Number of all values, in the subset or not."""
        self._value: list[NDArray[np.float32]] = []
        self._key: list[NDArray[np.uint64]] = []
        self._group: list[NDArray[np.uint8]] = []

    def add(
        self, value: NDArray[np.float32], key: NDArray[np.uint64], group: NDArray[np.uint8]
    ) -> None:
        """Add numbers (V,) with random keys and groups; the smallest keys stay in the subset."""
        self.count += len(value)
        self._value.append(value)
        self._key.append(key)
        self._group.append(group)
        if sum(map(len, self._value)) > 2 * MAX_VALUES:
            self._shrink()

    @classmethod
    def of(cls, value: NDArray[np.float32], group: NDArray[np.uint8], count: int) -> ValueSample:
        """A stored subset of `count` values with the group of each."""
        sample = cls()
        sample.add(value, np.arange(len(value), dtype=np.uint64), group)
        sample.count = count
        return sample

    def select(self, included: NDArray[np.bool_]) -> ValueSample:
        """The part of the subset whose group is included, (groups,)."""
        value, group = self.value, self.group
        kept = included[group]
        return ValueSample.of(value[kept], group[kept], int(kept.sum()))

    def _shrink(self) -> None:
        key = np.concatenate(self._key)
        chosen = np.argsort(key, kind="stable")[:MAX_VALUES]
        self._key = [key[chosen]]
        self._value = [np.concatenate(self._value)[chosen]]
        self._group = [np.concatenate(self._group)[chosen]]

    @property
    def value(self) -> NDArray[np.float32]:
        """The subset, (V,), in the order of the keys."""
        if not self._value:
            return np.zeros(0, np.float32)
        self._shrink()
        return self._value[0]

    @property
    def group(self) -> NDArray[np.uint8]:
        """The group of each value, (V,)."""
        if not self._group:
            return np.zeros(0, np.uint8)
        self._shrink()
        return self._group[0]


GeometrySamples = dict[str, dict[int, ValueSample]]
"""Samples by kind and by the code of the type (`molgen_energy.chemistry.geometry.code_of`)."""


class DistinctHashes:
    """The set of hashes of SMILES, 8 bytes each."""

    _MAX_PENDING = 1 << 18

    def __init__(self) -> None:
        self._sorted = np.zeros(0, np.uint64)
        self._pending: list[NDArray[np.uint64]] = []

    def add(self, smiles: list[str | None]) -> None:
        """Add SMILES; None is ignored."""
        self._pending.append(smiles_hashes(text for text in smiles if text is not None))
        if sum(map(len, self._pending)) > self._MAX_PENDING:
            self._merge()

    def _merge(self) -> None:
        if self._pending:
            self._sorted = np.unique(np.concatenate([self._sorted, *self._pending]))
            self._pending = []

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """The distinct hashes, sorted."""
        self._merge()
        return self._sorted


class SelectedMolecule(NamedTuple):
    """A molecule of a random subset, with the bonds that were checked."""

    record: int
    molecule: Molecule
    failure_reasons: tuple[str, ...] = ()
    smiles: str | None = None
    unstable_atoms: tuple[int, ...] = ()


Describe = Callable[[int, SelectedMolecule], SelectedMolecule]
"""Adds failure reasons, SMILES and unstable atoms to molecule k of a chunk."""


class RandomSubset:
    """A random subset of at most `size` molecules: those whose records have the smallest hashes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[int, int, Molecules, int, SelectedMolecule | None]] = []
        """Rank and record of each, where its molecule is, and what was described of it."""

    def add(
        self, chunk: MoleculeChunk, mask: NDArray[np.bool_], describe: Describe | None = None
    ) -> None:
        """Add the molecules of a chunk where the mask (M,) is set."""
        if not self._size:
            return
        key = hash_numbers(chunk.records)
        if len(self._heap) == self._size:
            mask = mask & (key < np.uint64(-self._heap[0][0]))
        candidates = np.flatnonzero(mask)
        if len(candidates) > self._size:
            nearest = np.argsort(key[candidates], kind="stable")[: self._size]
            candidates = candidates[nearest]
        if not len(candidates):
            return
        kept = chunk.molecules.select(candidates)  # a view would keep the whole chunk in memory
        ranks, records = key[candidates].tolist(), chunk.records[candidates].tolist()
        for place, (k, rank, record) in enumerate(
            zip(candidates.tolist(), ranks, records, strict=True)
        ):
            described = None
            if describe is not None:
                described = describe(k, SelectedMolecule(record, kept[place]))
            heapq.heappush(self._heap, (-rank, record, kept, place, described))
            if len(self._heap) > self._size:
                heapq.heappop(self._heap)

    def __iter__(self) -> Iterator[SelectedMolecule]:
        for _, record, molecules, place, described in sorted(self._heap, key=lambda one: -one[0]):
            yield described or SelectedMolecule(record, molecules[place])

    def __len__(self) -> int:
        return len(self._heap)


class WorstRecord(NamedTuple):
    """A record that fails a check by a large amount."""

    record: int
    amount: float
    what: str


@dataclass
class Counts:
    """Counts of molecules and atoms."""

    molecules: int = 0
    stable_molecules: int = 0
    unstable_atoms: Clusters = field(default_factory=Clusters)
    valid: int = 0
    connected: int = 0
    complete: int = 0
    hydrogens_missing: int = 0
    passes_all: int = 0
    distinct: int = 0
    novel: int | None = None
    timed_out: int = 0
    without_geometry: int = 0

    def rates(self) -> dict[str, Rate | None]:
        """All rates by key; None where not applicable."""
        total = self.molecules

        def novel(total: int) -> Rate | None:
            return None if self.novel is None else Rate(self.novel, total)

        return {
            "molecule_stability": Rate(self.stable_molecules, total),
            "atom_stability": self.unstable_atoms.unmarked(),
            "validity": Rate(self.valid, total),
            "uniqueness": Rate(self.distinct, self.valid),
            "novelty": novel(self.distinct),
            "connected": Rate(self.connected, total),
            "complete": Rate(self.complete, total),
            "valid_unique": Rate(self.distinct, total),
            "valid_unique_novel": novel(total),
            "hydrogens_assumed": Rate(self.hydrogens_missing, total),
            "good": Rate(self.passes_all, total),
        }


@dataclass
class AgreementCounts:
    """Counts of molecules and bonds on which given and perceived bonds agree."""

    molecules: int = 0
    same_bonds: int = 0
    same_connectivity: int = 0
    both: Clusters = field(default_factory=Clusters)
    """Given bonds, of which those that perception finds too are marked."""
    both_perceived: Clusters = field(default_factory=Clusters)
    """Perceived bonds, of which those that are given too are marked."""

    def add(self, found: BondAgreement) -> None:
        """Add the molecules of a chunk."""
        self.molecules += len(found.same_bonds)
        self.same_bonds += int(found.same_bonds.sum())
        self.same_connectivity += int(found.same_connectivity.sum())
        self.both.add(found.bonds - found.only, found.bonds)
        self.both_perceived.add(found.other_bonds - found.other_only, found.other_bonds)

    def rates(self) -> dict[str, Rate | None]:
        """All rates by key."""
        return {
            "same_bonds": Rate(self.same_bonds, self.molecules),
            "same_connectivity": Rate(self.same_connectivity, self.molecules),
            "bonds_only_given": self.both.unmarked(),
            "bonds_only_perceived": self.both_perceived.unmarked(),
        }


@dataclass
class EvaluationAccumulator:
    """Accumulates the checks of all chunks of a file.

    Parameters
    ----------
    subset
        Number of random molecules to keep for the slow metrics.
    kept
        Number of random molecules whose values are kept, to draw sets from real molecules.
    """

    subset: int = 1000
    kept: int = 0
    counts: Counts = field(default_factory=Counts)
    agreement: AgreementCounts = field(default_factory=AgreementCounts)
    """Of given and perceived bonds, where both were found."""
    smiles: DistinctHashes = field(default_factory=DistinctHashes)
    geometry: GeometrySamples = field(default_factory=dict)
    sizes: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros((JACKKNIFE_GROUPS, 1), np.int64)
    )
    """Histogram of numbers of atoms, (groups, S)."""
    elements: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros((JACKKNIFE_GROUPS, _ELEMENTS), np.int64)
    )
    """Histogram of atomic numbers, (groups, 119)."""
    descriptors: dict[str, ValueSample] = field(default_factory=dict)
    """By key; only those that were computed."""
    descriptor_counts: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros((JACKKNIFE_GROUPS, len(DESCRIPTORS)), np.int64)
    )
    """Number of molecules with each descriptor, (groups, D)."""
    descriptor_sums: NDArray[np.float64] = field(
        default_factory=lambda: np.zeros((JACKKNIFE_GROUPS, len(DESCRIPTORS)))
    )
    """Sums of their descriptors, (groups, D)."""
    unstable_valences: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Number of unstable atoms by element with charge and sum of bond orders."""
    invalid_reasons: Counter[str] = field(default_factory=Counter)
    first_records: dict[str, int] = field(default_factory=dict)
    """The first record with each reason."""
    anomalies: AnomalyCounts = field(default_factory=AnomalyCounts)
    timed_out: list[WorstRecord] = field(default_factory=list)
    most_unstable: list[WorstRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random_molecules = RandomSubset(self.subset)
        self.random_complete = RandomSubset(self.subset)
        self.kept_molecules = KeptMolecules(self.kept)
        self.gallery_passing = RandomSubset(GALLERY_SIZE)
        self._gallery_failing: dict[str, RandomSubset] = {}

    def add(self, checks: ChunkChecks) -> None:
        """Add the checks of one chunk."""
        chunk, counts = checks.chunk, self.counts
        molecules = chunk.molecules
        counts.molecules += len(chunk)
        counts.stable_molecules += int((checks.unstable_atoms == 0).sum())
        counts.unstable_atoms.add(checks.unstable_atoms, molecules.sizes)
        counts.valid += int(checks.valid.sum())
        counts.connected += int((checks.fragments == 1).sum())
        counts.complete += int(checks.complete.sum())
        counts.hydrogens_missing += int(checks.hydrogens_missing.sum())
        counts.passes_all += int(checks.passes_all.sum())
        counts.timed_out += int(checks.timed_out.sum())
        counts.without_geometry += checks.without_geometry
        if checks.agreement is not None:
            self.agreement.add(checks.agreement)
        self.anomalies.add(molecules, chunk.records, found=checks.anomalies)
        self.smiles.add(checks.smiles)
        self._add_composition(chunk)
        self.unstable_valences.update(checks.unstable_valences)
        self._add_failures(checks)
        self.add_geometry(checks)
        self._add_descriptors(checks)
        if self.kept:
            self.kept_molecules.add(_values_of(checks))
        self._add_to_subsets(checks)

    def _add_composition(self, chunk: MoleculeChunk) -> None:
        molecules, group = chunk.molecules, jackknife_group(chunk.independent)
        longest = max(self.sizes.shape[1], int(molecules.sizes.max()) + 1)
        self.sizes = np.pad(self.sizes, ((0, 0), (0, longest - self.sizes.shape[1])))
        np.add.at(self.sizes, (group, molecules.sizes), 1)
        np.add.at(self.elements, (group[molecules.molecule_index], molecules.atomic_numbers), 1)

    def _add_failures(self, checks: ChunkChecks) -> None:
        records = checks.chunk.records.tolist()
        for record, reason in zip(records, checks.invalid_reasons, strict=True):
            if reason:
                general = without_atom_numbers(reason)
                self.invalid_reasons[general] += 1
                self.first_records[general] = min(record, self.first_records.get(general, record))
        for k in np.flatnonzero(checks.timed_out).tolist():
            if len(self.timed_out) < _KEPT_RECORDS:
                self.timed_out.append(WorstRecord(records[k], 0.0, checks.invalid_reasons[k]))
        counts = zip(
            records,
            checks.unstable_atoms.tolist(),
            checks.chunk.molecules.sizes.tolist(),
            strict=True,
        )
        candidates = [
            WorstRecord(record, unstable / size, f"{unstable} of {size} atoms unstable")
            for record, unstable, size in counts
            if unstable > 0
        ]
        self.most_unstable = heapq.nsmallest(
            _KEPT_RECORDS, self.most_unstable + candidates, key=lambda w: (-w.amount, w.record)
        )

    def add_geometry(self, checks: ChunkChecks) -> None:
        """Add the lengths, angles and dihedrals of one chunk only."""
        for kind, values in checks.geometry.items():
            by_type = self.geometry.setdefault(kind, {})
            group = jackknife_group(values.independent)
            key = hash_numbers(values.record, values.code, values.position)
            codes, starts = np.unique(values.code, return_index=True)
            stops = np.append(starts, len(values.code))[1:]
            for code, start, stop in zip(
                codes.tolist(), starts.tolist(), stops.tolist(), strict=True
            ):
                sample = by_type.setdefault(code, ValueSample())
                part = slice(start, stop)
                sample.add(values.value[part], key[part], group[part])

    def _add_descriptors(self, checks: ChunkChecks) -> None:
        values = checks.descriptors
        known = np.isfinite(values)
        if not known.any():
            return
        key, group = hash_numbers(checks.chunk.records), jackknife_group(checks.chunk.independent)
        np.add.at(self.descriptor_counts, group, known)
        np.add.at(self.descriptor_sums, group, np.where(known, values, 0))
        for name, value, has in zip(DESCRIPTORS, values.T, known.T, strict=True):
            if has.any():
                sample = self.descriptors.setdefault(name, ValueSample())
                sample.add(value[has], key[has], group[has])

    def _add_to_subsets(self, checks: ChunkChecks) -> None:
        chunk, molecules = checks.chunk, checks.chunk.molecules
        self.random_molecules.add(chunk, np.ones(len(chunk), bool))
        self.random_complete.add(chunk, checks.complete)

        def describe(k: int, selected: SelectedMolecule) -> SelectedMolecule:
            atoms = slice(molecules.offsets[k], molecules.offsets[k + 1])
            return selected._replace(
                failure_reasons=failure_reasons(checks, k),
                smiles=checks.smiles[k],
                unstable_atoms=tuple(np.flatnonzero(checks.unstable[atoms]).tolist()),
            )

        self.gallery_passing.add(chunk, checks.passes_all, describe)
        failing = np.flatnonzero(~checks.passes_all)
        category = np.array([_failure_category(checks, k) for k in failing.tolist()])
        for name in np.unique(category).tolist():
            mask = np.zeros(len(chunk), bool)
            mask[failing[category == name]] = True
            subset = self._gallery_failing.setdefault(name, RandomSubset(GALLERY_SIZE))
            subset.add(chunk, mask, describe)

    def gallery_failing(self) -> list[SelectedMolecule]:
        """Random molecules that fail a check, alternating between the categories of failure."""
        rows = [list(subset) for _, subset in sorted(self._gallery_failing.items())]
        alternating = [row[k] for k in range(GALLERY_SIZE) for row in rows if k < len(row)]
        return alternating[:GALLERY_SIZE]


def _values_of(checks: ChunkChecks) -> MoleculeValues:
    """What distances are computed from, for the molecules of a chunk."""
    records = checks.chunk.records
    order = np.argsort(records)
    geometry: dict[str, dict[int, TypeValues]] = {}
    for kind, values in checks.geometry.items():
        molecule = order[np.searchsorted(records, values.record, sorter=order)]
        geometry[kind] = {
            code: TypeValues(values.value[values.code == code], molecule[values.code == code])
            for code in np.unique(values.code).tolist()
        }
    independent = hash_numbers(checks.chunk.independent)
    return MoleculeValues.of(
        checks.chunk.molecules, hash_numbers(records), independent, geometry, checks.descriptors
    )


def _failure_category(checks: ChunkChecks, k: int) -> str:
    if checks.timed_out[k]:
        return "timed out"
    if not checks.valid[k]:
        return "invalid"
    if checks.fragments[k] > 1:
        return "fragmented"
    return "unstable" if checks.unstable_atoms[k] else "missing hydrogens"


def failure_reasons(checks: ChunkChecks, k: int) -> tuple[str, ...]:
    """Descriptions of all checks that molecule k of a chunk fails."""
    size = int(checks.chunk.molecules.sizes[k])
    unstable = checks.unstable_atoms[k]
    reasons = []
    if not checks.valid[k]:
        reasons.append(f"invalid: {checks.invalid_reasons[k]}")
    if unstable:
        reasons.append(f"{unstable} of {size} atoms unstable")
    if checks.fragments[k] > 1:
        reasons.append(f"{checks.fragments[k]} fragments")
    if checks.hydrogens_missing[k]:
        reasons.append("missing hydrogens or radical electrons")
    return tuple(reasons)


def without_atom_numbers(reason: str) -> str:
    """RDKit's error message without atom numbers, to count equal errors together."""
    match = re.match(r"Explicit valence for atom # \d+ (\w+), (\d+), is greater", reason)
    if match:
        return f"{match[1]} with valence {match[2]}"
    if reason.startswith("Can't kekulize"):
        return "cannot be Kekulised"
    return re.sub(r"\s+", " ", re.sub(r"# ?\d+", "# N", reason))[:80]
