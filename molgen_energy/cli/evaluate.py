"""`molgen-energy evaluate`: how good are the samples in a file?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from molgen_energy.cli.console import ThrottledLog, progress_bar, say, show, stdout, warn
from molgen_energy.distributed import is_main, worker_connections
from molgen_energy.errors import InputError
from molgen_energy.output import check_folder, check_own_file

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from rich.progress import Progress

    from molgen_energy.metrics.report.model import Report
    from molgen_energy.progress import ProgressCallback


def command(
    context: typer.Context,
    files: list[str] = typer.Argument(
        ...,
        metavar="FILE…",
        help="SDF or XYZ (also .gz) or HDF5, of any program; a folder, or a "
        "pattern in quotes such as 'mol_*.xyz', is one set.",
    ),
    reference: str | None = typer.Option(
        None,
        "--reference",
        metavar="FILE",
        help="Real molecules to compare with; default: QM9's test split.",
    ),
    train: str | None = typer.Option(
        None,
        "--train",
        metavar="FILE",
        help="Training molecules, for novelty; default: the training split of "
        "--reference, or QM9's 100,000.",
    ),
    report: Path | None = typer.Option(
        None, "--report", metavar="FOLDER", help="Write report.html, report.json and pictures."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
    metrics: str = typer.Option(
        "default",
        "--metrics",
        metavar="NAMES",
        help="Some of rates, geometry, composition, strain (these are the default) and fcd, "
        "posebusters, xtb (each an extra to install): default,fcd adds one; or all.",
    ),
    bonds: str = typer.Option(
        "auto",
        "--bonds",
        metavar="auto|perceived|single|given",
        help="Bonds of all checks: given in the file, or perceived from distances; single: "
        "perceived, all single for validity (EDM on GEOM-Drugs); auto: given where every record "
        "has them.",
    ),
    valence: str | None = typer.Option(
        None,
        "--valence",
        metavar="strict|geom|jodo|edm",
        help="Which bonds make an atom stable: as RDKit allows for its charge (default for given "
        "bonds), or the table of GEOM-Drugs Revisited, JODO, or EDM (default for perceived).",
    ),
    angles: str = typer.Option(
        "once",
        "--angles",
        metavar="once|jodo",
        help="Count every angle and dihedral once, or as JODO's code does.",
    ),
    types: str | None = typer.Option(
        None,
        "--types",
        metavar="qm9|geom|frequent",
        help="Types of bonds, angles and dihedrals to compare; default: JODO's list for QM9, else "
        "the eight most frequent of the reference.",
    ),
    subset: int = typer.Option(
        1000,
        "--subset",
        min=1,
        help="Number of random molecules for strain and PoseBusters; xTB takes a tenth.",
    ),
    workers: int | None = typer.Option(
        None,
        "--workers",
        min=0,
        help="Number of processes; default: one for each processor. With torchrun, for each of its "
        "processes.",
    ),
    timeout: float = typer.Option(
        20.0, "--timeout", min=1.0, help="Seconds after which one molecule times out."
    ),
    skip_bad: bool = typer.Option(
        False, "--skip-bad", help="Skip broken records instead of stopping."
    ),
) -> None:
    """Evaluate molecules: stability, validity, novelty, geometry, energy, beside real data.

    Also takes samples of another physical system, which their HDF5 file names.

    Bonds are those that a file gives, or else perceived from distances (EDM's protocol). Of an HDF5
    file, `--reference` takes the test split and `--train` the training split.
    """
    from molgen_energy.api.evaluate import evaluate

    options = {
        name: value
        for name, value in context.params.items()
        if name not in ("files", "report", "as_json") and _is_given(context, name)
    }
    with worker_connections() as peers:
        if not is_main():
            _serve(peers[0], workers, timeout)
            return
        _check_report(report)
        with progress_bar(transient=True) as bar:
            found = evaluate(files, **options, progress=_progress(bar), peers=peers)
        page = None if report is None else found.save(report)
    _show(found, as_json)
    if page is not None:
        say(f"report: {page}")


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether the user gave an option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _serve(connection: Connection, workers: int | None, timeout: float) -> None:
    """Do the share of the work that process 0 sends."""
    from molgen_energy.distributed import default_workers
    from molgen_energy.metrics.evaluation import PRELOAD
    from molgen_energy.workers import WorkerPool

    count = default_workers() if workers is None else workers
    with WorkerPool(count, timeout, preload=PRELOAD) as pool:
        pool.serve(connection)


def _check_report(report: Path | None) -> None:
    """Raise before the evaluation if the report could not be written."""
    if report is None:
        return
    if report.exists() and not report.is_dir():
        raise InputError(f"{report} is a file; name a folder for the report")
    check_folder(report if report.exists() else report.absolute().parent)
    for path in sorted(report.iterdir()) if report.exists() else ():
        if path.suffix in (".html", ".json", ".png"):
            check_own_file(path)


def _progress(bar: Progress) -> ProgressCallback:
    """Shows progress in a bar, or as lines of a log."""
    log = ThrottledLog()
    task = bar.add_task("evaluating", total=None)

    def progress(done: int, total: int | None) -> None:
        bar.update(task, completed=done, total=total)
        log.say(f"evaluating: {done:,} molecules")

    return progress


def _show(report: Report, as_json: bool) -> None:
    from molgen_energy.metrics.report.table import tables

    if as_json:
        show(json.dumps(report.to_dict(), indent=2))
    else:
        for table in tables(report, stdout):
            show(table)
        if report.summary:
            say(report.summary)
        for file in report.files:
            for line in file.failures:
                say(f"{file.name}: {line}")
    for text in report.warnings():
        warn(text)
