"""`molgen-energy evaluate`: how good are the samples in a file?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from molgen_energy.cli.common import OVERWRITE, check_new_file, one_of
from molgen_energy.cli.console import ThrottledLog, progress_bar, say, show, stdout, warn
from molgen_energy.distributed import is_main, worker_connections
from molgen_energy.errors import InputError
from molgen_energy.output import atomic_write, check_folder, check_own_file, check_writable

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from rich.progress import Progress

    from molgen_energy.metrics.report.model import Report
    from molgen_energy.progress import ProgressCallback

# Panels of the help.
_DATA, _WHAT, _COMPUTATION = "Data to compare with", "What to measure", "Computation"
_METRICS = (
    "default",
    "all",
    "rates",
    "geometry",
    "composition",
    "strain",
    "descriptors",
    "similarity",
    "fcd",
    "posebusters",
    "xtb",
)
EXAMPLES = """
molgen-energy evaluate samples.sdf
molgen-energy evaluate mine.sdf theirs.xyz --report report
molgen-energy evaluate samples.sdf --metrics default,posebusters
"""
_REFERENCES = ("qm9", "ccd")  # names of `BUNDLED`, the default first
_OUTPUTS = ("files", "report", "json_file", "per_molecule", "overwrite")  # no options of the API
_STDOUT = Path("-")


def _json_file(path: Path | None) -> Path | None:
    if path is not None and path != _STDOUT and path.suffix.lower() != ".json":
        raise typer.BadParameter(f"{path}: name a file .json, or - to print JSON")
    return path


def _csv_file(path: Path | None) -> Path | None:
    if path is not None and path.suffix.lower() != ".csv":
        raise typer.BadParameter(f"{path}: name a file .csv")
    return path


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
        rich_help_panel=_DATA,
        metavar="FILE|NAME",
        autocompletion=one_of(*_REFERENCES),
        help="Real molecules to compare with, or statistics of a test split that ship: "
        f"{', '.join(_REFERENCES)}. Default: those of the data that the samples' network was "
        f"trained on, else {_REFERENCES[0]}.",
    ),
    train: str | None = typer.Option(
        None,
        "--train",
        rich_help_panel=_DATA,
        metavar="FILE",
        help="Training molecules, for novelty; default: those of --reference.",
    ),
    predictor: str | None = typer.Option(
        None,
        "--predictor",
        rich_help_panel=_DATA,
        metavar="RUN|xtb",
        help="Network that predicts the properties which samples were asked for, a run of `train "
        "--config qm9_properties`; real molecules are those of --reference FILE.h5, else of its "
        "data. xtb: GFN2-xTB, calibrated on --reference.",
    ),
    report: Path | None = typer.Option(
        None,
        "--report",
        rich_help_panel="Output",
        metavar="FOLDER",
        help="Write report.html, report.json and pictures.",
    ),
    json_file: Path | None = typer.Option(
        None,
        "--json",
        rich_help_panel="Output",
        callback=_json_file,
        is_eager=True,  # so that a file of molecules in this place is what the error names
        metavar="FILE|-",
        help="Write all numbers as JSON too; -: print them instead of the table.",
    ),
    per_molecule: Path | None = typer.Option(
        None,
        "--per-molecule",
        rich_help_panel="Output",
        callback=_csv_file,
        is_eager=True,
        metavar="FILE",
        help="Write a CSV with a row for each molecule: stable, valid, why not, strain, "
        "PoseBusters' checks, SMILES.",
    ),
    overwrite: bool = OVERWRITE,
    metrics: str = typer.Option(
        "default",
        "--metrics",
        rich_help_panel=_WHAT,
        autocompletion=one_of(*_METRICS),
        metavar="NAMES",
        help="Some of rates, geometry, composition, strain (these are the default), descriptors "
        "(rings, QED, logP, …), similarity (SNN, Frag, Scaf) and fcd, posebusters, xtb (each an "
        "extra to install): default,fcd adds one; or all.",
    ),
    bonds: str = typer.Option(
        "auto",
        "--bonds",
        rich_help_panel=_WHAT,
        autocompletion=one_of("auto", "perceived", "single", "given", "both"),
        metavar="NAME",
        help="Bonds of all checks. given: those of the file; perceived: from distances; single: "
        "perceived, and all single for validity (EDM on GEOM-Drugs); both: given and perceived "
        "side by side; auto: given where every record has them.",
    ),
    valence: str | None = typer.Option(
        None,
        "--valence",
        rich_help_panel=_WHAT,
        autocompletion=one_of("strict", "geom", "jodo", "edm"),
        metavar="NAME",
        help="Which bonds make an atom stable. strict: as RDKit allows for its charge (default "
        "for given bonds); geom, jodo: tables of GEOM-Drugs Revisited and JODO; edm: that of EDM "
        "(default for perceived bonds).",
    ),
    angles: str = typer.Option(
        "once",
        "--angles",
        rich_help_panel=_WHAT,
        autocompletion=one_of("once", "jodo"),
        metavar="NAME",
        help="once: count every angle and dihedral once; jodo: as JODO's code does.",
    ),
    types: str | None = typer.Option(
        None,
        "--types",
        rich_help_panel=_WHAT,
        autocompletion=one_of("qm9", "geom", "frequent"),
        metavar="NAME",
        help="Types of bonds, angles and dihedrals to compare. qm9, geom: JODO's lists; frequent: "
        "the eight most frequent of the reference. Default: qm9 for QM9, else frequent.",
    ),
    subset: int = typer.Option(
        1000,
        "--subset",
        rich_help_panel=_WHAT,
        metavar="N",
        min=1,
        help="Number of random molecules for strain and PoseBusters; xTB takes a tenth.",
    ),
    workers: int | None = typer.Option(
        None,
        "--workers",
        rich_help_panel=_COMPUTATION,
        metavar="N",
        min=0,
        help="Number of processes; default: one for each processor. With torchrun, for each of its "
        "processes.",
    ),
    timeout: float = typer.Option(
        20.0,
        "--timeout",
        rich_help_panel=_COMPUTATION,
        metavar="SECONDS",
        min=1.0,
        help="Seconds after which one molecule times out.",
    ),
    skip_bad: bool = typer.Option(
        False,
        "--skip-bad",
        rich_help_panel=_COMPUTATION,
        help="Skip broken records instead of stopping.",
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
        if name not in _OUTPUTS and _is_given(context, name)
    }
    with worker_connections() as peers:
        if not is_main():
            _serve(peers[0], workers, timeout)
            return
        _check_report(report, overwrite)
        for path, option in ((json_file, "--json"), (per_molecule, "--per-molecule")):
            if path is not None and path != _STDOUT:
                check_writable(path)
                check_new_file(path, overwrite, option)
        with progress_bar(transient=True) as bar:
            found = evaluate(
                files,
                **options,
                per_molecule=per_molecule is not None,
                progress=_progress(bar),
                peers=peers,
            )
        page = None if report is None else found.save(report)
        if per_molecule is not None and found.molecules is not None:
            found.molecules.save(per_molecule)
        numbers = json.dumps(found.to_dict(), indent=2)
        if json_file is not None and json_file != _STDOUT:
            atomic_write(json_file, f"{numbers}\n".encode())
    if json_file == _STDOUT:
        show(numbers)
    else:
        _show(found)
    for text in found.warnings():
        warn(text)
    for what, path in (("report", page), ("JSON", json_file), ("molecules", per_molecule)):
        if path is not None and path != _STDOUT:
            say(f"{what}: {path}")


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether the user gave an option."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _serve(connection: Connection, workers: int | None, timeout: float) -> None:
    """Do the share of the work that process 0 sends."""
    from molgen_energy.distributed import worker_count
    from molgen_energy.metrics.evaluation import PRELOAD
    from molgen_energy.workers import WorkerPool

    count = worker_count(workers)
    with WorkerPool(count, timeout, preload=PRELOAD) as pool:
        pool.serve(connection)


def _check_report(report: Path | None, overwrite: bool) -> None:
    """Raise before the evaluation if the report could not be written."""
    if report is None:
        return
    if report.exists() and not report.is_dir():
        raise InputError(f"{report} is a file; name a folder for the report")
    check_folder(report if report.exists() else report.absolute().parent)
    check_new_file(report / "report.html", overwrite, "--report")
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


def _show(report: Report) -> None:
    from molgen_energy.metrics.report.table import tables

    for table in tables(report, stdout):
        show(table)
    if report.summary:
        say(report.summary, wrap=True)
    for file in report.files:
        for line in file.failures:
            say(f"{file.name}: {line}", wrap=True)
