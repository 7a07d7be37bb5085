"""A pool of worker processes, with an optional time limit for each item of work.

RDKit and PoseBusters can hang on an implausible molecule, inside C++ where Python cannot interrupt
them. A process can be killed, so the pool does the work in processes.

Under `torchrun`, process 0 of the job runs the command and sends part of the items to the pools of
the other processes, which run `WorkerPool.serve`. Only process 0 reads input, collects results and
reports errors, so the processes cannot disagree.
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
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Protocol, TypeVar, runtime_checkable

from molgen_energy.errors import InputError, PeerLostError

T = TypeVar("T")
R = TypeVar("R")

_QUEUED = 3  # items for each worker that wait or run, so that memory stays bounded
_SENT = 2  # items for each worker of another process of the job, running or waiting there
_START_ATTEMPTS = 3
_POOL_FAILED = 0  # in place of a task's number
_PASSED_ON = (InputError, RuntimeError, MemoryError)  # exceptions that keep their type


class WorkerError(RuntimeError):
    """The work raised an exception, or no worker process can start."""


@runtime_checkable
class Divisible(Protocol):
    """An item that the pool can divide to find the part that fails."""

    def __len__(self) -> int: ...

    def parts(self, size: int) -> Iterable[Any]:
        """The same content in items of at most `size`."""


def _call(work: Callable[[T], R], item: T) -> R:
    try:
        return work(item)
    except _PASSED_ON:
        raise
    except Exception as error:
        raise _portable(error) from error


def _portable(error: Exception) -> Exception:
    """The error in a form that any process can unpickle."""
    if type(error) in (*_PASSED_ON, WorkerError):
        return type(error)(str(error))
    return WorkerError(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def _connected_to_peer() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise PeerLostError("another process of the job has ended") from error


def _worker_main(connection: Connection, preload: Sequence[str]) -> None:
    """Report that this process is ready, then receive items and send their results."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that owns the pool handles Ctrl-C
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each processor has its own worker already
    with contextlib.suppress(EOFError, OSError):  # the pool is gone
        try:
            for module in preload:
                importlib.import_module(module)
            connection.send(None)
        except Exception as error:
            connection.send((False, _portable(error)))
        while True:
            received = connection.recv_bytes()
            try:
                work, item = pickle.loads(received)  # imports the module of `work`
                connection.send(None)  # the time limit starts here, after imports
                answer = pickle.dumps((True, work(item)))
            except Exception as error:
                answer = pickle.dumps((False, _portable(error)))
            connection.send_bytes(answer)


@dataclass(eq=False)
class _Task:
    """An item and its work; `finished` when it has a result, or a `failure` reason."""

    work: Callable[[Any], Any]
    item: Any
    assigned: bool = False
    finished: bool = False
    result: Any = None
    failure: str = ""


class _Worker:
    """A process with a connection of its own, so that its death does not affect other workers."""

    def __init__(self, preload: Sequence[str]) -> None:
        # A fresh interpreter: forking is not safe where this process has threads, such as those of
        # torch or of a progress bar.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_worker_main, args=(theirs, preload), daemon=True)
        with _interrupts_blocked():
            self.process.start()
        theirs.close()
        self.ready = False
        self.task: _Task | None = None
        self.deadline = math.inf

    def stop(self) -> None:
        """Kill the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.connection.close()


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Have processes that start in this block inherit a signal mask without Ctrl-C.

    Otherwise one that is interrupted before `_worker_main` would print a traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its own start would reset the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Peer:
    """Another process of the job, as process 0 sees it: it takes several tasks at a time."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        with _connected_to_peer():
            self.workers: int = connection.recv()
        self._tasks: dict[int, _Task] = {}
        self._sent = 0

    @property
    def load(self) -> float:
        """Unfinished tasks for each of its workers."""
        return len(self._tasks) / self.workers

    def send(self, task: _Task) -> None:
        """Send a task; blocks until the peer has received it."""
        self._sent += 1
        self._tasks[self._sent] = task
        with _connected_to_peer():
            self.connection.send((self._sent, task.work, task.item))

    def receive(self) -> None:
        """Receive the results that have arrived."""
        with _connected_to_peer():
            while self.connection.poll():
                number, result, failure = self.connection.recv()
                if number == _POOL_FAILED:
                    raise result
                task = self._tasks.pop(number)
                task.result, task.failure, task.finished = result, failure, True


class WorkerPool:
    """A pool of processes; use it as a context manager.

    Parameters
    ----------
    count
        Number of worker processes. With 0 the pool works in the calling process, without time
        limit.
    timeout
        Time limit for one item, in seconds; None for no limit.
    connections
        To the other processes of a `torchrun` job (`distributed.worker_connections`), which take
        part of the items by `serve`.
    preload
        Names of modules that workers import when they start, while this process prepares the first
        items. The work imports its own module in any case.

    Raises
    ------
    PeerLostError
        On entry: another process of the job has ended.
    """

    def __init__(
        self,
        count: int,
        timeout: float | None = None,
        connections: Sequence[Connection] = (),
        preload: Sequence[str] = (),
    ) -> None:
        self._count = count
        self._timeout = timeout
        self._peer_connections = list(connections)
        self._preload = preload
        self._workers: list[_Worker] = []
        self._peers: list[_Peer] = []
        self._failed_starts = 0

    def __enter__(self) -> WorkerPool:
        try:
            self._start_missing()
            self._peers = [_Peer(connection) for connection in self._peer_connections]
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers, self._peers = [], []

    def map(
        self,
        work: Callable[[T], R],
        items: Iterable[T],
        on_failure: Callable[[T, str], R] | None = None,
        ordered: bool = True,
    ) -> Iterator[tuple[T, R]]:
        """Apply a function to items; yields each item with its result.

        Parameters
        ----------
        work
            A function that can be pickled.
        items
            Objects that can be pickled. The pool reads them only as fast as it yields results.
        on_failure
            Where an item exceeds the time limit or its process dies, the pool divides the item if
            it is `Divisible`, and tries the parts. An item of length 1, or one that cannot be
            divided, goes to this function with the reason, and its return value is the result.
            With None the pool raises `PeerLostError` instead.
        ordered
            Whether to yield results in the order of the items, or as soon as they are finished.

        Raises
        ------
        InputError, RuntimeError, MemoryError
            The work raised it.
        WorkerError
            The work raised any other exception, or worker processes do not start.
        PeerLostError
            A worker process died or timed out and there is no `on_failure`, or another process of
            the job has ended.
        """
        if not self._count and not self._peers:
            for item in items:
                yield item, _call(work, item)
            return
        self._start_missing()
        queue: deque[_Task] = deque()
        source = iter(items)
        limit = _QUEUED * (max(1, self._count) + sum(peer.workers for peer in self._peers))
        try:
            while True:
                missing = max(0, limit - len(queue))
                queue.extend(_Task(work, item) for item in islice(source, missing))
                if not queue:
                    return
                # Refill idle workers before the caller spends time on a result.
                self._collect(self._peer_connections, block=False)
                self._assign(queue)
                task = _first_finished(queue, ordered)
                if task is None:
                    block = self._count > 0 or not self._run_one_here(queue)
                    self._collect(self._peer_connections, block)
                    continue
                queue.remove(task)
                if not task.failure:
                    yield task.item, task.result
                elif on_failure is None:
                    raise PeerLostError(f"{task.item}: {task.failure}")
                elif parts := _divide(task.item):
                    queue.extendleft(_Task(work, part) for part in reversed(parts))
                else:
                    yield task.item, on_failure(task.item, task.failure)
        finally:
            # Workers that still run something whose result nobody reads.
            for worker in [worker for worker in self._workers if worker.task is not None]:
                worker.stop()
                self._workers.remove(worker)

    def serve(self, connection: Connection) -> None:
        """Work on the items that process 0 of the job sends from `map`, until it disconnects.

        Errors go to process 0, which reports them to the user; the first one ends this method.
        """
        answers: SimpleQueue[tuple[int, Any, str] | None] = SimpleQueue()

        def send_answers() -> None:
            with contextlib.suppress(OSError):  # process 0 has disconnected
                while (answer := answers.get()) is not None:
                    connection.send(answer)

        # Process 0 does not receive while it sends, so this process must do both at once.
        thread = Thread(target=send_answers, daemon=True)
        thread.start()
        tasks: dict[int, _Task] = {}
        with contextlib.suppress(EOFError, OSError):
            connection.send(max(1, self._count))
            while True:
                try:
                    self._assign(tasks.values())
                    block = self._count > 0 or not self._run_one_here(tasks.values())
                    self._collect([connection], block)
                except _PASSED_ON as error:
                    answers.put((_POOL_FAILED, _portable(error), ""))
                    answers.put(None)
                    thread.join()
                    return
                while connection.poll():
                    number, work, item = connection.recv()
                    tasks[number] = _Task(work, item)
                for number in [number for number, task in tasks.items() if task.finished]:
                    task = tasks.pop(number)
                    answers.put((number, task.result, task.failure))

    def _start_missing(self) -> None:
        while len(self._workers) < self._count:
            self._workers.append(_Worker(self._preload))

    def _assign(self, tasks: Iterable[_Task]) -> None:
        """Send waiting tasks to idle workers, and some in advance to the peers."""
        idle = [worker for worker in self._workers if worker.ready and not worker.task]
        for task in tasks:
            if task.assigned:
                continue
            # First one task for each worker of a peer, then a second that waits there, so that its
            # workers are not idle during transfers.
            peer = min(self._peers, key=lambda p: p.load, default=None)
            if peer is not None and peer.load < (1 if idle else _SENT):
                task.assigned = True
                peer.send(task)
            elif idle:
                worker = idle.pop()
                task.assigned, worker.task = True, task
                with contextlib.suppress(OSError):  # it died; `_collect` will notice
                    worker.connection.send((task.work, task.item))
            else:
                return

    def _run_one_here(self, tasks: Iterable[_Task]) -> bool:
        """Run a waiting task in this process, which has no workers; returns whether one waited."""
        task = next((task for task in tasks if not task.assigned), None)
        if task is None:
            return False
        task.assigned = True
        task.result, task.finished = _call(task.work, task.item), True
        return True

    def _collect(self, others: list[Connection], block: bool) -> None:
        """Receive messages, and replace workers that died or timed out.

        With `block`, wait for a message from a worker or from `others`, or for a time limit.
        """
        deadline = min((worker.deadline for worker in self._workers), default=math.inf)
        remaining = None if math.isinf(deadline) else max(0.0, deadline - time.monotonic())
        connections = [worker.connection for worker in self._workers]
        wait([*connections, *others], remaining if block else 0.0)
        for k, worker in enumerate(self._workers):
            try:
                while worker.connection.poll():
                    self._receive(worker)
            except (EOFError, OSError, pickle.UnpicklingError):
                worker.process.join(1.0)
                code = worker.process.exitcode
                self._lose(k, f"the worker process died (exit code {code})")
                continue
            if worker.task is not None and time.monotonic() > worker.deadline:
                self._lose(k, f"not finished within {self._timeout:g} s")
        for peer in self._peers:
            peer.receive()

    def _receive(self, worker: _Worker) -> None:
        """Receive one message: None when ready and when it starts an item, or a result."""
        message = pickle.loads(worker.connection.recv_bytes())
        if message is not None:
            succeeded, result = message
            if not succeeded:
                raise result
            assert worker.task is not None
            worker.task.result, worker.task.finished = result, True
            worker.task, worker.deadline = None, math.inf
        elif worker.task is not None:
            limit = math.inf if self._timeout is None else self._timeout
            worker.deadline = time.monotonic() + limit
        else:
            worker.ready, self._failed_starts = True, 0

    def _lose(self, k: int, reason: str) -> None:
        """Mark the task of worker k as failed, and start another worker."""
        worker = self._workers[k]
        if worker.task is not None:
            worker.task.failure, worker.task.finished = reason, True
        elif not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= _START_ATTEMPTS:
                raise WorkerError(
                    f"worker processes do not start: {reason}; call this under "
                    '`if __name__ == "__main__":` in a script, or use 0 workers'
                )
        worker.stop()
        self._workers[k] = _Worker(self._preload)


def _first_finished(queue: deque[_Task], ordered: bool) -> _Task | None:
    """The task whose result is next, if it is finished."""
    candidates = (queue[0],) if ordered else queue
    return next((task for task in candidates if task.finished), None)


def _divide(item: Any) -> list[Any]:
    """Parts of an item, none where it cannot be divided.

    The first division of n gives parts of √n, the next one parts of 1 or 2: a few rounds find one
    molecule among hundreds.
    """
    if not isinstance(item, Divisible) or len(item) <= 1:
        return []
    size = math.isqrt(len(item) - 1) + 1 if len(item) > 3 else 1
    return list(item.parts(size))
