"""Evaluate molecules: from files, or RDKit molecules, to a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from molgen_energy.distributed import worker_count
from molgen_energy.metrics.molecule_table import MoleculeTable
from molgen_energy.metrics.options import BOTH, DEFAULT_METRICS, make_options, of_both
from molgen_energy.metrics.report.model import Report
from molgen_energy.metrics.report.molecules import molecule_report, side_by_side
from molgen_energy.metrics.results import MoleculeInputs, evaluate_inputs
from molgen_energy.progress import ProgressCallback, no_progress
from molgen_energy.workers import WorkerPool

PRELOAD = ("molgen_energy.metrics.checks.chunk", "molgen_energy.metrics.checks.strain")
"""Modules that worker processes import when they start."""


def evaluate_molecules(
    inputs: MoleculeInputs,
    *,
    reference: Path | None = None,
    train: Path | None = None,
    metrics: str | Iterable[str] = DEFAULT_METRICS,
    bonds: str = "auto",
    valence: str | None = None,
    angles: str = "once",
    types: str | None = None,
    subset: int = 1000,
    workers: int | None = None,
    timeout: float = 20.0,
    skip_bad: bool = False,
    per_molecule: bool = True,
    progress: ProgressCallback = no_progress,
    peers: Sequence[Connection] = (),
) -> Report:
    """Evaluate molecules and compare them with real ones.

    See `molgen_energy.api.evaluate.evaluate` for the options.

    Parameters
    ----------
    inputs
        Paths of files, or RDKit molecules.
    peers
        Connections to other processes of the job, which do part of the work.
    """
    options = make_options(metrics, bonds, valence, angles, subset, skip_bad)
    each = [options]
    if bonds == "both":
        each = [of_both(options, choice) for choice in BOTH]
    table = None
    if per_molecule:
        table = MoleculeTable("descriptors" in options.metrics, bonds == "both")
    count = worker_count(workers)
    results = []
    with WorkerPool(count, timeout, peers, PRELOAD) as pool:
        for k, chosen in enumerate(each):
            part = _part(progress, k, len(each))
            results.append(
                evaluate_inputs(inputs, reference, train, types, chosen, pool, part, table)
            )
    open_pool = partial(WorkerPool, count, timeout, preload=PRELOAD)
    if bonds == "both":
        return side_by_side(dict(zip(BOTH, results, strict=True)), open_pool)
    return molecule_report(results[0], open_pool)


def _part(progress: ProgressCallback, k: int, parts: int) -> ProgressCallback:
    """Reports the progress of one of several equal parts of the work."""

    def report(done: int, total: int | None) -> None:
        progress(*((done, None) if total is None else (k * total + done, parts * total)))

    return report if parts > 1 else progress
