"""Evaluate files of molecules, or RDKit molecules, and compare them with a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.geometry import GeometryTypes
from molgen_energy.elements import symbol
from molgen_energy.errors import InputError, counted
from molgen_energy.metrics.bundled import (
    BUNDLED,
    DEFAULT_REFERENCE,
    BundledReference,
    bundled_by_data,
    bundled_of,
)
from molgen_energy.metrics.distances.comparison import compare
from molgen_energy.metrics.distances.real_ranges import add_ranges
from molgen_energy.metrics.distances.similarity import SubstructureCounts
from molgen_energy.metrics.molecule_evaluation import (
    MoleculeEvaluation,
    ProgressCounter,
    collect_smiles_hashes,
    evaluate_source,
)
from molgen_energy.metrics.molecule_table import MoleculeTable
from molgen_energy.metrics.options import EvaluationOptions, with_bonds, with_types
from molgen_energy.metrics.reference import (
    FREQUENT_TYPES,
    MAX_COMPARED,
    Reference,
    evaluate_reference,
    has_train_and_test,
    select_types,
)
from molgen_energy.metrics.sources import FileSource, RDKitSource
from molgen_energy.output import display_names
from molgen_energy.progress import ProgressCallback, no_progress
from molgen_energy.workers import WorkerPool

_MANY_FILES = 8
_SIMILAR = 1.2  # files whose numbers of molecules differ by at most this factor
_NO_TRAINING = "nothing"
_NOVELTY_OF_PERCEIVED = (
    "so those of its molecules are perceived from distances; where perception fails, a training "
    "molecule counts as novel"
)

MoleculeInputs = Sequence[Path] | Sequence[Any]
"""Paths of files, or RDKit molecules."""


@dataclass
class MoleculeResults:
    """Evaluations of all inputs and of the reference."""

    samples: list[MoleculeEvaluation]
    reference: Reference
    options: EvaluationOptions
    novelty_against: str
    """Description of the training molecules."""
    reference_choice: str = ""
    """Why a bundled reference was chosen; empty if it was named, or is the default."""
    bonds_unused: bool = False
    """Whether a file has bonds of its own that were not checked."""
    notes: list[str] = field(default_factory=list)
    table: MoleculeTable | None = None


def evaluate_inputs(
    inputs: MoleculeInputs,
    reference: Path | None,
    train: Path | None,
    types: str | None,
    options: EvaluationOptions,
    workers: WorkerPool,
    progress: ProgressCallback = no_progress,
    table: MoleculeTable | None = None,
) -> MoleculeResults:
    """Evaluate molecules and compare them with a reference.

    Parameters
    ----------
    inputs
        Paths of SDF, XYZ or HDF5 files, folders or patterns; or RDKit molecules with a conformer
        each, which make one set.
    reference
        File of real molecules, or name of a bundled reference; None takes the bundled reference of
        the data that the samples come from, else that of QM9.
    train
        File of training molecules for novelty; None takes the training split of the reference, or
        the bundled ones.
    types
        Name of a list of geometry types, see `molgen_energy.metrics.reference.select_types`.
    options
        How the molecules are evaluated.
    workers
        Processes for the calls of RDKit.
    progress
        Called with the number of finished molecules, of the reference and training files too.
    table
        Gets the results of each molecule of the inputs.

    Raises
    ------
    InputError
        A file cannot be read, or a molecule cannot be evaluated; the message names the record.
    """
    sources, names = _open_sources(inputs, options)
    bundled = None if reference is None else bundled_of(reference)
    if bundled is not None:
        reference = None
    for path in filter(None, (reference, train)):
        FileSource(path)  # a wrong file name should not fail after minutes
    chosen = select_types(types, reference)
    notes: list[str] = []
    choice = ""
    if reference is None and bundled is None:
        bundled, notes = bundled_by_data(source.origin for source in sources)
        if bundled is None:
            bundled = BUNDLED[DEFAULT_REFERENCE]
        else:
            choice = f"{bundled.title}, which the files name as their data"
    options = _resolve_bonds(options, dict(zip(names, sources, strict=True)), notes)
    if len(sources) > _MANY_FILES:
        notes.append(
            "each file is evaluated alone; a folder, or a pattern in quotes such as 'mol_*.xyz', "
            "is one set"
        )
    train = train or _training_split(reference)
    counter = ProgressCounter(progress, _total(sources, reference, train))
    loaded = None
    if bundled is not None:
        loaded = bundled.load(options.checks.bonds, options.checks.valence)
        _check_bundled(bundled, loaded, types, chosen, options)
    training_hashes, novelty_against = _training_hashes(
        train, reference, bundled, loaded, options, workers, counter, notes
    )
    if loaded is not None:
        data = loaded
        if "similarity" in options.metrics and data.smiles:
            data.distributions.substructures = SubstructureCounts.of_smiles(data.smiles, workers)
    else:
        assert reference is not None
        reference_options = _options_for(FileSource(reference, "test"), options)
        name = display_names([reference])[0]
        data = evaluate_reference(
            reference, name, reference_options, chosen, training_hashes, workers, counter
        )
    options = with_types(options, data.types)
    samples = []
    for name, source in zip(names, sources, strict=True):
        evaluation = evaluate_source(
            name, source, options, training_hashes, workers, counter, table
        )
        _compare_with(data, evaluation, source, options)
        samples.append(evaluation)
    if data.evaluation.bonds != samples[0].bonds:
        remedy = ""
        if loaded is not None and options.checks.bonds == "given":  # of QM9 alone
            remedy = "; --reference qm9.h5 of `preprocess qm9 --bonds` compares with given ones"
        notes.append(
            f"bonds of {data.name} are {data.evaluation.bonds}; those of the samples are "
            f"{samples[0].bonds}{remedy}"
        )
    elif data.evaluation.valence != samples[0].valence:
        notes.append(
            f"stability of {data.name} is by --valence {data.evaluation.valence}, that of the "
            f"samples by {samples[0].valence}"
        )
    counts = [sample.molecules for sample in samples]
    if max(counts) > _SIMILAR * min(counts):
        notes.append(
            "the files have different numbers of molecules, on which distances depend: compare the "
            "unbiased and extrapolated rows, or each distance with its range of real molecules"
        )
    unused = options.checks.bonds != "given" and not options.checks.agreement
    unused = unused and any(s.given_bonds.some for s in sources)
    return MoleculeResults(samples, data, options, novelty_against, choice, unused, notes, table)


def _resolve_bonds(
    options: EvaluationOptions, sources: dict[str, FileSource | RDKitSource], notes: list[str]
) -> EvaluationOptions:
    """The options with the bonds of the checks: one choice for all files, which stand in one table.

    Raises
    ------
    InputError
        Given bonds are chosen and a file has none.
    """
    bonds = options.bonds
    if bonds == "given":
        option = "both" if options.checks.agreement else "given"
        for name, source in sources.items():
            found = source.given_bonds
            if not found.some and not found.declared_perceived:
                raise InputError(f"{name} has no bonds; leave out --bonds {option}")
            if not found.some:
                notes.append(f"the records of {name} say that their bonds come from distances")
    if bonds == "auto":
        bonds = "given" if all(s.given_bonds.every for s in sources.values()) else "perceived"
        for name, source in sources.items():
            found = source.given_bonds
            if bonds == "perceived" and found.some:
                why, remedy = "another file has none", f"evaluate {name} alone to use its own"
                if found.without is not None:
                    why = f"record {found.without} has none"
                    remedy = f"--bonds given takes those of {name}"
                notes.append(f"bonds are perceived from distances, since {why}; {remedy}")
    return with_bonds(options, bonds)


def _options_for(source: FileSource, options: EvaluationOptions) -> EvaluationOptions:
    """The options for real molecules: with perceived bonds where they have none of their own."""
    checks = options.checks
    if not (checks.bonds == "given" or checks.agreement) or source.given_bonds.every:
        return options
    alone = replace(options, checks=replace(checks, agreement=False))
    return with_bonds(alone, "perceived") if checks.bonds == "given" else alone


def _training_split(reference: Path | None) -> Path | None:
    """A reference that has training molecules beside others; QM9's are bundled."""
    if reference is None:
        return None
    source = FileSource(reference)
    return reference if has_train_and_test(source) and not source.is_qm9() else None


def _open_sources(
    inputs: MoleculeInputs, options: EvaluationOptions
) -> tuple[Sequence[FileSource | RDKitSource], list[str]]:
    """Sources with their names in the report."""
    paths = [value for value in inputs if isinstance(value, Path)]
    if len(paths) < len(inputs):
        return [RDKitSource(inputs, options.skip_bad)], ["molecules"]
    sources = [FileSource(path, skip_bad=options.skip_bad) for path in paths]
    return sources, display_names(paths)


def _total(
    sources: Sequence[FileSource | RDKitSource], reference: Path | None, train: Path | None
) -> int | None:
    """Number of molecules that will be evaluated; None if unknown."""
    read: list[FileSource | RDKitSource] = [*sources]
    if train is not None:
        read.append(FileSource(train, "train"))
    if reference is not None:
        test = FileSource(reference, "test")
        read.append(test)
        if has_train_and_test(test):
            read.append(FileSource(reference, "train", limit=MAX_COMPARED))
    sizes = [source.size() for source in read]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def _check_bundled(
    bundled: BundledReference,
    data: Reference,
    types: str | None,
    chosen: GeometryTypes | None,
    options: EvaluationOptions,
) -> None:
    """Raise if the bundled statistics do not have what the options ask of them."""
    if "geometry" not in options.metrics:
        return
    restriction = ""
    asked = data.types.types if chosen is None else chosen.types
    frequent = types != "frequent" or data.types.name == FREQUENT_TYPES
    if asked != data.types.types or not frequent:
        restriction = f"contain no other geometry types than {data.types.name}"
    elif options.checks.counting != "once":
        restriction = "count every angle once"
    if restriction:
        raise InputError(
            f"the bundled statistics of {bundled.title} {restriction}; name real molecules with "
            f"--reference (all of {bundled.title}: {bundled.made_by})"
        )


def _training_hashes(
    train: Path | None,
    reference: Path | None,
    bundled: BundledReference | None,
    loaded: Reference | None,
    options: EvaluationOptions,
    workers: WorkerPool,
    counter: ProgressCounter,
    notes: list[str],
) -> tuple[NDArray[np.uint64] | None, str]:
    """Hashes of the training molecules' SMILES, and the description of these molecules."""
    if train is not None:
        name = display_names([train])[0]
        source = FileSource(train, "train", options.skip_bad)
        own = _options_for(source, options)
        if own.checks.bonds != options.checks.bonds:
            notes.append(
                f"novelty: record {source.given_bonds.without} of {name} has no bonds of its own, "
                f"{_NOVELTY_OF_PERCEIVED}"
            )
        hashes = collect_smiles_hashes(source, own.checks, workers, counter)
        notes += [f"{name}: {note}" for note in source.notes]
        if source.skipped:
            notes.append(f"{name}: {counted(source.skipped, 'bad records')} skipped")
        return hashes, f"the training split of {name}" if source.has_split("train") else name
    if reference is not None and not FileSource(reference).is_qm9():
        name = display_names([reference])[0]
        notes.append(f"novelty is n/a: {name} has no training split; pass --train")
        return None, _NO_TRAINING
    bundled = bundled or BUNDLED["qm9"]
    bonds = options.checks.bonds
    if bonds == "single":
        notes.append(
            f"novelty is n/a: the bundled SMILES of {bundled.title} are not of single bonds; pass "
            "the training molecules with --train"
        )
        return None, _NO_TRAINING
    if bonds == "given" and bundled.name == "qm9":
        notes.append(
            f"novelty: the bundled QM9 has no bonds, {_NOVELTY_OF_PERCEIVED}; --train qm9.h5 of "
            "`preprocess qm9 --bonds` has them"
        )
    known = bundled.training_hashes(bonds, loaded)
    if known is None:
        notes.append(
            "novelty is n/a: this version of RDKit writes other canonical SMILES than the one that "
            f"wrote the bundled list; pass --train {bundled.name}.h5"
        )
    return known, bundled.training


def _compare_with(
    reference: Reference,
    evaluation: MoleculeEvaluation,
    source: FileSource | RDKitSource,
    options: EvaluationOptions,
) -> None:
    """Add the remarks of the source, and the distances from the reference."""
    if source.path is not None and source.path.is_file():  # a set has no checksum
        evaluation.path = source.path
    evaluation.skipped += source.skipped
    evaluation.provenance = source.provenance
    evaluation.notes += source.notes
    assert evaluation.distributions is not None
    absent = evaluation.distributions.elements.sum(axis=0) > 0
    known = reference.distributions.elements.sum(axis=0) > 0
    if "composition" in options.metrics and (absent & ~known).any():
        names = ", ".join(symbol(z) for z in np.flatnonzero(absent & ~known).tolist())
        evaluation.notes.append(
            f"{reference.name} has no {names}; compare with molecules like yours by --reference"
        )
    if "descriptors" in options.metrics and not reference.distributions.descriptors:
        evaluation.notes.append(
            f"the statistics of {reference.name} have no descriptors to compare with; name real "
            "molecules by --reference"
        )
    if "similarity" in options.metrics and reference.distributions.substructures is None:
        evaluation.notes.append(
            f"the statistics of {reference.name} have no SMILES for these bonds to compare with; "
            "name real molecules by --reference"
        )
    evaluation.comparison = compare(
        evaluation.distributions,
        reference.distributions,
        reference.types if "geometry" in options.metrics else None,
        "composition" in options.metrics,
    )
    if reference.ranges is not None:
        evaluation.notes += add_ranges(evaluation.comparison, reference.ranges)
