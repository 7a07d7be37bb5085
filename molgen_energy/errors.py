"""Exceptions whose message is for the user, and the exit codes that they lead to."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

MEND_OR_SKIP = "mend it or pass --skip-bad to leave out such records"
"""The remedy for a bad record of a file."""

_MOST_SHOWN = 60  # characters of a name in a message


class InputError(ValueError):
    """Bad input. The message is one line: what is wrong, in which file and record, and the remedy.

    The command line prints the message and exits with code 2.
    """


class TrainingFailedError(RuntimeError):
    """Training cannot continue; the message names the last valid checkpoint. Exit code 1."""


class PeerLostError(RuntimeError):
    """A worker process, or another process of a `torchrun` job, ended with its work unfinished.

    Exit code 1.
    """


def unknown_name(kind: str, name: str, valid: Iterable[str]) -> str:
    """Message for an unknown name of some kind: the closest valid name, and all valid ones."""
    names = list(valid)
    if len(name) > _MOST_SHOWN:
        name = f"{name[:_MOST_SHOWN]}…"
    closest = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean '{closest[0]}'?" if closest else ""
    valid_names = f"valid: {', '.join(names)}" if names else "there is none"
    return f"unknown {kind} '{name}'{hint} ({valid_names})"


def counted(number: int, plural: str) -> str:
    """A number of things in words: `1 molecule`, `1,000 molecules`, `1 spin glass`."""
    if number != 1:
        return f"{number:,} {plural}"
    head, _, noun = plural.rpartition(" ")
    singular = noun.removesuffix("es") if noun.endswith("sses") else noun.removesuffix("s")
    return f"{number} {f'{head} {singular}' if head else singular}"
