"""Exceptions with a message for the user: bad input, and work that failed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input. The message is one line: what is wrong, where, and what to do about it.

    The command line prints it and exits with code 2.
    """


class TrainingFailedError(RuntimeError):
    """Training cannot go on; the message names the last good checkpoint. Exit code 1."""


class PeerLostError(RuntimeError):
    """Another process of the job is gone, and work with it. Exit code 1."""


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """Message for a name that is not among the valid ones, with the nearest of them first."""
    names = list(valid)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"unknown {kind} '{name}'{hint} (valid: {', '.join(names)})"
