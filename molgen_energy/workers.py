"""Work on pieces of a file in other processes, in order, with a limit on the time of each molecule.

RDKit and PoseBusters can hang on a molecule that no chemist would draw, inside C++ where Python
cannot interrupt them. So the work is done in processes that can be killed.

Of several processes that `torchrun` has started, the first runs the command as it would alone, and
hands pieces also to the others (`Workers.serve`), each of which has processes of its own. So there
is one that reads, counts and meets errors, and nothing in which the processes could disagree.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, TypeVar

from molgen_energy.data.molecules import MoleculeChunk
from molgen_energy.errors import PeerLostError

R = TypeVar("R")

_AHEAD = 3  # pieces for each worker that wait or are at work, so that memory stays bounded
_ATTEMPTS = 3  # to start a process
_SENT = 2  # tasks for each process of another member of the job, at work or waiting there
_ENDED = "another process of the job has ended"
_BROKEN = 0  # in place of a task's number: no work can be done any more


def _serve(connection: Connection) -> None:
    """What a process does: say that it is ready, then take work and send what comes of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that holds us
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a process for each processor already
    # Imports are not on the clock of the first molecule.
    importlib.import_module("molgen_energy.metrics.checks.chunk")
    importlib.import_module("molgen_energy.metrics.checks.strain")
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

    work: Callable[[MoleculeChunk], Any]
    piece: MoleculeChunk
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


class _Other:
    """Another process of the job, as the first one sees it: it takes several tasks at a time."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.processes: int = connection.recv()
        self._tasks: dict[int, _Task] = {}
        self._given = 0

    @property
    def waiting(self) -> int:
        """Tasks that it has and has not answered."""
        return len(self._tasks)

    def give(self, task: _Task) -> None:
        """Send a task; waits until the process has taken it in."""
        self._given += 1
        self._tasks[self._given] = task
        self.connection.send((self._given, task.work, task.piece))

    def hear(self) -> None:
        """Take what it says."""
        number, result, trouble = self.connection.recv()
        if number == _BROKEN:
            raise WorkFailed(result)
        task = self._tasks.pop(number)
        task.result, task.trouble, task.finished = result, trouble, True


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
    lines
        To other processes of the job, which take part of the work by `serve`.
    """

    def __init__(self, count: int, seconds: float, lines: Sequence[Connection] = ()) -> None:
        self._seconds = seconds
        self._count = count
        self._lines = lines
        self._workers: list[_Worker] = []
        self._others: list[_Other] = []
        self._failed_starts = 0

    def __enter__(self) -> Workers:
        self._workers = [_Worker() for _ in range(self._count)]
        try:
            self._others = [_Other(line) for line in self._lines]
        except (EOFError, OSError) as error:
            self.__exit__(None, None, None)
            raise PeerLostError(_ENDED) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers, self._others = [], []

    def map(
        self,
        work: Callable[[MoleculeChunk], R],
        instead: Callable[[MoleculeChunk, str], R],
        pieces: Iterable[MoleculeChunk],
    ) -> Iterator[tuple[MoleculeChunk, R]]:
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
        ProcessEnded
            Another process of the job is gone.
        """
        if not self._workers and not self._others:
            for piece in pieces:
                yield piece, work(piece)
            return
        line: deque[_Task] = deque()
        source = iter(pieces)
        most = _AHEAD * (max(1, self._count) + sum(other.processes for other in self._others))
        try:
            while True:
                while len(line) < most:
                    following = next(source, None)
                    if following is None:
                        break
                    line.append(_Task(work, following))
                if not line:
                    return
                # Nobody should be idle while the caller looks at a result.
                self._collect(self._connections(), patient=False)
                self._give(line)
                if not line[0].finished:
                    patient = self._count > 0 or not self._do_one(line)
                    self._collect(self._connections(), patient)
                    continue
                task = line.popleft()
                if not task.trouble:
                    yield task.piece, task.result
                elif len(task.piece) == 1:
                    yield task.piece, instead(task.piece, task.trouble)
                else:
                    # Two rounds of cutting find the one molecule among hundreds.
                    size = math.isqrt(len(task.piece) - 1) + 1 if len(task.piece) > 3 else 1
                    parts = reversed(list(task.piece.parts(size)))
                    line.extendleft(_Task(work, part) for part in parts)
        finally:
            for k, worker in enumerate(self._workers):
                if worker.task is not None:  # what nobody waits for any more
                    self._replace(k)

    def serve(self, line: Connection) -> None:
        """Do what the first process of the job hands out by `map`, until it closes the line.

        What fails here is told to it, and ends this: it is the one to speak to the user.
        """
        answers: SimpleQueue[tuple[int, Any, str] | None] = SimpleQueue()

        def post() -> None:
            with contextlib.suppress(OSError):  # nobody listens any more
                while (answer := answers.get()) is not None:
                    line.send(answer)

        # While the other end is busy sending, it does not listen: this one must do both.
        thread = Thread(target=post, daemon=True)
        thread.start()
        tasks: dict[int, _Task] = {}
        with contextlib.suppress(EOFError, OSError):
            line.send(max(1, self._count))
            while True:
                try:
                    self._give(tasks.values())
                    patient = self._count > 0 or not self._do_one(tasks.values())
                    self._collect([line], patient)
                except WorkFailed as failure:
                    answers.put((_BROKEN, str(failure), ""))
                    answers.put(None)
                    thread.join()
                    return
                while line.poll():
                    number, work, piece = line.recv()
                    tasks[number] = _Task(work, piece)
                for number in [number for number, task in tasks.items() if task.finished]:
                    task = tasks.pop(number)
                    answers.put((number, task.result, task.trouble))

    def _connections(self) -> list[Connection]:
        return [other.connection for other in self._others]

    def _give(self, line: Iterable[_Task]) -> None:
        """Hand tasks that wait to processes that are free, and some ahead to other machines'."""
        free = [k for k, worker in enumerate(self._workers) if worker.ready and not worker.task]
        for task in line:
            if task.given:
                continue
            # First one for each process; then another that waits there, not to lose time by
            # sending.
            other = min(self._others, key=lambda o: o.waiting / o.processes, default=None)
            if other is not None and other.waiting < other.processes * (1 if free else _SENT):
                task.given = True
                try:
                    other.give(task)
                except OSError as error:
                    raise PeerLostError(_ENDED) from error
            elif free:
                worker = self._workers[free.pop()]
                task.given, worker.task = True, task
                with contextlib.suppress(OSError):  # it is dead; `_collect` will find it so
                    worker.connection.send((task.work, task.piece))
            else:
                return

    def _do_one(self, line: Iterable[_Task]) -> bool:
        """Do a task that waits in this process, which has no others; whether there was one."""
        task = next((task for task in line if not task.given), None)
        if task is None:
            return False
        task.given = True
        try:
            task.result, task.finished = task.work(task.piece), True
        except Exception as error:
            raise WorkFailed(f"{type(error).__name__}: {error}") from error
        return True

    def _collect(self, also: list[Connection], patient: bool) -> None:
        """Wait until a process says something, dies, or takes too long; or only look."""
        first = min((worker.deadline for worker in self._workers), default=math.inf)
        patience = None if math.isinf(first) else max(0.0, first - time.monotonic())
        connections = [worker.connection for worker in self._workers]
        wait([*connections, *also], patience if patient else 0.0)
        for k, worker in enumerate(self._workers):
            try:
                while worker.connection.poll():
                    self._hear(worker)
            except (EOFError, OSError, pickle.UnpicklingError):
                self._lost(k, "the process died of it")
                continue
            if worker.task is not None and time.monotonic() > worker.deadline:
                self._lost(k, f"not finished within {self._seconds:g} s")
        try:
            for other in self._others:
                while other.connection.poll():
                    other.hear()
        except (EOFError, OSError) as error:
            raise PeerLostError(_ENDED) from error

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
