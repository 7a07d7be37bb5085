"""Work on pieces of a file in other processes, in order, with a limit on the time of each molecule.

RDKit and PoseBusters can hang on a molecule that no chemist would draw, inside C++ where Python
cannot interrupt them. So the work is done in processes that can be killed.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import multiprocessing
import os
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, TypeVar

from molgen_energy.data.molecules import Piece

R = TypeVar("R")

_AHEAD = 3  # pieces for each worker that wait or are at work, so that memory stays bounded
_ATTEMPTS = 3  # to start a process


def default_workers() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _serve(connection: Connection) -> None:
    """What a process does: say that it is ready, then take work and send what comes of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that holds us
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a process for each processor already
    # Imports are not on the clock of the first molecule.
    importlib.import_module("molgen_energy.metrics.judging")
    importlib.import_module("molgen_energy.metrics.relaxation")
    connection.send(None)
    while True:
        try:
            work, piece = connection.recv()
            connection.send(None)  # what the work imports is not on its clock either
        except (EOFError, OSError):
            return
        try:
            answer = pickle.dumps((True, work(piece)))
        except Exception as error:
            answer = pickle.dumps((False, f"{type(error).__name__}: {error}"))
        try:
            connection.send_bytes(answer)
        except OSError:
            return


@dataclass(eq=False)
class _Task:
    """A piece on its way; `finished` when it has a result, or what happened in `trouble`."""

    piece: Piece
    given: bool = False
    finished: bool = False
    result: Any = None
    trouble: str = ""


class _Worker:
    """A process with a line of its own: its death leaves nothing behind that others wait for."""

    def __init__(self) -> None:
        # A fresh interpreter: threads of this one (a progress bar has one) forbid to fork.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.task: _Task | None = None
        self.deadline = math.inf

    def stop(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class WorkFailed(RuntimeError):
    """The work raised an exception, or no process can be started."""


class Workers:
    """A pool of processes; use as a context manager.

    Parameters
    ----------
    count
        Processes; 0 does the work in this one, where nothing can be interrupted.
    seconds
        A molecule that takes longer is given up.
    """

    def __init__(self, count: int, seconds: float) -> None:
        self._seconds = seconds
        self._count = count
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    def __enter__(self) -> Workers:
        self._workers = [_Worker() for _ in range(self._count)]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []

    def map(
        self,
        work: Callable[[Piece], R],
        instead: Callable[[Piece, str], R],
        pieces: Iterable[Piece],
    ) -> Iterator[tuple[Piece, R]]:
        """The pieces and what the work makes of them, in their order.

        A piece that is not done within the time limit, or whose process dies, is cut into smaller
        ones; what is left in the end is the molecule at fault.

        Parameters
        ----------
        work
            A function that can be pickled.
        instead
            Called here for a molecule at fault, with what happened.
        pieces
            Taken only as fast as the results are.

        Raises
        ------
        WorkFailed
            The work raised an exception, or processes do not start.
        """
        if not self._workers:
            for piece in pieces:
                yield piece, work(piece)
            return
        line: deque[_Task] = deque()
        source = iter(pieces)
        try:
            while True:
                while len(line) < _AHEAD * self._count:
                    following = next(source, None)
                    if following is None:
                        break
                    line.append(_Task(following))
                if not line:
                    return
                if not line[0].finished:
                    self._give(work, line)
                    self._collect()
                    continue
                task = line.popleft()
                if not task.trouble:
                    yield task.piece, task.result
                elif len(task.piece) == 1:
                    yield task.piece, instead(task.piece, task.trouble)
                else:
                    # Two rounds of cutting find the one molecule among hundreds.
                    size = math.isqrt(len(task.piece) - 1) + 1 if len(task.piece) > 3 else 1
                    line.extendleft(_Task(part) for part in reversed(list(task.piece.parts(size))))
        finally:
            for k, worker in enumerate(self._workers):
                if worker.task is not None:  # what nobody waits for any more
                    self._replace(k)

    def _give(self, work: Callable[[Piece], R], line: deque[_Task]) -> None:
        """Hand tasks that wait to processes that are free."""
        free = [k for k, worker in enumerate(self._workers) if worker.ready and not worker.task]
        for task in line:
            if not free:
                return
            if task.given:
                continue
            worker = self._workers[free.pop()]
            task.given, worker.task = True, task
            with contextlib.suppress(OSError):  # it is dead; `_collect` will find it so
                worker.connection.send((work, task.piece))

    def _collect(self) -> None:
        """Wait until a process says something, dies, or takes too long."""
        first = min(worker.deadline for worker in self._workers)
        patience = None if math.isinf(first) else max(0.0, first - time.monotonic())
        wait([worker.connection for worker in self._workers], patience)
        for k, worker in enumerate(self._workers):
            try:
                while worker.connection.poll():
                    self._hear(worker)
            except (EOFError, OSError, pickle.UnpicklingError):
                self._lost(k, "the process died of it")
                continue
            if worker.task is not None and time.monotonic() > worker.deadline:
                self._lost(k, f"not finished within {self._seconds:g} s")

    def _hear(self, worker: _Worker) -> None:
        """Take one message: that it is ready, that it begins, or a result."""
        message = pickle.loads(worker.connection.recv_bytes())
        if message is not None:
            good, result = message
            if not good:
                raise WorkFailed(result)
            assert worker.task is not None
            worker.task.result, worker.task.finished = result, True
            worker.task, worker.deadline = None, math.inf
        elif worker.task is not None:
            worker.deadline = time.monotonic() + self._seconds
        else:
            worker.ready, self._failed_starts = True, 0

    def _lost(self, k: int, trouble: str) -> None:
        """Note what became of a process's task, and start another process."""
        worker = self._workers[k]
        if worker.task is not None:
            worker.task.trouble, worker.task.finished = trouble, True
        elif not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= _ATTEMPTS:
                raise WorkFailed(
                    "processes do not start (a script must call this under "
                    '`if __name__ == "__main__":`); or work in this one, with 0 workers'
                )
        self._replace(k)

    def _replace(self, k: int) -> None:
        self._workers[k].stop()
        self._workers[k] = _Worker()
