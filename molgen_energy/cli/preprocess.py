"""`molgen-energy preprocess`: QM9, your own molecules, or data that are made, to HDF5."""

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
from molgen_energy.data.datasets.base import Dataset
from molgen_energy.errors import InputError
from molgen_energy.systems.datasets import DATASETS

_READ = "molecules"
"""Name of the command that reads molecules; it need not be typed."""


class _Sources(TyperGroup):
    """What is made has a command of its own; anything else is molecules to read."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = [_READ, *args]
        return list(super().parse_args(ctx, args))


def application() -> typer.Typer:
    """`preprocess` with a command for reading molecules and one for each source."""
    made = typer.Typer(
        cls=_Sources,
        no_args_is_help=True,
        help="Turn QM9, or any SDF or XYZ file, into the HDF5 file that `train` reads: "
        "`preprocess qm9`, `preprocess mine.sdf`. Or make the data of another physical system.",
        context_settings={"help_option_names": ["-h", "--help"]},
        subcommand_metavar="qm9|FILE|" + "|".join(DATASETS) + " [OPTIONS]",
    )
    made.command(name=_READ, help=f"(or nothing) {command.__doc__}")(exit_on_error()(command))
    for source in DATASETS.values():
        made.command(name=source.name, help=source.__doc__)(exit_on_error()(_making(source)))
    return made


def _making(source: type[Dataset]) -> Callable[..., None]:
    """A command whose options are the fields of a source."""

    def make(output: Path, **options: Any) -> None:
        from molgen_energy.data.shards import shards_folder

        began, log = time.monotonic(), ThrottledLog()
        with progress_bar(transient=True) as bar:
            task = bar.add_task(f"making {source.samples}", total=None)

            def progress(done: int, total: int | None) -> None:
                bar.update(task, completed=done, total=total)
                log.say(f"{done:,}{'' if total is None else f' of {total:,}'} {source.samples}")

            try:
                said = source(**options).write(output, progress)
            except (KeyboardInterrupt, OSError):
                if (folder := shards_folder(output)).exists():
                    say(f"what is finished stays in {folder}; the same command goes on with it")
                raise
        say(f"{source.samples} written to {output} in {time.monotonic() - began:.0f} s: {said}")

    types = typing.get_type_hints(source)
    fields: list[tuple[str, Any, Any]] = [
        (
            field.name,
            types[field.name],
            typer.Option(
                field.default,
                f"--{field.name.replace('_', '-')}",
                help=field.metadata["help"],
            ),
        )
        for field in dataclasses.fields(source)  # type: ignore[arg-type]
    ]
    where = typer.Option(Path(source.output), "-o", "--output", help="HDF5 file to write.")
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, kind, default in [*fields, ("output", Path, where)]
    ]
    make.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    make.__annotations__ = {p.name: p.annotation for p in parameters}
    return make


def command(
    what: str = typer.Argument(
        ..., metavar="qm9|FILE", help="qm9, or an SDF or XYZ file of your own (also .gz)."
    ),
    output: Path | None = typer.Option(
        None, "-o", "--output", help="HDF5 file to write; default: named after the input."
    ),
    source: Path | None = typer.Option(
        None,
        "--source",
        help="For qm9: the original archive or folder of dsgdb9nsd_*.xyz files; "
        "default: the installed package qm9pack.",
    ),
    split: str = typer.Option(
        "0.8,0.1,0.1", "--split", help="For a file: shares for training, validation, test."
    ),
    seed: int = typer.Option(0, "--seed", min=0, help="For a file: seed of the split."),
    elements: str | None = typer.Option(
        None, "--elements", help="For a file: the elements that may occur, such as H,C,N,O,F."
    ),
    skip_bad: bool = typer.Option(
        False, "--skip-bad", help="For a file: leave out broken records instead of stopping."
    ),
) -> None:
    """Turn QM9, or any SDF or XYZ file, into the HDF5 file that `train` reads."""
    from molgen_energy.chemistry.molfiles import MoleculeReader
    from molgen_energy.data.datasets.files import preprocess_file, preprocess_qm9
    from molgen_energy.data.datasets.qm9 import MOLECULES
    from molgen_energy.data.splits import parse_fractions

    began = time.monotonic()
    if what.lower() == "qm9" and not Path(what).is_file():
        output = output or Path("qm9.h5")
        with progress_bar(transient=True) as bar:
            task = bar.add_task("reading QM9", total=MOLECULES)
            count = preprocess_qm9(output, source, lambda n: bar.advance(task, n))
    else:
        if source is not None:
            raise InputError("--source goes with qm9; a file is named by itself")
        path = Path(what)
        if what in DATASETS and not path.is_file():
            raise InputError(f"write `preprocess {what}` first, and its options behind it")
        output = output or Path(path.name.removesuffix(".gz")).with_suffix(".h5")
        allowed = None if elements is None else [name.strip() for name in elements.split(",")]
        reader = MoleculeReader(path, skip_bad, allowed)
        with progress_bar(transient=True) as bar:
            task = bar.add_task(f"reading {path.name}", total=None)
            count = preprocess_file(
                reader, output, parse_fractions(split), seed, lambda n: bar.advance(task, n)
            )
        for record in reader.skipped:
            warn(f"left out record {record.number} (line {record.line}): {record.reason}")
        if reader.skipped_count > len(reader.skipped):
            warn(f"… and {reader.skipped_count - len(reader.skipped):,} more")
    say(f"{count:,} molecules written to {output} in {time.monotonic() - began:.0f} s")
    _describe(output)


def _describe(output: Path) -> None:
    from molgen_energy.data.hdf5 import MoleculeFile
    from molgen_energy.data.splits import SPLITS
    from molgen_energy.elements import symbol

    with MoleculeFile(output) as file:
        counts = ", ".join(f"{name} {len(file.split_indices(name)):,}" for name in SPLITS)
        present: set[int] = set()
        flat = True
        for piece in file.chunks(50_000):
            present |= set(piece.molecules.atomic_numbers.tolist())
            flat = flat and not piece.molecules.positions[:, 2].any()
        sizes = file.offsets[1:] - file.offsets[:-1]
    say(f"{counts}; {sizes.min()} to {sizes.max()} atoms of "
        f"{', '.join(symbol(z) for z in sorted(present))}")  # fmt: skip
    if 1 not in present:
        warn("no molecule holds a hydrogen; models and metrics here take hydrogens as atoms")
    if flat:
        warn("all molecules lie in the plane z = 0; is this a file of 2D drawings?")
