"""Evaluate molecules: from files, or RDKit molecules, to a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from molgen_energy.distributed import worker_count
from molgen_energy.metrics.molecule_table import MoleculeTable
from molgen_energy.metrics.options import DEFAULT_METRICS, make_options
from molgen_energy.metrics.report.model import Report
from molgen_energy.metrics.report.molecules import molecule_report
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
    table = MoleculeTable("descriptors" in options.metrics) if per_molecule else None
    count = worker_count(workers)
    with WorkerPool(count, timeout, peers, PRELOAD) as pool:
        results = evaluate_inputs(inputs, reference, train, types, options, pool, progress, table)
    return molecule_report(results, partial(WorkerPool, count, timeout, preload=PRELOAD))
