"""The command line: four commands, one file each, that call the functions of the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from molgen_energy.cli import evaluate, preprocess, sample, train
from molgen_energy.cli.console import exit_on_error, run_program, show
from molgen_energy.output import printable


class _Commands(TyperGroup):
    """The commands. Typer reports bad usage itself, with words that may be those of a file name."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _printable_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _printable_errors():
            return super().invoke(ctx)


@contextmanager
def _printable_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(text := getattr(error, "message", None), str):
            error.message = printable(text)  # type: ignore[attr-defined]
        raise


def _show_version(requested: bool) -> None:
    if requested:
        from molgen_energy import __version__

        show(f"molgen-energy {__version__}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(
        False,
        "--version",
        callback=_show_version,
        is_eager=True,
        help="Show the version and exit.",
    ),
) -> None:
    """Train and evaluate generative models of 3D molecules with energy losses."""


def application() -> typer.Typer:
    """Build the command `molgen-energy` from the registries as they are now."""
    app = typer.Typer(
        cls=_Commands,
        name="molgen-energy",
        help="Train and evaluate generative models of 3D molecules with energy losses.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    app.add_typer(preprocess.application(), name="preprocess")
    for module in (train, sample, evaluate):
        name = module.__name__.rpartition(".")[2]
        app.command(name=name)(exit_on_error()(module.command))
    return app


app = application()


def main() -> None:
    """Entry point of `molgen-energy` and of `python -m molgen_energy`."""
    run_program(app)
