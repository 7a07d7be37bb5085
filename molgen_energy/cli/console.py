"""Messages, progress bars and exit codes of all commands.

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

# Of the processes of a torchrun job, only process 0 writes to the terminal.
# Without emoji, the text `a:b:` of a bad option stays as it is.
stdout = Console(highlight=False, emoji=False, quiet=not is_main())
stderr = Console(stderr=True, highlight=False, emoji=False, quiet=not is_main())

_TRACEBACK = "MOLGEN_ENERGY_TRACEBACK"
# The words of PyTorch's allocators; "index out of range" must not match.
_OUT_OF_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory")
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
_GRACE = 3.0  # s, for process 0 to report an error first
_detail = 0


def set_detail(level: int) -> None:
    """How much to print: -1 results, warnings and errors; 0 also progress; 1 all details."""
    global _detail
    _detail = level


def is_verbose() -> bool:
    """Whether to print all details."""
    return _detail > 0


def say(text: str) -> None:
    """Print a line for the user, on standard error, unless the command is quiet."""
    if _detail < 0:
        return
    stderr.print(escape(text), soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning, on standard error."""
    stderr.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)


def _fail(text: str, code: int) -> None:
    """Print an error and exit."""
    if not is_main():
        if code == INTERRUPTED:  # all processes are, also after process 0 has failed
            sys.exit(code)
        # If process 0 has the same error, it reports it and ends the job during this time.
        time.sleep(_GRACE)
        text = f"process {rank()} of {world_size()}: {text}"
        stderr.quiet = False
    stderr.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)
    sys.exit(code)


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Report an exception in one line and exit: code 2 bad input, 1 failed work, 130 interrupted.

    SIGTERM raises `KeyboardInterrupt` as Ctrl-C does, so that temporary files are removed and
    finished work is kept.
    """
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield
    except InputError as error:
        _fail(str(error), BAD_INPUT)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the program that reads the output has exited, for instance `head`
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
            _fail("out of memory; use smaller batches or fewer processes", FAILED)
        text = f"{type(error).__name__}: {error}"
        _fail(f"{text} (please report it; -v shows the traceback)", FAILED)


def _show_traceback() -> None:
    if is_verbose() or os.environ.get(_TRACEBACK):
        traceback.print_exc()


def duration(seconds: float) -> str:
    """A time in words: `4.2 s`, `3.1 minutes`, `5.0 hours`, `2.5 days`."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s"


class ThrottledLog:
    """Progress messages where there is no terminal for a bar, at most one a minute.

    With all details they come on a terminal too, every five seconds.
    """

    _SECONDS, _SECONDS_VERBOSE = 60, 5

    def __init__(self) -> None:
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        """Print the text if it is due."""
        seconds = self._SECONDS_VERBOSE if is_verbose() else self._SECONDS
        shown = is_verbose() or not stderr.is_terminal
        if shown and time.monotonic() - self._last >= seconds:
            self._last = time.monotonic()
            say(text)


def progress_bar(*columns: str, transient: bool = False) -> Progress:
    """A progress bar with counts, times and the named task fields; hidden without a terminal."""
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
        disable=not stderr.is_terminal or _detail < 0,
    )
