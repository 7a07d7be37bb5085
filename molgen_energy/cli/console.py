"""Messages, progress bars and exit codes of all commands.

Results go to standard output, everything else to standard error. Texts may come from anybody's
files: whatever is printed here has neither control characters nor Rich's markup in it.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from molgen_energy.distributed import is_main, rank, world_size
from molgen_energy.errors import InputError, PeerLostError, TrainingFailedError
from molgen_energy.output import printable


class _SafeConsole(Console):
    """A console that shows control characters of texts, tables and bars as `\\x1b`."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            if control is None:  # else a movement of the cursor, by Rich itself
                text = "\n".join(map(printable, text.split("\n")))
            yield Segment(text, style, control)


# Of the processes of a torchrun job, only process 0 writes to the terminal.
# Without emoji, the text `a:b:` of a bad option stays as it is.
stdout = _SafeConsole(highlight=False, emoji=False, quiet=not is_main())
stderr = _SafeConsole(stderr=True, highlight=False, emoji=False, quiet=not is_main())

_TRACEBACK = "MOLGEN_ENERGY_TRACEBACK"
# The words of PyTorch's allocators; "index out of range" must not match.
_OUT_OF_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory")
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
_GRACE = 3.0  # s, for process 0 to report an error first
_NO_BREAK = "\N{NO-BREAK SPACE}"
_LONGEST = 4000  # characters of a line; a file may have a word of a gigabyte
_detail = 0


def set_detail(level: int) -> None:
    """How much to print: -1 results, warnings and errors; 0 also progress; 1 all details."""
    global _detail
    _detail = level


def is_verbose() -> bool:
    """Whether to print all details."""
    return _detail > 0


def say(text: str, wrap: bool = False) -> None:
    """Print a line for the user, on standard error, unless the command is quiet.

    With `wrap` a terminal shows it in lines of whole words; else a command in it can be copied.
    """
    if _detail >= 0:
        _print_line(Text(_line(text)), wrap and stderr.is_terminal)


def warn(text: str) -> None:
    """Print a warning, on standard error."""
    _print_line(Text.assemble(("warning:", "yellow"), " ", _line(text)))


def _line(text: str) -> str:
    """A text in one line, without the middle where it is very long: the end has the remedy."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
    return printable(text)


def _print_line(line: Text, wrap: bool = False) -> None:
    try:
        stderr.print(line, soft_wrap=not wrap)
    except BrokenPipeError:
        raise
    except OSError:  # a full disk takes no message; the work goes on
        pass


def show(result: RenderableType) -> None:
    """Print a result on standard output, a string as it is.

    Raises
    ------
    OSError
        Standard output is closed or takes no more.
    """
    if sys.stdout is None:
        raise OSError(errno.EBADF, "standard output is closed")
    with _names_output():
        if isinstance(result, str):  # not wrapped
            sys.stdout.write("".join(f"{printable(line)}\n" for line in result.split("\n")))
        else:
            stdout.print(result)
        sys.stdout.flush()


@contextmanager
def _names_output() -> Iterator[None]:
    """Name standard output in errors of writing to it."""
    try:
        yield
    except OSError as error:
        error.filename = "standard output"
        raise


def _fail(text: str, code: int) -> None:
    """Print an error and exit."""
    if not is_main():
        if code == INTERRUPTED:  # all processes are, also after process 0 has failed
            sys.exit(code)
        # If process 0 has the same error, it reports it and ends the job during this time.
        time.sleep(_GRACE)
        text = f"process {rank()} of {world_size()}: {text}"
        stderr.quiet = False
    _print_line(Text.assemble(("error:", "bold red"), " ", _line(text)))
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
        for stream in _streams():
            _discard_rest(stream)
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


def run_program(program: Callable[[], None]) -> None:
    """Run the whole program with `exit_on_error`, on streams that may be closed, full or ASCII."""
    _open_closed_streams()
    for stream in _streams():  # a Å on a terminal of another encoding must not end the work
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with exit_on_error():
            try:
                program()
            finally:
                with _names_output():
                    if sys.stdout is not None:
                        sys.stdout.flush()
    finally:
        for stream in _streams():
            _discard_rest(stream)


def _streams() -> list[TextIO]:
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]


def _open_closed_streams() -> None:
    """Open closed standard streams, lest the next file gets their numbers and others' messages."""
    for descriptor in range(3):
        if not _is_open(descriptor):
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _discard_rest(stream: TextIO) -> None:
    """Discard what could not be written, which Python would try, and report, once more."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _show_traceback() -> None:
    if is_verbose() or os.environ.get(_TRACEBACK):
        for line in traceback.format_exc().splitlines():
            say(line)


def wrapped(text: str, width: int) -> str:
    """A text in lines of at most `width` characters, broken at spaces outside of brackets."""
    whole = re.sub(r"\[[^\]]*\]", lambda match: match[0].replace(" ", _NO_BREAK), text)
    lines = textwrap.wrap(whole, max(width, 1), break_on_hyphens=False)
    return "\n".join(lines).replace(_NO_BREAK, " ")


def show_pairs(rows: Sequence[tuple[str, str]], title: str = "") -> None:
    """Print names and texts as a result, in two columns that fit the terminal."""
    if not rows:
        return
    indent = "  " if title else ""
    names = max(len(name) for name, _ in rows)
    table = Table.grid(padding=(0, 2, 0, 0))
    for name, text in rows:
        lines = wrapped(text, stdout.width - names - len(indent) - 4)
        table.add_row(Text(f"{indent}{name}", "cyan", no_wrap=True), Text(lines))
    if title:
        show(Text(f"\n{title}", "bold"))
    show(table)


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


def time_left(bar: Progress) -> str:
    """What the bar of one task estimates, to end a sentence; empty before it can."""
    seconds = bar.tasks[0].time_remaining
    return f", about {duration(seconds)} left" if seconds else ""


def progress_bar(*columns: str, transient: bool = False) -> Progress:
    """A progress bar with counts, times and the named task fields; hidden without a terminal."""
    return Progress(
        SpinnerColumn("line" if stderr.options.ascii_only else "dots"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        *(TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in columns),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=stderr,
        transient=transient,
        disable=not stderr.is_terminal or _detail < 0,
    )
