"""Draw batches in several threads of a process.

On a CPU each thread draws its own batches, and computes on one core: no thread waits for another
one in the middle of a batch, as those within a matrix product do many times in each layer. PyTorch
releases the interpreter while it computes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")
_WAIT = 0.1  # seconds between two reports of progress while the last batches are drawn


class _StoppedError(Exception):
    """Another thread failed or was interrupted."""


class DrawingThreads(Generic[Item]):
    """Calls a function for items, in the thread that makes this and in further ones.

    Parameters
    ----------
    work
        Called with an item; calls `advance` often.
    report
        Called in the own thread alone, with what the threads gave to `advance`.
    """

    def __init__(
        self, work: Callable[[Item], object], report: Callable[[int, float], None]
    ) -> None:
        self._work, self._report = work, report
        self._own = threading.get_ident()
        self._stopped = threading.Event()
        self._progress: SimpleQueue[tuple[int, float]] = SimpleQueue()
        self._failures: list[BaseException] = []

    def advance(self, samples: int, share: float) -> None:
        """Report progress; ends the work of this thread if another one failed."""
        self._progress.put((samples, share))
        if threading.get_ident() == self._own:
            self._report_progress()
        if self._stopped.is_set():
            raise _StoppedError

    def run(self, items: Iterator[Item], threads: int) -> None:
        """Call the function for all items; what it raises in any thread is raised here.

        The cores that PyTorch may use are divided among the threads.
        """
        if threads == 1:
            for item in items:
                self._work(item)
            return
        cores, taking = torch.get_num_threads(), threading.Lock()

        def take() -> Item | None:
            with taking:
                return next(items, None)

        def work() -> None:
            torch.set_num_threads(cores // threads)
            while not self._stopped.is_set() and (item := take()) is not None:
                self._work(item)

        def run_helper() -> None:
            try:
                work()
            except _StoppedError:
                pass
            except BaseException as error:
                self._failures.append(error)
                self._stopped.set()

        # Daemons, so that a second Ctrl-C ends the process.
        helpers = [threading.Thread(target=run_helper, daemon=True) for _ in range(threads - 1)]
        try:
            for helper in helpers:
                helper.start()
            work()
        except _StoppedError:
            pass
        except BaseException:
            self._stopped.set()
            raise
        finally:
            for helper in helpers:
                while helper.is_alive():
                    helper.join(_WAIT)
                    self._report_progress()
            torch.set_num_threads(cores)
        self._report_progress()
        if self._failures:
            raise self._failures[0]

    def _report_progress(self) -> None:
        while not self._progress.empty():
            self._report(*self._progress.get())
