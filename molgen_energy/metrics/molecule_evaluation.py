"""Evaluate one set of molecules by the published protocols.

EDM's protocol (Hoogeboom et al., ICML 2022): bonds are perceived from distances. An atom is stable
if its bond orders add up to an allowed valence, a molecule if all its atoms are. A molecule is
valid if RDKit sanitises it as a whole; its name is the canonical SMILES of its largest fragment.
With the bonds that a file gives, a stricter valence model takes the place of EDM's table. Geometry
is compared by JODO's protocol.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.anomalies import KINDS as ANOMALIES
from molgen_energy.chemistry.anomalies import TYPES
from molgen_energy.chemistry.descriptors import DESCRIPTORS, has_sa_score
from molgen_energy.chemistry.geometry import KINDS, type_name
from molgen_energy.chemistry.rdkit import MAX_NEIGHBOURS
from molgen_energy.chemistry.valence import has_valence
from molgen_energy.data.molecules import MoleculeChunk, Molecules
from molgen_energy.elements import symbol
from molgen_energy.errors import InputError, counted
from molgen_energy.metrics.accumulator import (
    DistinctHashes,
    EvaluationAccumulator,
    RandomSubset,
    WorstRecord,
)
from molgen_energy.metrics.checks.chirality import (
    Stereocentres,
    count_stereocentres,
    stereocentres_failed,
)
from molgen_energy.metrics.checks.chunk import (
    CheckSettings,
    ChunkChecks,
    check_chunk,
    check_chunk_without_rdkit,
    smiles_hashes,
)
from molgen_energy.metrics.checks.posebusters import CHECKS as POSEBUSTERS
from molgen_energy.metrics.checks.posebusters import posebusters_failed, run_posebusters
from molgen_energy.metrics.checks.strain import (
    Relaxation,
    TypeChanges,
    relaxation_failed,
    strain_mmff,
    strain_xtb,
)
from molgen_energy.metrics.distances.comparison import MIN_MOLECULES, Comparison, Distributions
from molgen_energy.metrics.distances.fcd import ChemNet
from molgen_energy.metrics.distances.similarity import SubstructureCounts
from molgen_energy.metrics.molecule_table import MoleculeTable
from molgen_energy.metrics.options import BOND_DESCRIPTIONS, EvaluationOptions, install_command
from molgen_energy.metrics.sources import ChunkSource
from molgen_energy.metrics.statistics import (
    Clusters,
    Estimate,
    Mean,
    Rate,
    jackknife_interval,
    median_interval,
    ratio_interval,
)
from molgen_energy.progress import ProgressCallback, no_progress
from molgen_energy.workers import WorkerPool

# Atoms of a chunk: of so few molecules that each process gets several, of so many that NumPy's
# operations on a chunk take little of its time.
_SUBSET_ATOMS = 500
_STEREOCENTRE_ATOMS = 2000
_XTB_FRACTION = 10  # xTB takes a second for each molecule of QM9, so it gets a tenth of the subset
_MAX_WORST = 3
# The rest has rows: `connected` counts fragments, `hydrogens missing` single hydrogens.
_FAULTS_OF_FILES = {*ANOMALIES, TYPES} - {"fragments", "few_hydrogens", "overlapping"}


@dataclass
class MoleculeEvaluation:
    """Results for one set of molecules."""

    name: str
    molecules: int
    rates: dict[str, Rate | None]
    """By key; None where not applicable."""
    estimates: dict[str, Estimate] = field(default_factory=dict)
    """Strain energies and RMSD, by key."""
    distributions: Distributions | None = None
    accumulator: EvaluationAccumulator = field(default_factory=EvaluationAccumulator)
    activations: NDArray[np.float32] | None = None
    """ChemNet's activations of kept molecules, (V, 512)."""
    comparison: Comparison = field(default_factory=Comparison)
    """Distances from the reference."""
    bonds: str = BOND_DESCRIPTIONS["perceived"]
    valence: str = "edm"
    """One of `molgen_energy.chemistry.valence.VALENCE_MODELS`."""
    skipped: int = 0
    notes: list[str] = field(default_factory=list)
    worst: list[WorstRecord] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)
    posebusters_failures: Counter[str] = field(default_factory=Counter)
    relaxation_changes: dict[str, dict[str, dict[str, tuple[float, int]]]] = field(
        default_factory=dict
    )
    """Mean absolute change and number of each geometry type, by metric and kind of geometry."""
    path: Path | None = None

    def shares_stability(self, other: MoleculeEvaluation) -> bool:
        """Whether stability means the same in both; single bonds are for validity alone."""
        given = BOND_DESCRIPTIONS["given"]
        alike = (self.bonds == given) == (other.bonds == given)
        return alike and self.valence == other.valence


class ProgressCounter:
    """Adds up the molecules of several files for one progress callback."""

    def __init__(self, progress: ProgressCallback = no_progress, total: int | None = None) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, molecules: int) -> None:
        """Report that so many more molecules are finished."""
        self._done += molecules
        self._progress(self._done, self._total)


def evaluate_source(
    name: str,
    source: ChunkSource,
    options: EvaluationOptions,
    training_hashes: NDArray[np.uint64] | None,
    workers: WorkerPool,
    counter: ProgressCounter | None = None,
    table: MoleculeTable | None = None,
) -> MoleculeEvaluation:
    """Check the molecules of a source and accumulate the results.

    Parameters
    ----------
    name
        Name of the molecules in the report and in errors.
    source
        The molecules; a few chunks are in memory at a time.
    options
        With the geometry types filled in, see `molgen_energy.metrics.options.with_types`.
    training_hashes
        Sorted hashes of the training molecules' SMILES, computed with the same choice of bonds.
        None leaves novelty undefined.
    workers
        Processes for the calls of RDKit.
    counter
        Gets the number of finished molecules.
    table
        Gets the results of each molecule.

    Raises
    ------
    InputError
        A molecule has an element without a known valence, and `skip_bad` is false; or the given
        bonds are chosen and there are none.
    """
    accumulator = EvaluationAccumulator(options.subset, options.kept)
    elements = _ElementFilter(name, options)
    net = ChemNet(options.kept) if "fcd" in options.available else None
    substructures = None
    if "similarity" in options.metrics:
        substructures = SubstructureCounts(keep_smiles=options.kept > 0)
    settings = replace(options.checks, short_smiles=table is not None)
    if table is not None:
        table.begin(name, settings.bonds)
    chunks = elements.filter(source.chunks())
    for chunk, checks in check_chunks(chunks, settings, workers):
        accumulator.add(checks)
        if net is not None:
            read = checks.whole_smiles
            if settings.valence == "jodo":  # its `fcd_torch` reads a SMILES up to the first dot
                read = [text and text.partition(".")[0] for text in read]
            net.add(read, checks.whole_written)
        if substructures is not None:
            substructures.add(checks.whole_smiles, checks.substructures, checks.whole_written)
        if table is not None:
            table.add(checks, _novel(checks.smiles, training_hashes))
        if counter is not None:
            counter.add(len(chunk))
    counts = accumulator.counts
    if not counts.molecules:
        raise InputError(f"{name}: no usable molecule is left ({'; '.join(elements.notes())})")
    hashes = accumulator.smiles.hashes
    counts.distinct = len(hashes)
    if training_hashes is not None:
        counts.novel = int((~np.isin(hashes, training_hashes, assume_unique=True)).sum())
    evaluation = MoleculeEvaluation(
        name,
        counts.molecules,
        counts.rates(),
        accumulator=accumulator,
        distributions=Distributions.of(
            accumulator, None if net is None else net.finish(), substructures
        ),
        activations=None if net is None else net.kept(),
        skipped=elements.skipped,
        bonds=BOND_DESCRIPTIONS[settings.bonds],
        valence=settings.valence,
        notes=elements.notes(),
    )
    evaluation.notes += accumulator.anomalies.notes(kinds=_FAULTS_OF_FILES)
    if counts.without_geometry and "geometry" in options.metrics:
        evaluation.notes.append(
            f"geometry excludes {counted(counts.without_geometry, 'molecules')} with more than "
            f"{MAX_NEIGHBOURS} bonds at an atom"
        )
    if settings.descriptors:
        evaluation.estimates |= descriptor_means(accumulator)
    evaluation.rates |= {"stereocentres_r": None, "posebusters": None}
    if accumulator.agreement.molecules:
        evaluation.rates |= accumulator.agreement.rates()
    _add_subset_metrics(evaluation, options, workers, table)
    evaluation.worst = (
        accumulator.timed_out[:_MAX_WORST]
        + accumulator.most_unstable[:_MAX_WORST]
        + evaluation.worst
    )
    return evaluation


def _novel(
    smiles: list[str | None], training_hashes: NDArray[np.uint64] | None
) -> NDArray[np.bool_] | None:
    """Which SMILES are not among the training molecules', (M,); anything where there is none."""
    if training_hashes is None:
        return None
    if not len(training_hashes):
        return np.ones(len(smiles), bool)
    hashes = smiles_hashes(text or "" for text in smiles)
    place = np.minimum(np.searchsorted(training_hashes, hashes), len(training_hashes) - 1)
    novel: NDArray[np.bool_] = training_hashes[place] != hashes
    return novel


def check_chunks(
    chunks: Iterable[MoleculeChunk], settings: CheckSettings, workers: WorkerPool
) -> Iterator[tuple[MoleculeChunk, ChunkChecks]]:
    """Chunks with their checks, in order; without RDKit where it hangs or crashes."""
    return workers.map(
        partial(check_chunk, settings=settings),
        chunks,
        lambda chunk, failure: check_chunk_without_rdkit(chunk, settings, f"RDKit: {failure}"),
    )


def collect_smiles_hashes(
    source: ChunkSource,
    settings: CheckSettings,
    workers: WorkerPool,
    counter: ProgressCounter | None = None,
) -> NDArray[np.uint64]:
    """Sorted hashes of the SMILES that `evaluate_source` would compute, for novelty."""
    smiles = DistinctHashes()
    settings = replace(
        settings,
        type_codes={},
        whole_smiles=False,
        substructures=False,
        descriptors=False,
        names_only=True,
        agreement=False,
    )
    for chunk, checks in check_chunks(source.chunks(), settings, workers):
        smiles.add(checks.smiles)
        if counter is not None:
            counter.add(len(chunk))
    return smiles.hashes


def hash_smiles(smiles: Iterable[str]) -> NDArray[np.uint64]:
    """Sorted hashes of SMILES."""
    return np.unique(smiles_hashes(smiles))


class _ElementFilter:
    """Removes molecules that the checks have no bonds or valences for, or raises.

    These are molecules with an element that the valence model, or the perception of bonds, does not
    know; and, where given bonds are checked, molecules without.
    """

    def __init__(self, name: str, options: EvaluationOptions) -> None:
        self._name, self._skip_bad, self._checks = name, options.skip_bad, options.checks
        # With both bonds, both leave out the same molecules.
        chosen = options.valence or "strict"
        self._valence = chosen if options.checks.agreement else options.checks.valence
        self.skipped = 0
        self._unknown: Counter[str] = Counter()
        self._without_bonds = 0

    def filter(self, chunks: Iterable[MoleculeChunk]) -> Iterator[MoleculeChunk]:
        both = self._checks.agreement
        given = self._checks.bonds == "given" and not both
        option = "both" if both else "given"
        for chunk in chunks:
            if (given or both) and chunk.molecules.bonds is None:
                self._without_bonds += len(chunk)
                reason = f"has no bonds; leave out --bonds {option}"
                self._skip(chunk.records[0], len(chunk), reason)
                continue
            numbers = chunk.molecules.atomic_numbers
            known = has_valence(numbers, self._valence)
            if not given:
                known &= has_valence(numbers, "edm")  # the elements that perception knows
            unknown = np.flatnonzero(~known)
            if not len(unknown):
                yield chunk
                continue
            of_atoms = chunk.molecules.molecule_index[unknown]
            owners, first = np.unique(of_atoms, return_index=True)
            names = [symbol(z) for z in numbers[unknown[first]].tolist()]
            self._unknown.update(names)
            why = f"whose valences --valence {self._valence} does not know"
            if not given and not has_valence(numbers[unknown[:1]], "edm")[0]:
                why = "whose bonds can be given (--bonds given), not perceived from distances"
            self._skip(chunk.records[owners[0]], len(owners), f"holds {names[0]}, {why}")
            rest = np.setdiff1d(np.arange(len(chunk)), owners)
            if len(rest):
                yield chunk.select(rest)

    def _skip(self, record: int, count: int, reason: str) -> None:
        if not self._skip_bad:
            raise InputError(
                f"{self._name}: record {record} {reason}; pass --skip-bad to leave out such "
                "molecules"
            )
        self.skipped += count

    def notes(self) -> list[str]:
        """What was left out, and why."""
        notes = []
        if self._unknown:
            elements = ", ".join(f"{e} ({n:,})" for e, n in self._unknown.most_common())
            notes.append(f"molecules with elements without known valences are left out: {elements}")
        if self._without_bonds:
            notes.append(f"{counted(self._without_bonds, 'molecules')} without bonds left out")
        return notes


def _add_subset_metrics(
    evaluation: MoleculeEvaluation,
    options: EvaluationOptions,
    workers: WorkerPool,
    table: MoleculeTable | None,
) -> None:
    """Compute the metrics that are too slow for all molecules, on random subsets."""
    accumulator, estimates = evaluation.accumulator, evaluation.estimates
    methods: tuple[tuple[str, Callable[[MoleculeChunk], list[Relaxation]], str, int], ...] = (
        ("strain", strain_mmff, "MMFF94", options.subset),
        ("xtb", strain_xtb, "GFN2-xTB", max(1, options.subset // _XTB_FRACTION)),
    )
    for metric, relax, label, count in methods:
        if metric not in options.metrics:
            continue
        if metric not in options.available:
            for key in relaxation_keys(metric):
                estimates[key] = Estimate(None, note=install_command(metric))
            continue
        relaxations: list[Relaxation] = []
        records: list[int] = []
        chunks = _subset_chunks(accumulator.random_complete, count)
        for chunk, part in workers.map(relax, chunks, relaxation_failed):
            relaxations += part
            records += chunk.records.tolist()
        if table is not None:
            table.add_relaxations(metric, records, relaxations)
        _add_strain(evaluation, metric, label, records, relaxations)
    if "geometry" in options.metrics:
        centres: list[Stereocentres] = []
        chunks = _subset_chunks(accumulator.random_complete, options.subset, _STEREOCENTRE_ATOMS)
        for _, counted in workers.map(count_stereocentres, chunks, stereocentres_failed):
            centres += counted
        evaluation.rates["stereocentres_r"] = _share_of_r(centres)
    if "posebusters" in options.available:
        checks: list[dict[str, bool]] = []
        numbers: list[int] = []
        chunks = _subset_chunks(accumulator.random_molecules, options.subset)
        for chunk, found in workers.map(run_posebusters, chunks, posebusters_failed):
            checks += found
            numbers += chunk.records.tolist()
        if table is not None:
            table.add_posebusters(numbers, checks)
        evaluation.rates["posebusters"] = Rate(sum(all(c.values()) for c in checks), len(checks))
        for check in POSEBUSTERS:
            if any(check in one for one in checks):  # other versions have other checks
                passed = sum(one.get(check, False) for one in checks)
                evaluation.rates[posebusters_key(check)] = Rate(passed, len(checks))
        evaluation.posebusters_failures = Counter(
            name for one in checks for name, passed in one.items() if not passed
        )


def descriptor_means(accumulator: EvaluationAccumulator) -> dict[str, Estimate]:
    """Means of the descriptors of complete molecules, with jackknife intervals."""
    found = {}
    columns = zip(accumulator.descriptor_counts.T, accumulator.descriptor_sums.T, strict=True)
    for (key, descriptor), (counts, sums) in zip(DESCRIPTORS.items(), columns, strict=True):
        total = int(counts.sum())
        if not total:
            absent = key == "sa_score" and not has_sa_score()
            note = "RDKit without Contrib/SA_Score" if absent else "no complete molecules"
            found[mean_key(key)] = Estimate(None, note=note)
            continue
        mean = float(sums.sum()) / total
        without = [
            (sums.sum() - s) / (total - n)
            for s, n in zip(sums, counts, strict=True)
            if 0 < n < total
        ]
        interval = None
        if total >= MIN_MOLECULES and len(without) > 1 and max(without) > min(without):
            interval = jackknife_interval(mean, without, descriptor.least)
        found[mean_key(key)] = Estimate(mean, interval, total)
    return found


def mean_key(descriptor: str) -> str:
    """The key of a descriptor's mean."""
    return f"mean_{descriptor}"


def _subset_chunks(
    subset: RandomSubset, count: int, atoms: int = _SUBSET_ATOMS
) -> Iterator[MoleculeChunk]:
    """The first molecules of a subset in chunks of about so many atoms."""
    selected = list(subset)[:count]
    if not selected:
        return
    chunk = np.cumsum([len(s.molecule) for s in selected]) // atoms
    for part in np.split(np.arange(len(selected)), np.flatnonzero(np.diff(chunk)) + 1):
        members = [selected[k] for k in part.tolist()]
        records = np.array([s.record for s in members], np.int64)
        yield MoleculeChunk(records, Molecules.from_list([s.molecule for s in members]))


def _share_of_r(centres: list[Stereocentres]) -> Rate:
    """R among the stereocentres of all molecules; those of one molecule are not independent."""
    clusters = Clusters()
    counts = np.array(centres, np.int64).reshape(-1, 2)
    clusters.add(counts[:, 1], counts.sum(axis=1))
    return clusters.unmarked()


def relaxation_keys(metric: str) -> tuple[str, ...]:
    """Keys of the estimates of `strain` or `xtb`."""
    kinds = (kind.replace(" ", "_") for kind in KINDS)
    return tuple(f"{metric}_{name}" for name in ("energy", "energy_mean", "rmsd", *kinds))


def posebusters_key(check: str) -> str:
    """The key of the rate of one check of PoseBusters."""
    return f"posebusters_{check}"


def _add_strain(
    evaluation: MoleculeEvaluation,
    metric: str,
    label: str,
    records: list[int],
    relaxations: list[Relaxation],
) -> None:
    failures = Counter(r.reason for r in relaxations if r.strain is None)
    finished = [(r.strain, r.rmsd) for r in relaxations if r.strain is not None]
    if finished:
        energy, distance = np.array(finished, np.float64).T
        estimates = [
            Estimate(float(np.median(energy)), median_interval(energy), len(energy)),
            Estimate(float(energy.mean()), Mean.of(energy).interval, len(energy)),
            Estimate(float(np.median(distance)), median_interval(distance), len(distance)),
        ]
        changes = [r.changes for r in relaxations if r.changes is not None]
        estimates += [_mean_change([each[kind] for each in changes]) for kind in KINDS]
        evaluation.relaxation_changes[metric] = {
            kind: _changes_by_type(kind, [each[kind] for each in changes]) for kind in KINDS
        }
    else:
        note = failures.most_common(1)[0][0] if failures else "no complete molecules"
        estimates = [Estimate(None, note=note)] * len(relaxation_keys(metric))
    evaluation.estimates |= dict(zip(relaxation_keys(metric), estimates, strict=True))
    pairs = zip(relaxations, records, strict=True)
    ranked = sorted(((r.strain, n) for r, n in pairs if r.strain is not None), reverse=True)
    evaluation.worst += [
        WorstRecord(record, strain, f"{label} strain {strain:.3g} kcal/mol")
        for strain, record in ranked[:_MAX_WORST]
    ]
    if failures:
        text = "; ".join(f"{count} {reason}" for reason, count in failures.most_common(3))
        evaluation.notes.append(f"{label} strain excludes: {text}")


def _mean_change(molecules: list[TypeChanges]) -> Estimate:
    """Mean over the lengths, angles or dihedrals of all molecules."""
    sums = np.array([each.total.sum() for each in molecules], np.float64)
    counts = np.array([each.number.sum() for each in molecules], np.int64)
    if not counts.sum():
        return Estimate(None, note="no such geometry")
    return Estimate(
        float(sums.sum() / counts.sum()), ratio_interval(sums, counts), int((counts > 0).sum())
    )


def _changes_by_type(kind: str, molecules: list[TypeChanges]) -> dict[str, tuple[float, int]]:
    """Mean and number of each type, the most frequent first."""
    if not molecules:
        return {}
    codes, place = np.unique(np.concatenate([m.code for m in molecules]), return_inverse=True)
    total = np.bincount(place, np.concatenate([m.total for m in molecules]), len(codes))
    number = np.bincount(place, np.concatenate([m.number for m in molecules]), len(codes))
    order = np.argsort(-number, kind="stable")
    return {
        type_name(kind, int(codes[k])): (float(total[k] / number[k]), int(number[k]))
        for k in order.tolist()
    }


def is_over_regular(
    evaluation: MoleculeEvaluation,
    reference: MoleculeEvaluation,
    key: str = "molecule_stability",
) -> bool:
    """Whether samples are more often stable than real data, with disjoint intervals.

    Parameters
    ----------
    key
        `molecule_stability` or `atom_stability`.
    """
    rate, data = evaluation.rates[key], reference.rates[key]
    if rate is None or data is None or rate.interval is None or data.interval is None:
        return False
    return evaluation.shares_stability(reference) and rate.interval[0] > data.interval[1]
