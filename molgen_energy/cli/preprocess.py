"""`molgen-energy preprocess`: a dataset, or molecules of your own, to HDF5."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import time
import typing
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from molgen_energy.cli.common import OVERWRITE, check_output, with_common_options
from molgen_energy.cli.console import ThrottledLog, progress_bar, say, warn
from molgen_energy.cli.help import HelpfulCommand, HelpfulGroup
from molgen_energy.errors import InputError, counted

if TYPE_CHECKING:
    from molgen_energy.datasets.base import Dataset

_EXAMPLES = """
molgen-energy preprocess mine.sdf -o mine.h5
molgen-energy preprocess 'frames/*.xyz' --skip-bad -o frames.h5
molgen-energy preprocess mine.smi --conformers 5
molgen-energy preprocess qm9
"""
_METAVARS: dict[Any, str] = {
    int: "N", float: "X", Path: "PATH", str: "TEXT", list[str]: "NAME=rdkit:DESCRIPTOR",
}  # fmt: skip
_PANELS = {
    "Which records": ("elements", "skip_bad", "largest_fragment", "require_hydrogens",
        "drop_duplicates", "types"),
    "Split": ("group", "split", "seed"),
    "Computation": ("workers", "timeout"),
}  # fmt: skip
"""Panels of the help for fields that several datasets have; all others are in `_OWN_PANEL`."""
_OWN_PANEL = "Data"


class _DatasetCommands(HelpfulGroup):
    """A command for each dataset; `preprocess FILE` is short for `preprocess files FILE`.

    With a file of SMILES it is short for `preprocess smiles FILE`. The commands are made when they
    are needed, because importing all datasets takes half of the time of `molgen-energy --help`.
    """

    _commands: dict[str, Any] | None = None

    @property
    def commands(self) -> MutableMapping[str, Any]:
        """The commands by name."""
        if self._commands is None:
            self._commands = _dataset_commands()
        return self._commands

    @commands.setter
    def commands(self, empty: Any) -> None:
        """Typer passes those that are registered at the start: none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        from molgen_energy.datasets.files import MoleculeFiles
        from molgen_energy.datasets.smiles import SmilesFiles, is_smiles_file

        if args and args[0].lower() in self.commands:
            args = [args[0].lower(), *args[1:]]
        elif args and args[0] not in ("-h", "--help"):
            if not ctx.resilient_parsing:
                self._refuse_misspelt(args[0])
            smiles = any(is_smiles_file(arg) for arg in args if not arg.startswith("-"))
            args = [SmilesFiles.name if smiles else MoleculeFiles.name, *args]
        return list(super().parse_args(ctx, args))

    def _refuse_misspelt(self, name: str) -> None:
        """Raise `InputError` for the beginning or a misspelling of a dataset that is no path."""
        names = [known for known in self.commands if known.startswith(name.lower())]
        names = names or difflib.get_close_matches(name.lower(), self.commands, 1, cutoff=0.8)
        if len(names) == 1 and not Path(name).exists():
            raise InputError(f"{name} does not exist; did you mean `preprocess {names[0]}`?")


def application() -> typer.Typer:
    """`preprocess` with a command for each dataset."""
    return typer.Typer(
        cls=_DatasetCommands,
        no_args_is_help=True,
        help="Make the HDF5 file that `train` reads, of your own molecules or of a dataset.\n\n"
        "`preprocess FILE…` takes SDF, XYZ and SMILES files, folders and patterns in quotes; "
        "`preprocess files --help` and `preprocess smiles --help` list its options.",
        epilog=_EXAMPLES,
        context_settings={"help_option_names": ["-h", "--help"]},
        subcommand_metavar="FILE…|DATASET [OPTIONS]",
    )


def _dataset_commands() -> dict[str, Any]:
    """The commands of all datasets by name."""
    from molgen_energy.systems.datasets import DATASETS

    app = typer.Typer()
    for dataset in DATASETS.values():
        command = app.command(name=dataset.name, cls=HelpfulCommand, help=dataset.__doc__)
        command(with_common_options(_command(dataset)))
    group: Any = typer.main.get_group(app)
    return dict(group.commands)


def _command(dataset: type[Dataset]) -> Callable[..., None]:
    """A command whose options are the fields of a dataset."""
    types = typing.get_type_hints(dataset)
    parameters = [
        _parameter(field, types[field.name])
        for field in dataclasses.fields(dataset)  # type: ignore[arg-type]
    ]
    output = typer.Option(
        None,
        "-o",
        "--output",
        metavar="FILE.h5",
        rich_help_panel="Output",
        help=f"HDF5 file to write; default: {dataset.output}.",
    )
    parameters += [("output", Path | None, output), ("overwrite", bool, OVERWRITE)]

    def run(output: Path | None, overwrite: bool, **options: Any) -> None:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        _run(dataset(**values), output, overwrite)

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
    if kind == tuple[str, ...]:  # an option that may be repeated
        kind = list[str]
    flag = f"--{field.name.replace('_', '-')}"
    metavar = next((word for plain, word in _METAVARS.items() if kind in (plain, plain | None)), "")
    panel = next((title for title, names in _PANELS.items() if field.name in names), _OWN_PANEL)
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    option = typer.Option(default, flag, metavar=metavar or None, help=text, rich_help_panel=panel)
    return field.name, kind, option


def _run(dataset: Dataset, output: Path | None, overwrite: bool) -> None:
    """Make the file, show progress, and print the summary."""
    from molgen_energy.api.preprocess import preprocess
    from molgen_energy.data.hdf5 import check_hdf5_name
    from molgen_energy.data.shards import shards_folder
    from molgen_energy.datasets.files import MoleculeFiles
    from molgen_energy.datasets.smiles import SmilesFiles
    from molgen_energy.systems.datasets import DATASETS

    if isinstance(dataset, (MoleculeFiles, SmilesFiles)):
        for file in dataset.files:
            if str(file) in DATASETS and not file.is_file():
                raise InputError(f"write `preprocess {file}` first, then its options")
    path = dataset.default_output() if output is None else output
    check_hdf5_name(path)
    check_output(path, output is None, overwrite)
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
    done = counted(result.count, result.samples)
    say(f"{done} written to {result.path} in {seconds:.0f} s")
    counts = ", ".join(f"{name} {count:,}" for name, count in result.counts.items())
    first, *others = result.summary.split("; ")
    say(f"{counts}; {first}")
    for fact in others:
        say(f"  {fact}")
    for text in result.warnings:
        warn(text)
