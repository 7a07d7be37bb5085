"""Progress of long work below a notebook's cell; elsewhere nothing is shown."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from molgen_energy.display.html import render
from molgen_energy.progress import ProgressCallback, no_progress

_SECONDS = 0.3  # between two updates


class NotebookProgress:
    """A bar below the cell that runs, which disappears when the work is done.

    Called as `progress(done, total)`, and with a text that stands beside the bar.
    """

    def __init__(self, title: str, unit: str) -> None:
        from IPython.display import HTML, display

        self._html, self._title, self._unit = HTML, title, unit
        self._began = self._last = time.perf_counter()
        self._handle: Any = display(HTML(self._bar(0, None, "")), display_id=True)

    def __call__(self, done: float, total: int | None, text: str = "") -> None:
        now = time.perf_counter()
        if now - self._last >= _SECONDS:
            self._last = now
            self._handle.update(self._html(self._bar(done, total, text)))

    def close(self) -> None:
        """Remove the bar."""
        self._handle.update(self._html(""))

    def _bar(self, done: float, total: int | None, text: str) -> str:
        spent = time.perf_counter() - self._began
        left = None
        if total and 0 < done <= total and spent > 1:
            left = _time(spent * (total - done) / done)
        return render(
            "progress.html.j2", title=self._title, unit=self._unit, done=done, total=total,
            text=text, left=left,
        )  # fmt: skip


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return hasattr(shell, "kernel")


@contextmanager
def notebook_progress(
    title: str, unit: str, given: ProgressCallback = no_progress
) -> Iterator[ProgressCallback]:
    """A bar where this is a notebook and no other callback is given, else the given one.

    Parameters
    ----------
    title
        What is done, such as `sampling`.
    unit
        Plural of what is counted.
    given
        The callback of the user.
    """
    if given is not no_progress or not in_notebook():
        yield given
        return
    bar = NotebookProgress(title, unit)
    try:
        yield bar
    finally:
        bar.close()


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"
