"""Evaluate files against a reference: from paths to a report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.geometry import GeometryTypes
from molgen_energy.errors import InputError
from molgen_energy.metrics.comparison import compare
from molgen_energy.metrics.evaluation import (
    Evaluation,
    Options,
    Progress,
    evaluate,
    settings_for,
)
from molgen_energy.metrics.reference import (
    MoleculeSource,
    Reference,
    bundled_reference,
    qm9_training_names,
    reference_of,
    training_names,
    types_named,
)
from molgen_energy.metrics.report import Report
from molgen_energy.output import display_path
from molgen_energy.workers import WorkerPool

Watched = Callable[[str, int | None], Progress]
"""Begins to show progress of something, of so many molecules; returns what to call then."""

_BUNDLED_TRAINING = "QM9's 100,000 training molecules (bundled)"


def _unwatched(what: str, total: int | None) -> Progress:
    return lambda molecules: None


def run(
    files: list[Path],
    reference: Path | None,
    train: Path | None,
    types: str | None,
    options: Options,
    workers: WorkerPool,
    watched: Watched = _unwatched,
) -> Report:
    """Judge files, and real data beside them.

    Parameters
    ----------
    files
        SDF, XYZ (also gzip) or HDF5.
    reference
        Real molecules; None takes the bundled statistics of QM9's test split.
    train
        Training molecules for novelty; None takes QM9's, as they ship.
    types
        Name of a list of types of geometry, see `types_named`.

    Raises
    ------
    InputError
        A file cannot be read or holds something that cannot be judged; names the record.
    """
    sources = [MoleculeSource(path, skip_bad=options.skip_bad) for path in files]
    for path in filter(None, (reference, train)):
        MoleculeSource(path)  # a name that is wrong should not cost minutes
    chosen = types_named(types, reference)
    notes: list[str] = []
    if options.settings.bonds == "given":
        for source in sources:
            if not source.carries_bonds():
                raise InputError(f"{source.path} carries no bonds of its own; omit --bonds given")
    known, against = _known(train, options, workers, watched, notes)
    if reference is None:
        data = bundled_reference()
        _check_bundled(data, chosen, options)
    else:
        source = MoleculeSource(reference, "test")
        progress = watched(f"reading {reference.name}", source.size())
        judged = options
        if options.settings.bonds == "given" and not source.carries_bonds():
            judged = replace(options, settings=replace(options.settings, bonds="perceived"))
        name = display_path(reference)
        data = reference_of(reference, name, judged, chosen, known, workers, progress)
    options = replace(options, settings=settings_for(data.types, options))
    samples = []
    for name, source in zip(_names(files), sources, strict=True):
        progress = watched(f"evaluating {name}", source.size())
        samples.append(_evaluation(name, source, options, known, workers, progress, data))
    if data.row.bonds != samples[0].bonds:
        ours = samples[0].bonds
        notes.append(f"bonds of {data.name} are {data.row.bonds}; those of the files are {ours}")
    report = Report(samples, data, options, against, notes)
    report.judge()
    return report


def _check_bundled(data: Reference, chosen: GeometryTypes | None, options: Options) -> None:
    """Refuse what the bundled statistics cannot serve."""
    if "geometry" not in options.metrics:
        return
    what = ""
    if chosen is None or chosen.types != data.types.types:
        what = "hold the types of QM9 only"
    elif options.settings.counting != "once":
        what = "count every angle once"
    if what:
        raise InputError(
            f"the bundled statistics of QM9 {what}; name real molecules with --reference (all of "
            "QM9: molgen-energy preprocess qm9)"
        )


def _names(files: list[Path]) -> list[str]:
    """File names alone where they tell the files apart."""
    plain = len({path.name for path in files}) == len(files)
    return [display_path(Path(path.name) if plain else path) for path in files]


def _known(
    train: Path | None, options: Options, workers: WorkerPool, watched: Watched, notes: list[str]
) -> tuple[NDArray[np.uint64] | None, str]:
    """Hashes of the training molecules' names, and what they are."""
    if train is not None:
        name = display_path(train)
        source = MoleculeSource(train, "train")
        if options.settings.bonds == "given" and not source.carries_bonds():
            notes.append(f"novelty is n/a: {name} carries no bonds, and the files' own are judged")
            return None, "nothing"
        size = source.size()
        progress = watched(f"naming {train.name}", size)
        known, source = training_names(train, options.settings, workers, options.skip_bad, progress)
        if source.note:
            notes.append(f"{name}: {source.note}")
        if source.skipped:
            notes.append(f"{name}: {source.skipped:,} bad records left out")
        return known, name
    if options.settings.bonds != "perceived":
        notes.append(
            "novelty is n/a: the bundled names of QM9 rest on perceived bonds and their orders; "
            "pass the training molecules with --train"
        )
        return None, "nothing"
    bundled = qm9_training_names()
    if bundled is None:
        notes.append(
            "novelty is n/a: this RDKit names molecules otherwise than the one that wrote the "
            "bundled list; pass --train qm9.h5"
        )
    return bundled, _BUNDLED_TRAINING


def _evaluation(
    name: str,
    source: MoleculeSource,
    options: Options,
    known: NDArray[np.uint64] | None,
    workers: WorkerPool,
    progress: Progress,
    data: Reference,
) -> Evaluation:
    found = evaluate(name, source, options, known, workers, progress)
    found.skipped += source.skipped
    found.provenance = source.provenance
    if source.note:
        found.notes.append(source.note)
    assert found.distributions is not None
    found.comparison = compare(
        found.distributions,
        data.distributions,
        data.types if "geometry" in options.metrics else None,
        "composition" in options.metrics,
    )
    return found
