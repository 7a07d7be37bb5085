"""The command line: four verbs, one file each, over plain functions."""

from __future__ import annotations

import typer

from molgen_energy.cli import evaluate, preprocess, sample, train
from molgen_energy.cli.console import exit_on_error


def _version(wanted: bool) -> None:
    if wanted:
        from molgen_energy import __version__

        typer.echo(f"molgen-energy {__version__}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Train and judge generative models of 3D molecules with energy losses."""


def application() -> typer.Typer:
    """The whole command, with the sources and systems that are registered now."""
    app = typer.Typer(
        name="molgen-energy",
        help="Train and judge generative models of 3D molecules with energy losses.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    app.add_typer(preprocess.application(), name="preprocess")
    for verb in (train, sample, evaluate):
        app.command(name=verb.__name__.rsplit(".", 1)[1])(exit_on_error()(verb.command))
    return app


app = application()


def main() -> None:
    """Entry point of `molgen-energy` and of `python -m molgen_energy`."""
    app()
