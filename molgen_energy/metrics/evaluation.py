"""Judge a file of molecules by the field's protocols.

EDM's protocol (Hoogeboom et al., ICML 2022): bonds are perceived from distances. An atom is stable
when its bond orders add up to an allowed valence, a molecule when all its atoms are. A molecule is
valid when RDKit sanitises it whole, and is named by the canonical SMILES of its largest fragment.
Bonds that a file carries are judged beside that, and geometry by JODO's protocol.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.geometry import GeometryTypes, code_of
from molgen_energy.chemistry.rdkit import CROWD
from molgen_energy.chemistry.valence import has_valence
from molgen_energy.data.molecules import MoleculeChunk, Molecules
from molgen_energy.elements import symbol
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.metrics.comparison import Comparison, Distributions, Measure
from molgen_energy.metrics.fcd import ChemNet, Moments
from molgen_energy.metrics.findings import Distinct, Draw, EvaluationAccumulator, Worst
from molgen_energy.metrics.judging import (
    ChunkChecks,
    Settings,
    judge_piece,
    judge_without_rdkit,
    name_hash,
)
from molgen_energy.metrics.plausibility import bust, given_up
from molgen_energy.metrics.rates import Rate, median_interval
from molgen_energy.metrics.relaxation import Relaxed, not_relaxed, relax_mmff, relax_xtb
from molgen_energy.workers import Workers

METRIC_GROUPS = ("rates", "geometry", "composition", "strain", "fcd", "posebusters", "xtb")
"""What `--metrics` chooses from; rates are always there."""
DEFAULT_METRICS = frozenset({"rates", "geometry", "composition", "strain"})
EXTRAS = {"fcd": ("fcd",), "posebusters": ("posebusters",), "xtb": ("tblite", "ase")}
"""Packages that metrics of the same name need; the extras of this package are called so too."""

BONDS = {
    "perceived": "perceived from distances",
    "single": "perceived from distances, all taken as single",
    "given": "given in the file",
}
"""What a report calls the choices of bonds."""

_SLOW_PIECE = 10
# xTB takes a second for a molecule of QM9: it looks at a tenth of the others' share.
_XTB_SHARE = 10
_WORST = 3


@dataclass(frozen=True)
class Options:
    """How files are evaluated.

    Parameters
    ----------
    metrics
        Some of `METRIC_GROUPS`.
    settings
        How each molecule is judged.
    drawn
        How many molecules the slow metrics look at (strain, PoseBusters; xTB at a tenth of them).
    skip_bad
        Leave out molecules with an element that no valence is known for, rather than raise.
    """

    metrics: frozenset[str] = DEFAULT_METRICS
    settings: Settings = field(default_factory=Settings)
    drawn: int = 1000
    skip_bad: bool = False

    @property
    def usable(self) -> frozenset[str]:
        """The metrics that are wanted and whose packages are installed."""
        return frozenset(name for name in self.metrics if not lacking(name))


def parse_metrics(text: str) -> frozenset[str]:
    """Metrics named with commas, or `all`; rates are always among them.

    Raises
    ------
    InputError
        There is no such metric.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if "all" in names:
        return frozenset(METRIC_GROUPS)
    for name in names:
        if name not in METRIC_GROUPS:
            raise InputError(unknown_name("metric", name, [*METRIC_GROUPS, "all"]))
    return frozenset(names) | {"rates"}


def lacking(metric: str) -> bool:
    """Whether a package is not installed that the metric needs."""
    return any(importlib.util.find_spec(name) is None for name in EXTRAS.get(metric, ()))


def how_to_get(metric: str) -> str:
    """What to type for a metric whose package is not installed."""
    return f"pip install 'molgen-energy[{metric}]'"


def settings_for(types: GeometryTypes | None, options: Options) -> Settings:
    """The settings with the types of geometry that are to be collected."""
    codes: dict[str, tuple[int, ...]] = {}
    if types is not None:
        codes = {k: tuple(code_of(k, name) for name in names) for k, names in types.types.items()}
    whole = "fcd" in options.usable
    return replace(options.settings, codes=codes, whole_names=whole)


class Source(Protocol):
    """Molecules that come in pieces, and what is known of them."""

    def pieces(self) -> Iterator[MoleculeChunk]:
        """The molecules in pieces, one in memory at a time."""
        ...


@dataclass
class Evaluation:
    """What was found of one set of molecules: rates by key, None where they do not apply."""

    name: str
    molecules: int
    rates: dict[str, Rate | None]
    measures: dict[str, Measure] = field(default_factory=dict)
    distributions: Distributions | None = None
    findings: EvaluationAccumulator = field(default_factory=EvaluationAccumulator)
    comparison: Comparison = field(default_factory=Comparison)
    bonds: str = "perceived from distances"
    skipped: int = 0
    notes: list[str] = field(default_factory=list)
    worst: list[Worst] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)
    failed_checks: Counter[str] = field(default_factory=Counter)


Progress = Callable[[int], None]


def evaluate(
    name: str,
    source: Source,
    options: Options,
    known: NDArray[np.uint64] | None,
    workers: Workers,
    progress: Progress = lambda _: None,
) -> Evaluation:
    """Judge the molecules of a file.

    Parameters
    ----------
    name
        What the molecules are called in the report and in errors.
    source
        The molecules; a few pieces are in memory at a time.
    options
        What is looked at, with the types of geometry filled in (`settings_for`).
    known
        Sorted hashes of the training molecules' SMILES, by the same bonds; None leaves novelty
        open.
    workers
        Processes that RDKit's part is done in.
    progress
        Told of molecules that are done.

    Raises
    ------
    InputError
        A molecule holds an element that the table of valences lacks, and bad records are not to
        be skipped; or the given bonds are to be judged and there are none.
    """
    findings = EvaluationAccumulator(options.drawn)
    left_out = _LeftOut(name, options)
    net = ChemNet() if "fcd" in options.usable else None
    settings = options.settings
    for piece, found in judgements(left_out.without(source.pieces()), settings, workers):
        findings.add(found)
        if net is not None:
            net.add(found.whole_names)
        progress(len(piece))
    if settings.bonds == "given" and not findings.counts.carried_bonds:
        raise InputError(f"{name} carries no bonds; leave out --bonds given")
    counts = findings.counts
    hashes = findings.names.hashes
    counts.distinct = len(hashes)
    if known is not None:
        counts.novel = int((~np.isin(hashes, known, assume_unique=True)).sum())
    moments: Moments | None = None if net is None else net.finish()
    evaluation = Evaluation(
        name,
        counts.molecules,
        counts.rates(),
        findings=findings,
        distributions=Distributions.of(findings, moments),
        skipped=left_out.count,
        bonds=BONDS[settings.bonds],
    )
    if counts.crowded and "geometry" in options.metrics:
        evaluation.notes.append(
            f"geometry leaves out {counts.crowded:,} molecules with an atom of more than {CROWD} "
            "bonds"
        )
    if 0 < counts.carrying < counts.molecules and counts.carried_bonds:
        evaluation.notes.append(
            f"{counts.carrying:,} of {counts.molecules:,} molecules carry bonds of their own; the "
            "rates by the bonds in the file are of these"
        )
    evaluation.rates["posebusters"] = None
    _look_closer(evaluation, options, workers)
    evaluation.worst = findings.timed_out[:_WORST] + findings.worst[:_WORST] + evaluation.worst
    return evaluation


def judgements(
    pieces: Iterable[MoleculeChunk], settings: Settings, workers: Workers
) -> Iterator[tuple[MoleculeChunk, ChunkChecks]]:
    """Pieces and what is found of them; where RDKit hangs, what can be said without it."""
    return workers.map(
        partial(judge_piece, settings=settings),
        lambda piece, trouble: judge_without_rdkit(piece, settings, f"RDKit: {trouble}"),
        pieces,
    )


def hashes_of_names(
    source: Source, settings: Settings, workers: Workers, progress: Progress = lambda _: None
) -> NDArray[np.uint64]:
    """Sorted hashes of molecules' SMILES as `evaluate` names them, for novelty against them."""
    names = Distinct()
    plain = replace(settings, codes={}, whole_names=False, carried=settings.bonds == "given")
    for piece, found in judgements(source.pieces(), plain, workers):
        names.add(found.names)
        progress(len(piece))
    return names.hashes


def hashes_of(names: Iterable[str]) -> NDArray[np.uint64]:
    """Sorted hashes of SMILES."""
    return np.unique(np.array([name_hash(name) for name in names], np.uint64))


class _LeftOut:
    """Takes molecules with elements that no valence is known for out of pieces, or raises."""

    def __init__(self, name: str, options: Options) -> None:
        self._name, self._skip, self.count = name, options.skip_bad, 0
        self._given = options.settings.bonds == "given"

    def without(self, pieces: Iterable[MoleculeChunk]) -> Iterator[MoleculeChunk]:
        for piece in pieces:
            if self._given and piece.molecules.bonds is None:
                raise InputError(
                    f"{self._name}: record {piece.records[0]} carries no bonds of its own; leave "
                    "out --bonds given"
                )
            numbers = piece.molecules.atomic_numbers
            foreign = np.flatnonzero(~has_valence(numbers))
            if not len(foreign):
                yield piece
                continue
            owners = np.unique(piece.molecules.molecule_index[foreign])
            if not self._skip:
                raise InputError(
                    f"{self._name}: record {piece.records[owners[0]]} holds "
                    f"{symbol(int(numbers[foreign[0]]))}, for which no valence is known; pass "
                    "--skip-bad to leave out such molecules"
                )
            self.count += len(owners)
            rest = np.setdiff1d(np.arange(len(piece)), owners)
            if len(rest):
                yield piece.select(rest)


def _look_closer(evaluation: Evaluation, options: Options, workers: Workers) -> None:
    """The metrics that are too slow for all molecules."""
    findings, measures = evaluation.findings, evaluation.measures
    for metric, relax, label in (
        ("strain", relax_mmff, "MMFF94"),
        ("xtb", relax_xtb, "GFN2-xTB"),
    ):
        if metric not in options.metrics:
            continue
        if metric not in options.usable:
            for key in (f"{metric}_energy", f"{metric}_rmsd"):
                measures[key] = Measure(None, note=how_to_get(metric))
            continue
        relaxed: list[Relaxed] = []
        records: list[int] = []
        most = options.drawn if metric == "strain" else max(1, options.drawn // _XTB_SHARE)
        for piece, part in workers.map(relax, not_relaxed, _pieces(findings.whole, most)):
            relaxed += part
            records += piece.records.tolist()
        _add_relaxed(evaluation, metric, label, records, relaxed)
    if "posebusters" in options.usable:
        failures: list[list[str]] = []
        for _, checks in workers.map(bust, given_up, _pieces(findings.any, options.drawn)):
            failures += checks
        passed = sum(not checks for checks in failures)
        evaluation.rates["posebusters"] = Rate(passed, len(failures))
        evaluation.failed_checks = Counter(name for checks in failures for name in checks)


def _pieces(drawn: Draw, most: int) -> Iterator[MoleculeChunk]:
    specimens = list(drawn)[:most]
    for start in range(0, len(specimens), _SLOW_PIECE):
        part = specimens[start : start + _SLOW_PIECE]
        records = np.array([s.record for s in part], np.int64)
        yield MoleculeChunk(records, Molecules.from_list([s.molecule for s in part]))


def _add_relaxed(
    evaluation: Evaluation, metric: str, label: str, records: list[int], relaxed: list[Relaxed]
) -> None:
    reasons = Counter(r.reason for r in relaxed if r.strain is None)
    for key, index, unit in (("energy", 0, "kcal/mol"), ("rmsd", 1, "Å")):
        values = np.array([r[index] for r in relaxed if r.strain is not None], np.float64)
        if not len(values):
            note = reasons.most_common(1)[0][0] if reasons else "none to relax"
            evaluation.measures[f"{metric}_{key}"] = Measure(None, note=note)
            continue
        evaluation.measures[f"{metric}_{key}"] = Measure(
            float(np.median(values)), median_interval(values), len(values)
        )
        if key == "energy":
            pairs = zip(relaxed, records, strict=True)
            ranked = sorted(((r.strain, n) for r, n in pairs if r.strain is not None), reverse=True)
            evaluation.worst += [
                Worst(n, value, f"{label} strain {value:.0f} {unit}")
                for value, n in ranked[:_WORST]
            ]
    if reasons:
        said = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
        evaluation.notes.append(f"{label} strain leaves out: {said}")


def over_regular(samples: Evaluation, reference: Rate | None) -> bool:
    """Whether samples are more often stable than real data beyond both intervals."""
    ours = samples.rates["molecule_stability"]
    if ours is None or reference is None or ours.interval is None or reference.interval is None:
        return False
    return ours.interval[0] > reference.interval[1]
