"""The command line: one file for each command, which calls the functions of the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from molgen_energy.cli import evaluate, info, preprocess, sample, train
from molgen_energy.cli.common import QUIET, VERBOSE, with_common_options
from molgen_energy.cli.console import exit_on_error, run_program, set_detail, show
from molgen_energy.cli.help import HelpfulCommand, HelpfulGroup
from molgen_energy.errors import InputError

_EXAMPLES = """
molgen-energy preprocess mine.sdf -o mine.h5
molgen-energy train --loss energy --data mine.h5
molgen-energy sample -n 1000 -o samples.sdf
molgen-energy evaluate samples.sdf --report report
"""


_SUMMARIES = {
    "preprocess": "Make the HDF5 file that `train` reads.",
    "train": "Train a model.",
    "sample": "Sample molecules from a trained model, or from pretrained weights.",
    "evaluate": "Evaluate molecules beside real ones.",
    "info": "Show what is installed: versions, devices, extras, weights.",
}

# Where a name belongs that stands alone behind a command.
_OPTIONS_OF_NAMES = {
    "sample": ": name a run or weights with --checkpoint, a file with -o",
    "train": ": name data with --data, a configuration with --config",
}


class _Commands(HelpfulGroup):
    """All commands. Bad usage, which Typer reports in a box, is one line as other bad input."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of their use; Typer lists groups last."""
        return sorted(super().list_commands(ctx), key=list(_SUMMARIES).index)

    def get_params(self, ctx: Any) -> Any:
        """All are flags. Typer imports pydantic, for 0.1 s, to validate those without a default."""
        options = super().get_params(ctx)
        for option in options:
            if option.default is None:
                option.default = False
        return options

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        set_detail(0)  # a process may run several commands, as tests do
        with _usage_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _usage_errors():
            return super().invoke(ctx)


@contextmanager
def _usage_errors() -> Iterator[None]:
    """Report usage errors of Typer, whose class it does not export, and those of callbacks."""
    try:
        yield
    except InputError as error:
        _report(error)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        text = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":
            show(text.rstrip("\n"))
            raise typer.Exit from None
        context = getattr(error, "ctx", None)
        where = "" if context is None else f" (see {context.command_path} --help)"
        message = " ".join(text.split()).rstrip(".")
        if context is not None and "unexpected extra argument" in message:
            message += _OPTIONS_OF_NAMES.get(context.info_name, "")
        _report(InputError(message[:1].lower() + message[1:] + where))


def _report(error: InputError) -> NoReturn:
    """Print an error, and exit."""
    with exit_on_error():
        raise error from None
    raise AssertionError  # not reached


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
    verbose: bool = VERBOSE,
    quiet: bool = QUIET,
) -> None:
    """Train and evaluate generative models of 3D molecules with energy losses."""


def application() -> typer.Typer:
    """Build the command `molgen-energy` from the registries as they are now."""
    app = typer.Typer(
        cls=_Commands,
        name="molgen-energy",
        help="Train and evaluate generative models of 3D molecules with energy losses.",
        epilog=_EXAMPLES,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        subcommand_metavar="COMMAND [OPTIONS]",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    app.add_typer(preprocess.application(), name="preprocess", short_help=_SUMMARIES["preprocess"])
    for module in (train, sample, evaluate, info):
        name = module.__name__.rpartition(".")[2]
        decorate = app.command(
            name=name, cls=HelpfulCommand, short_help=_SUMMARIES[name], epilog=module.EXAMPLES
        )
        decorate(with_common_options(module.command))
    return app


app = application()


def main() -> None:
    """Run the command of this process's arguments."""
    run_program(app)
