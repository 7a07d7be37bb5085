"""`molgen-energy preprocess`: a dataset, or molecules of your own, to HDF5."""

from __future__ import annotations

import dataclasses
import inspect
import time
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from molgen_energy.cli.console import ThrottledLog, exit_on_error, progress_bar, say, warn
from molgen_energy.datasets.base import Dataset
from molgen_energy.datasets.files import MoleculeFiles
from molgen_energy.datasets.smiles import SmilesFiles, is_smiles_file
from molgen_energy.errors import InputError
from molgen_energy.systems.datasets import DATASETS


class _DatasetCommands(TyperGroup):
    """A command for each dataset; `preprocess FILE` is short for `preprocess files FILE`.

    With a file of SMILES it is short for `preprocess smiles FILE`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].lower() in self.commands:
            args = [args[0].lower(), *args[1:]]
        elif args and args[0] not in ("-h", "--help"):
            smiles = any(is_smiles_file(arg) for arg in args if not arg.startswith("-"))
            args = [SmilesFiles.name if smiles else MoleculeFiles.name, *args]
        return list(super().parse_args(ctx, args))


def application() -> typer.Typer:
    """`preprocess` with a command for each dataset."""
    app = typer.Typer(
        cls=_DatasetCommands,
        no_args_is_help=True,
        help="Make the HDF5 file that `train` reads: of your own SDF, XYZ or SMILES files, "
        "`preprocess mine.sdf`, or of a dataset, `preprocess qm9`.",
        context_settings={"help_option_names": ["-h", "--help"]},
        subcommand_metavar="FILE…|" + "|".join(DATASETS) + " [OPTIONS]",
    )
    for dataset in DATASETS.values():
        app.command(name=dataset.name, help=dataset.__doc__)(exit_on_error()(_command(dataset)))
    return app


def _command(dataset: type[Dataset]) -> Callable[..., None]:
    """A command whose options are the fields of a dataset."""
    types = typing.get_type_hints(dataset)
    parameters = [
        _parameter(field, types[field.name])
        for field in dataclasses.fields(dataset)  # type: ignore[arg-type]
    ]
    output = typer.Option(
        None, "-o", "--output", help=f"HDF5 file to write; default: {dataset.output}."
    )
    parameters.append(("output", Path | None, output))

    def run(output: Path | None, **options: Any) -> None:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        _run(dataset(**values), output)

    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind
            )
            for name, kind, default in parameters
        ]
    )
    run.__annotations__ = {name: kind for name, kind, _ in parameters}
    return run


def _parameter(field: dataclasses.Field[Any], kind: Any) -> tuple[str, Any, Any]:
    """Name, type and default of an option or argument, as Typer takes them."""
    text = field.metadata["help"]
    if "metavar" in field.metadata:
        # As text, because an empty name as a `Path` would be the current folder.
        return (
            field.name,
            list[str],
            typer.Argument(..., metavar=field.metadata["metavar"], help=text),
        )
    flag = f"--{field.name.replace('_', '-')}"
    return field.name, kind, typer.Option(field.default, flag, help=text)


def _run(dataset: Dataset, output: Path | None) -> None:
    """Make the file, show progress, and print the summary."""
    from molgen_energy.api.preprocess import preprocess
    from molgen_energy.data.shards import shards_folder

    if isinstance(dataset, (MoleculeFiles, SmilesFiles)):
        for file in dataset.files:
            if str(file) in DATASETS and not file.is_file():
                raise InputError(f"write `preprocess {file}` first, then its options")
    path = dataset.default_output() if output is None else output
    began, log = time.monotonic(), ThrottledLog()
    with progress_bar(transient=True) as bar:
        task = bar.add_task(f"preprocessing {dataset.name}", total=None)

        def progress(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total)
            of = "" if total is None else f" of {total:,}"
            log.say(f"{done:,}{of} {dataset.samples}")

        try:
            result = preprocess(dataset, path, progress=progress)
        except (KeyboardInterrupt, OSError, InputError):
            if (folder := shards_folder(path)).exists():
                say(f"finished work stays in {folder}; repeat the command to continue")
            raise
    for text in result.skipped:
        warn(f"left out {text}")
    if result.skipped_count > len(result.skipped):
        warn(f"… and {result.skipped_count - len(result.skipped):,} more")
    seconds = time.monotonic() - began
    say(f"{result.count:,} {result.samples} written to {result.path} in {seconds:.0f} s")
    counts = ", ".join(f"{name} {count:,}" for name, count in result.counts.items())
    say(f"{counts}; {result.summary}")
    for text in result.warnings:
        warn(text)
