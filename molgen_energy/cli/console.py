"""What the commands share on the terminal: messages, progress, and the meaning of errors.

Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from molgen_energy.distributed import is_main, rank, world_size
from molgen_energy.errors import InputError, PeerLostError, TrainingFailedError

# Of several processes that do one job, only the first speaks.
stdout = Console(highlight=False, quiet=not is_main())
stderr = Console(stderr=True, highlight=False, quiet=not is_main())

_TRACEBACK = "MOLGEN_ENERGY_TRACEBACK"
# How PyTorch's allocators put it; "index out of range" must not be taken for it.
_OUT_OF_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory")
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
_PATIENCE = 3.0  # seconds


def say(text: str) -> None:
    """A line for the user, on standard error."""
    stderr.print(escape(text), soft_wrap=True)


def warn(text: str) -> None:
    """A line that should not be overlooked."""
    stderr.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)


def _fail(text: str, code: int) -> None:
    if not is_main():
        if code == INTERRUPTED:  # as all are; also those whose first process has just failed
            sys.exit(code)
        # What is wrong for all is said by the first process, which ends the job meanwhile.
        time.sleep(_PATIENCE)
        text = f"process {rank()} of {world_size()}: {text}"
        stderr.quiet = False
    stderr.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)
    sys.exit(code)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Turn what goes wrong into one line and an exit code: 2 bad input, 1 failed work.

    SIGTERM ends a command as Ctrl-C does, so that temporary files go and finished work stays.
    """
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield
    except InputError as error:
        _fail(str(error), BAD_INPUT)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except OSError as error:
        _show_traceback()
        where = f": {error.filename}" if error.filename else ""
        remedy = "; free some and run again" if error.errno == errno.ENOSPC else ""
        _fail(f"{error.strerror or error}{where}{remedy}", BAD_INPUT)
    except (PeerLostError, TrainingFailedError) as error:
        _fail(str(error), FAILED)
    except Exception as error:
        _show_traceback()
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
            _fail("out of memory; take smaller batches or fewer processes", FAILED)
        text = f"{type(error).__name__}: {error}"
        _fail(f"{text} (set {_TRACEBACK}=1 to see where; please report it)", FAILED)


def _show_traceback() -> None:
    if os.environ.get(_TRACEBACK):
        traceback.print_exc()


class ThrottledLog:
    """Lines of progress for a log, where no bar can be drawn: one a minute at most."""

    _SECONDS = 60

    def __init__(self) -> None:
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        """Show the text if there is no terminal and the last one was a minute ago."""
        if not stderr.is_terminal and time.monotonic() - self._last >= self._SECONDS:
            self._last = time.monotonic()
            say(text)


def progress_bar(*columns: str, transient: bool = False) -> Progress:
    """A bar with counts, times, and the given task fields; silent where there is no terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        *(TextColumn(f"{{task.fields[{name}]}}") for name in columns),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=stderr,
        transient=transient,
        disable=not stderr.is_terminal,
    )
