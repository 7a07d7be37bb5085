"""Paths in files that people share: the configuration in a run's folder names no folder of a user.

A path is stored relative to the folder where the command was started, or as `~/…`. The file is
found again from the folders above the run, so a project may be copied or moved as a whole.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from molgen_energy.output import real_path, valid_unicode

_HOME = "~/"


def portable_path(path: Path) -> str:
    """A path relative to the current folder or the user's home, the inner one that it lies in."""
    absolute = Path(os.path.normpath(path.absolute()))
    bases = [("", Path.cwd())]
    with suppress(RuntimeError):  # there is no home
        bases += [(_HOME, Path.home()), (_HOME, real_path(Path.home()))]
    around = [(start, base) for start, base in bases if absolute.is_relative_to(base)]
    if not around:
        return valid_unicode(absolute)
    start, base = max(around, key=lambda place: len(place[1].parts))
    return start + valid_unicode(absolute.relative_to(base).as_posix())


def expand_home(text: str) -> Path:
    """The path of a text that may begin with `~/`."""
    if text.startswith(_HOME):
        with suppress(RuntimeError):
            return Path.home() / text.removeprefix(_HOME)
    return Path(text)


def find_again(text: str, run: Path) -> Path:
    """The file or folder that a run names by `portable_path`.

    Parameters
    ----------
    text
        The stored path. A relative one is looked for in the folders above the run, from the nearest
        on, and then in the current folder.
    run
        Folder of the run, or in it.

    Returns
    -------
    The path, which need not exist.
    """
    path = expand_home(text)
    if not path.is_absolute():
        for folder in real_path(run).parents:
            if (folder / path).exists():
                return folder / path
    return path
