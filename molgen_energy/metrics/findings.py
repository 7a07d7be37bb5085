"""What is known of a whole file, gathered piece by piece in memory that does not grow with it.

Everything kept is a count, a histogram, or a random sample whose members are chosen by a hash of
their record number: the same file gives the same findings however it is cut up.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import Molecule, MoleculeChunk
from molgen_energy.metrics.judging import ChunkChecks, name_hash
from molgen_energy.metrics.rates import Clusters, Rate

MOST_VALUES = 20_000
"""Lengths, angles or dihedrals of one type that are compared at most (JODO)."""
GROUPS = 10
"""Groups of molecules for intervals by the jackknife."""
SHOWN = 12
"""Good molecules, and bad ones, that the report shows."""

_ELEMENTS = 119
_WORST = 5


def keys(*parts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Random-looking 64 bits for each tuple of numbers (V,) (splitmix64: G. L. Steele et al.,
    OOPSLA 2014)."""
    state = np.zeros(np.broadcast_shapes(*(part.shape for part in parts)), np.uint64)
    for part in parts:
        state = (state ^ part.astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


def groups(records: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The group that each molecule (V,) belongs to, below `GROUPS`."""
    return (keys(records) % np.uint64(GROUPS)).astype(np.uint8)


class Values:
    """A random sample of at most `MOST_VALUES` numbers, with the group of each one's molecule."""

    def __init__(self) -> None:
        self.count = 0
        self._value: list[NDArray[np.float32]] = []
        self._key: list[NDArray[np.uint64]] = []
        self._group: list[NDArray[np.uint8]] = []

    def add(
        self, value: NDArray[np.float32], key: NDArray[np.uint64], group: NDArray[np.uint8]
    ) -> None:
        """Numbers (V,) with their keys and groups."""
        self.count += len(value)
        self._value.append(value)
        self._key.append(key)
        self._group.append(group)
        if sum(map(len, self._value)) > 2 * MOST_VALUES:
            self._shrink()

    @classmethod
    def of(cls, value: NDArray[np.float32], count: int) -> Values:
        """A sample of `count` numbers that was drawn before; its groups are forgotten."""
        values = cls()
        values.add(value, np.arange(len(value), dtype=np.uint64), np.zeros(len(value), np.uint8))
        values.count = count
        return values

    def _shrink(self) -> None:
        key = np.concatenate(self._key)
        chosen = np.argsort(key, kind="stable")[:MOST_VALUES]
        self._key = [key[chosen]]
        self._value = [np.concatenate(self._value)[chosen]]
        self._group = [np.concatenate(self._group)[chosen]]

    @property
    def value(self) -> NDArray[np.float32]:
        """The sample, in the order of its keys."""
        if not self._value:
            return np.zeros(0, np.float32)
        self._shrink()
        return self._value[0]

    @property
    def group(self) -> NDArray[np.uint8]:
        """The group of each, below `GROUPS`."""
        if not self._group:
            return np.zeros(0, np.uint8)
        self._shrink()
        return self._group[0]


Geometry = dict[str, dict[int, Values]]
"""Samples by kind and by the number of the type (`molgen_energy.chemistry.geometry.code_of`)."""


class Distinct:
    """Different names, as 64 bits each."""

    _PENDING = 1 << 18

    def __init__(self) -> None:
        self._sorted = np.zeros(0, np.uint64)
        self._new: list[int] = []

    def add(self, names: list[str | None]) -> None:
        """Names; None is passed over."""
        self._new.extend(name_hash(name) for name in names if name is not None)
        if len(self._new) > self._PENDING:
            self._merge()

    def _merge(self) -> None:
        if self._new:
            new = np.array(self._new, np.uint64)
            self._sorted = np.unique(np.concatenate([self._sorted, new]))
            self._new = []

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """All of them, sorted."""
        self._merge()
        return self._sorted


class Specimen(NamedTuple):
    """One molecule by its record, with the bonds that were judged, and why it was picked."""

    record: int
    molecule: Molecule
    reasons: tuple[str, ...] = ()
    name: str | None = None


class Draw:
    """A random sample of specimens: those with the smallest keys."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._heap: list[tuple[int, int, Specimen]] = []

    def offer(
        self, piece: MoleculeChunk, which: NDArray[np.bool_], describe: Describe | None
    ) -> None:
        """Some molecules of a piece."""
        key = keys(piece.records)
        chosen = np.flatnonzero(which)
        if len(chosen) > self._most:
            chosen = chosen[np.argsort(key[chosen], kind="stable")[: self._most]]
        for k in chosen.tolist():
            rank = -int(key[k])
            if len(self._heap) == self._most and rank <= self._heap[0][0]:
                continue
            record = int(piece.records[k])
            specimen = Specimen(record, _copied(piece.molecules[k]))
            if describe is not None:
                specimen = describe(k, specimen)
            heapq.heappush(self._heap, (rank, record, specimen))
            if len(self._heap) > self._most:
                heapq.heappop(self._heap)

    def __iter__(self) -> Iterator[Specimen]:
        return (item[2] for item in sorted(self._heap, key=lambda item: -item[0]))

    def __len__(self) -> int:
        return len(self._heap)


Describe = Callable[[int, Specimen], Specimen]


class Worst(NamedTuple):
    """A molecule that stands out, and by what."""

    record: int
    amount: float
    what: str


@dataclass
class Counts:
    """Molecules and atoms, counted."""

    molecules: int = 0
    stable_molecules: int = 0
    unstable_atoms: Clusters = field(default_factory=Clusters)
    valid: int = 0
    connected: int = 0
    complete: int = 0
    hydrogens_added: int = 0
    good: int = 0
    distinct: int = 0
    novel: int | None = None
    timed_out: int = 0
    crowded: int = 0
    carried_bonds: int = 0
    carrying: int = 0
    carried_stable_molecules: int = 0
    carried_unstable_atoms: Clusters = field(default_factory=Clusters)
    carried_valid: int = 0
    carried_complete: int = 0

    def rates(self) -> dict[str, Rate | None]:
        """All rates; None where they do not apply."""
        everyone = self.molecules
        carried = self.carried_bonds > 0

        def novel(total: int) -> Rate | None:
            return None if self.novel is None else Rate(self.novel, total)

        def own(count: int) -> Rate | None:
            return Rate(count, self.carrying) if carried else None

        return {
            "molecule_stability": Rate(self.stable_molecules, everyone),
            "atom_stability": self.unstable_atoms.unmarked(),
            "validity": Rate(self.valid, everyone),
            "uniqueness": Rate(self.distinct, self.valid),
            "novelty": novel(self.distinct),
            "connected": Rate(self.connected, everyone),
            "complete": Rate(self.complete, everyone),
            "valid_unique": Rate(self.distinct, everyone),
            "valid_unique_novel": novel(everyone),
            "hydrogens_assumed": Rate(self.hydrogens_added, everyone),
            "good": Rate(self.good, everyone),
            "carried_molecule_stability": own(self.carried_stable_molecules),
            "carried_atom_stability": self.carried_unstable_atoms.unmarked() if carried else None,
            "carried_validity": own(self.carried_valid),
            "carried_complete": own(self.carried_complete),
        }


@dataclass
class EvaluationAccumulator:
    """Everything gathered of one file.

    Parameters
    ----------
    drawn
        How many molecules to keep for the metrics that are too slow for all of them.
    """

    drawn: int = 1000
    counts: Counts = field(default_factory=Counts)
    names: Distinct = field(default_factory=Distinct)
    geometry: Geometry = field(default_factory=dict)
    sizes: NDArray[np.int64] = field(default_factory=lambda: np.zeros((GROUPS, 1), np.int64))
    elements: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros((GROUPS, _ELEMENTS), np.int64)
    )
    faults: Counter[tuple[str, int]] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, int] = field(default_factory=dict)
    timed_out: list[Worst] = field(default_factory=list)
    worst: list[Worst] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.any = Draw(self.drawn)
        self.whole = Draw(self.drawn)
        self.shown_good = Draw(SHOWN)
        self.shown_bad: dict[str, Draw] = {}

    def add(self, found: ChunkChecks) -> None:
        """Count one piece."""
        piece, counts = found.piece, self.counts
        molecules = piece.molecules
        stable = found.unstable_atoms == 0
        counts.molecules += len(piece)
        counts.stable_molecules += int(stable.sum())
        counts.unstable_atoms.add(found.unstable_atoms, molecules.sizes)
        counts.valid += int(found.valid.sum())
        counts.connected += int((found.fragments == 1).sum())
        counts.complete += int(found.complete.sum())
        counts.hydrogens_added += int(found.hydrogens_added.sum())
        counts.good += int(found.good.sum())
        counts.timed_out += int(found.timed_out.sum())
        counts.crowded += found.crowded
        if found.carried is not None:
            own = found.carried
            counts.carried_bonds += own.bonds
            counts.carrying += len(piece)
            counts.carried_stable_molecules += int((own.unstable_atoms == 0).sum())
            counts.carried_unstable_atoms.add(own.unstable_atoms, molecules.sizes)
            counts.carried_valid += int(own.valid.sum())
            counts.carried_complete += int((own.valid & own.connected).sum())
        self.names.add(found.names)
        group = groups(piece.records)
        longest = max(self.sizes.shape[1], int(molecules.sizes.max()) + 1)
        self.sizes = np.pad(self.sizes, ((0, 0), (0, longest - self.sizes.shape[1])))
        np.add.at(self.sizes, (group, molecules.sizes), 1)
        np.add.at(self.elements, (group[molecules.molecule_index], molecules.atomic_numbers), 1)
        self.faults.update(found.faults)
        self._add_reasons(found)
        self.add_geometry(found)
        self._add_draws(found)

    def _add_reasons(self, found: ChunkChecks) -> None:
        for record, reason in zip(found.piece.records.tolist(), found.reasons, strict=True):
            if reason:
                general = generalised(reason)
                self.reasons[general] += 1
                self.examples[general] = min(record, self.examples.get(general, record))
        for k in np.flatnonzero(found.timed_out).tolist():
            if len(self.timed_out) < _WORST:
                self.timed_out.append(Worst(int(found.piece.records[k]), 0.0, found.reasons[k]))
        sizes = found.piece.molecules.sizes
        candidates = [
            Worst(int(r), u / n, f"{u} of {n} atoms unstable")
            for r, u, n in zip(
                *(x.tolist() for x in (found.piece.records, found.unstable_atoms, sizes)),
                strict=True,
            )
            if u > 0
        ]
        self.worst = heapq.nsmallest(
            _WORST, self.worst + candidates, key=lambda w: (-w.amount, w.record)
        )

    def add_geometry(self, found: ChunkChecks) -> None:
        for kind, instances in found.geometry.items():
            by_type = self.geometry.setdefault(kind, {})
            group = groups(instances.record)
            key = keys(instances.record, instances.code, instances.turn)
            codes, starts = np.unique(instances.code, return_index=True)
            stops = np.append(starts, len(instances.code))[1:]
            for code, start, stop in zip(
                codes.tolist(), starts.tolist(), stops.tolist(), strict=True
            ):
                values = by_type.setdefault(code, Values())
                part = slice(start, stop)
                values.add(instances.value[part], key[part], group[part])

    def _add_draws(self, found: ChunkChecks) -> None:
        piece = found.piece
        self.any.offer(piece, np.ones(len(piece), bool), None)
        self.whole.offer(piece, found.complete & ~found.hydrogens_added, None)

        def described(k: int, specimen: Specimen) -> Specimen:
            return specimen._replace(reasons=failure_reasons(found, k), name=found.names[k])

        self.shown_good.offer(piece, found.good, described)
        bad = np.flatnonzero(~found.good)
        category = np.array([_category(found, k) for k in bad.tolist()])
        for name in np.unique(category).tolist():
            marked = np.zeros(len(piece), bool)
            marked[bad[category == name]] = True
            self.shown_bad.setdefault(name, Draw(SHOWN)).offer(piece, marked, described)

    def bad_specimens(self) -> list[Specimen]:
        """Molecules at fault, each kind of fault in turn."""
        rows = [list(draw) for _, draw in sorted(self.shown_bad.items())]
        turns = [row[k] for k in range(SHOWN) for row in rows if k < len(row)]
        return turns[:SHOWN]


def _copied(molecule: Molecule) -> Molecule:
    """Without the rest of the piece, which views would keep in memory."""
    columns = vars(molecule).items()
    arrays: dict[str, Any] = {k: v.copy() for k, v in columns if isinstance(v, np.ndarray)}
    return replace(molecule, **arrays)


def _category(found: ChunkChecks, k: int) -> str:
    if found.timed_out[k]:
        return "given up"
    if not found.valid[k]:
        return "invalid"
    if found.fragments[k] > 1:
        return "in pieces"
    return "unstable" if found.faulty_atoms[k] else "hydrogens missing"


def failure_reasons(found: ChunkChecks, k: int) -> tuple[str, ...]:
    """All that is wrong with molecule k of a piece, in words."""
    size = int(found.piece.molecules.sizes[k])
    said = []
    if not found.valid[k]:
        said.append(f"invalid: {found.reasons[k]}")
    if found.faulty_atoms[k]:
        said.append(f"{found.faulty_atoms[k]} of {size} atoms unstable")
    if found.fragments[k] > 1:
        said.append(f"{found.fragments[k]} fragments")
    if found.hydrogens_added[k]:
        said.append("hydrogens missing, or unpaired electrons")
    return tuple(said)


def generalised(reason: str) -> str:
    """RDKit's complaint without the number of the atom, so that like ones are counted together."""
    match = re.match(r"Explicit valence for atom # \d+ (\w+), (\d+), is greater", reason)
    if match:
        return f"{match[1]} with valence {match[2]}"
    if reason.startswith("Can't kekulize"):
        return "cannot be Kekulised"
    return re.sub(r"\s+", " ", re.sub(r"# ?\d+", "# N", reason))[:80]
