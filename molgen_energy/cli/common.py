"""What all commands share: `-v`, `-q`, one line for every error, and what to do about old files."""

from __future__ import annotations

import functools
import gc
import inspect
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from molgen_energy.cli.console import exit_on_error, is_verbose, say, set_detail
from molgen_energy.errors import InputError
from molgen_energy.resources import resource_directory


def _make_verbose(given: bool) -> None:
    if given:
        set_detail(1)
        say(_versions())


def _make_quiet(given: bool) -> None:
    if given:
        if is_verbose():
            raise InputError("-v and -q exclude each other; leave out one")
        set_detail(-1)


VERBOSE = typer.Option(
    False,
    "-v",
    "--verbose",
    callback=_make_verbose,
    expose_value=False,
    help="Print versions, more progress, and the traceback of an error.",
)
QUIET = typer.Option(
    False,
    "-q",
    "--quiet",
    callback=_make_quiet,
    expose_value=False,
    help="Print results, warnings and errors only.",
)
OVERWRITE = typer.Option(
    False, "--overwrite", rich_help_panel="Output", help="Replace files that exist."
)


@contextmanager
def imports() -> Iterator[None]:
    """Import large modules without garbage collection, which takes a sixth of that time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def with_common_options(function: Callable[..., None]) -> Callable[..., None]:
    """The function of a command with the options `-v` and `-q`, and errors in one line."""

    @functools.wraps(function)
    def run(*arguments: Any, verbose: bool, quiet: bool, **options: Any) -> None:
        with exit_on_error():
            function(*arguments, **options)

    signature = inspect.signature(function)
    types = typing.get_type_hints(function)
    own = [
        parameter.replace(annotation=types[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
    ]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=bool)
        for name, option in (("verbose", VERBOSE), ("quiet", QUIET))
    ]
    run.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
    run.__annotations__ = {**types, "verbose": bool, "quiet": bool}
    return run


def one_of(*names: str) -> Callable[[str], list[str]]:
    """For the completion of an option: its values."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def checkpoints(incomplete: str) -> list[str]:
    """For completion: the names of pretrained weights, and the runs in `runs/`."""
    weights = sorted(path.name for path in (resource_directory("assets") / "weights").glob("*/"))
    runs = sorted(str(path.parent) for path in Path("runs").glob("*/checkpoints"))
    return [name for name in (*weights, *runs) if name.startswith(incomplete)]


def check_new_file(path: Path, overwrite: bool, option: str = "-o") -> None:
    """Check that a command does not replace a file that `option` names, unless it may.

    Raises
    ------
    InputError
        The file exists.
    """
    if path.is_file() and not overwrite:
        raise InputError(
            f"{path} exists; name another with {option}, or replace it with --overwrite"
        )


def check_output(path: Path, is_default: bool, overwrite: bool) -> None:
    """Check a file as `check_new_file`; one that the user did not name is replaced, which is said.

    Raises
    ------
    InputError
        The user named a file that exists.
    """
    if not is_default:
        check_new_file(path, overwrite)
    elif path.is_file() and not overwrite:
        say(f"{path} exists and is replaced once the new file is complete; -o names another")


def _versions() -> str:
    """Versions of what the results depend on, in a line."""
    import platform
    from importlib.metadata import version

    from molgen_energy import __version__

    parts = [f"molgen-energy {__version__}", f"Python {platform.python_version()}"]
    parts += [f"{name} {version(name)}" for name in ("torch", "rdkit", "numpy")]
    return f"{', '.join(parts)}; {platform.system()} {platform.machine()}"
