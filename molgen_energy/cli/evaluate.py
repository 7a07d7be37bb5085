"""`molgen-energy evaluate`: how good are the molecules in a file?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from molgen_energy.cli.console import ThrottledLog, progress_bar, say, stdout, warn
from molgen_energy.distributed import is_main, lines
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.output import check_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress

    from molgen_energy.metrics.evaluation import Options
    from molgen_energy.metrics.report import Report


def command(
    context: typer.Context,
    files: list[Path] = typer.Argument(
        ..., metavar="FILE…", help="SDF or XYZ (also .gz) or HDF5, of any program."
    ),
    reference: Path | None = typer.Option(
        None, "--reference", help="Real molecules to compare with; default: QM9's test split."
    ),
    train: Path | None = typer.Option(
        None, "--train", help="Training molecules, for novelty; default: QM9's 100,000."
    ),
    report: Path | None = typer.Option(
        None, "--report", metavar="FOLDER", help="Write report.html, report.json and pictures."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
    metrics: str = typer.Option(
        "rates,geometry,composition,strain",
        "--metrics",
        metavar="NAMES",
        help="Also fcd, posebusters, xtb (each an extra to install); or all.",
    ),
    bonds: str = typer.Option(
        "perceived",
        "--bonds",
        metavar="perceived|single|given",
        help="Bonds behind validity, names and connectivity: found from distances; the same, all "
        "taken as single (EDM on GEOM-Drugs); or those in the file.",
    ),
    valence: str = typer.Option(
        "strict",
        "--valence",
        metavar="strict|jodo",
        help="How atoms are judged by the bonds in the file: by chemistry, or as JODO's code does.",
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
        help="Molecules, at random, that strain and PoseBusters look at; xTB takes a tenth.",
    ),
    workers: int | None = typer.Option(
        None,
        "--workers",
        min=0,
        help="Processes; default: one for each processor. Under torchrun, of each of its "
        "processes.",
    ),
    timeout: float = typer.Option(
        20.0, "--timeout", min=1.0, help="Seconds after which one molecule is given up."
    ),
    skip_bad: bool = typer.Option(
        False, "--skip-bad", help="Leave out broken records instead of stopping."
    ),
) -> None:
    """Judge molecules: stability, validity, novelty, geometry, energy, beside real data.

    Or samples of another physical system, which their HDF5 file names.

    Bonds are perceived from distances (EDM's protocol); where a file carries bonds, they are
    judged too. Of an HDF5 file the reference is its test split, and `--train` takes its training
    split.
    """
    from molgen_energy.distributed import default_workers
    from molgen_energy.workers import Workers

    system = _system(files)
    if system != "molecules":
        if is_main():
            _judge(system, files, context, report, as_json)
        return
    count = default_workers() if workers is None else workers
    with lines() as others:
        if not is_main():
            with Workers(count, timeout) as pool:
                pool.serve(others[0])
            return
        options = _options(metrics, bonds, valence, angles, subset, skip_bad)
        _check_report(report)
        page = None
        with progress_bar(transient=True) as bar, Workers(count, timeout, others) as pool:
            from molgen_energy.metrics.run import run

            found = run(files, reference, train, types, options, pool, _watching(bar))
            if report is not None:
                from molgen_energy.metrics.html import write_report

                page = write_report(found, report, files, pool)
    _show(found, as_json)
    if page is not None:
        say(f"report: {page}")


def _check_report(report: Path | None) -> None:
    if report is None:
        return
    if report.exists() and not report.is_dir():
        raise InputError(f"{report} is a file; name a folder for the report")
    check_folder(report if report.exists() else report.absolute().parent)


def _system(files: list[Path]) -> str:
    """The physical system that all files are of; only HDF5 holds others than molecules."""
    systems = {}
    for path in files:
        systems[path] = "molecules"
        if path.suffix.lower() in (".h5", ".hdf5"):
            from molgen_energy.data.hdf5 import system_of

            systems[path] = system_of(path)
    first = systems[files[0]]
    for path, system in systems.items():
        if system != first:
            raise InputError(f"{files[0]} holds {first} and {path} {system}; judge them apart")
    return first


def _judge(
    system: str, files: list[Path], context: typer.Context, report: Path | None, as_json: bool
) -> None:
    """Judge what are no molecules."""
    from molgen_energy.metrics.scores import as_json as to_json
    from molgen_energy.metrics.scores import table, write_report
    from molgen_energy.systems.evaluators import EVALUATORS

    if system not in EVALUATORS:
        raise InputError(f"{files[0]} holds {system}; known are molecules, {', '.join(EVALUATORS)}")
    for name in context.params:
        chosen = context.get_parameter_source(name)
        given = chosen is not None and chosen.name != "DEFAULT"
        if given and name not in ("files", "report", "as_json"):
            raise InputError(f"--{name.replace('_', '-')} is for molecules, not for {system}")
    _check_report(report)
    found = [EVALUATORS[system](path) for path in files]
    page = None if report is None else write_report(found, report)
    if as_json:
        typer.echo(json.dumps(to_json(found), indent=2))
    else:
        for scores in found:
            stdout.print(table(scores))
    for scores in found:
        for note in scores.notes:
            warn(f"{scores.name}: {note}")
    if page is not None:
        say(f"report: {page}")


def _options(
    metrics: str, bonds: str, valence: str, angles: str, subset: int, skip_bad: bool
) -> Options:
    from molgen_energy.chemistry.geometry import COUNTINGS
    from molgen_energy.chemistry.valence import VALENCE_MODELS
    from molgen_energy.metrics.evaluation import Options, parse_metrics
    from molgen_energy.metrics.judging import BOND_CHOICES, Settings

    for option, name, valid in (
        ("--bonds", bonds, BOND_CHOICES),
        ("--valence", valence, VALENCE_MODELS),
        ("--angles", angles, COUNTINGS),
    ):
        if name not in valid:
            raise InputError(unknown_name(f"choice of {option}", name, valid))
    return Options(
        parse_metrics(metrics),
        Settings(bonds=bonds, valence=valence, counting=angles),
        subset,
        skip_bad,
    )


def _watching(bar: Progress) -> Callable[[str, int | None], Callable[[int], None]]:
    """What begins to show progress of something, of so many molecules."""
    log = ThrottledLog()

    def watched(what: str, total: int | None) -> Callable[[int], None]:
        handle = bar.add_task(what, total=total)
        done = 0

        def advance(molecules: int) -> None:
            nonlocal done
            done += molecules
            bar.advance(handle, molecules)
            log.say(f"{what}: {done:,} molecules")

        return advance

    return watched


def _show(found: Report, as_json: bool) -> None:
    from molgen_energy.metrics.report import as_json as to_json
    from molgen_energy.metrics.report import findings_text, tables

    if as_json:
        typer.echo(json.dumps(to_json(found), indent=2))
    else:
        for table in tables(found, stdout):
            stdout.print(table)
        settings = found.options.settings
        say(
            f"bonds {found.samples[0].bonds}; novelty against {found.novelty_against}; "
            f"types: {found.reference.types.name}"
            + ("; angles as JODO lists them" if settings.counting == "jodo" else "")
        )
        for evaluation in found.samples:
            for line in findings_text(evaluation):
                say(f"{evaluation.name}: {line}")
    for text in found.warnings():
        warn(text)
