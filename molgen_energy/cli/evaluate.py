"""`molgen-energy evaluate`: how good are the molecules in a file?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import typer

from molgen_energy.cli.console import progress_bar, say, stdout, warn


def command(
    files: list[Path] = typer.Argument(
        ..., metavar="FILE…", help="SDF or XYZ (also .gz) or HDF5, of any program."
    ),
    reference: Path | None = typer.Option(
        None, "--reference", help="Real molecules to compare with; default: bundled QM9."
    ),
    train: Path | None = typer.Option(
        None, "--train", help="Training molecules, for novelty; default: QM9's 100,000."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON instead of a table."),
    skip_bad: bool = typer.Option(
        False, "--skip-bad", help="Leave out broken records instead of stopping."
    ),
) -> None:
    """Judge molecules: stability, validity, uniqueness, novelty, connectivity, beside real data.

    Bonds are perceived from distances (EDM's protocol), also where a file carries its own. Of an
    HDF5 file the reference is its test split, and `--train` takes its training split.
    """
    from molgen_energy.data.molecules import Molecules
    from molgen_energy.metrics.evaluation import evaluate, over_regular, training_smiles
    from molgen_energy.metrics.reference import MoleculeSource, qm9_training_smiles
    from molgen_energy.metrics.report import as_json as to_json
    from molgen_energy.metrics.report import table
    from molgen_energy.resources import bundled_sample

    sources = [MoleculeSource(path, skip_bad=skip_bad) for path in files]
    # File names alone where they tell the files apart.
    plain = len({path.name for path in files}) == len(files)
    names = {path: path.name if plain else str(path) for path in files}
    held_out = MoleculeSource(reference or bundled_sample(), "test", skip_bad)
    seen = None if train is None else MoleculeSource(train, "train", skip_bad)
    with progress_bar(transient=True) as bar:
        handle = bar.add_task("evaluating", total=None)

        def counted(source: MoleculeSource) -> Iterator[Molecules]:
            for piece in source.pieces():
                yield piece
                bar.advance(handle, len(piece))

        known: set[str] | None
        if seen is None:
            known, against = qm9_training_smiles(), "QM9's 100,000 training molecules (bundled)"
        else:
            known = training_smiles(counted(seen))
            against = str(train)
        evaluations = []
        for path, source in zip(files, sources, strict=True):
            evaluation = evaluate(names[path], counted(source), known, skip_bad)
            evaluation.skipped += source.skipped
            evaluations.append(evaluation)
        name = "QM9 test" if reference is None else str(reference)
        data = evaluate(name, counted(held_out), known, skip_bad)
        data.skipped += held_out.skipped
    for evaluation in evaluations:
        if over_regular(evaluation, data):
            evaluation.notes.append(
                "more often stable than real data: over-regular, not better than the data"
            )
    if as_json:
        typer.echo(json.dumps(to_json(evaluations, data, against), indent=2))
    else:
        stdout.print(table(evaluations, data))
        say(f"bonds perceived from distances; novelty against {against}")
    if known is None:
        warn(
            "novelty is n/a: this RDKit names molecules otherwise than the one that wrote the "
            "bundled list; pass --train qm9.h5"
        )
    for known_source in filter(None, (held_out, seen)):
        if known_source.note:
            warn(f"{known_source.path}: {known_source.note}")
    if seen is not None and seen.skipped:
        warn(f"{seen.path}: {seen.skipped:,} bad records left out")
    for evaluation in [*evaluations, data]:
        for note in evaluation.notes:
            warn(f"{evaluation.name}: {note}")
        if evaluation.skipped:
            warn(f"{evaluation.name}: {evaluation.skipped:,} bad records left out of all rates")
