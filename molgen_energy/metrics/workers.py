"""Work on pieces of a file in other processes, in order, with a limit on the time of each molecule.

RDKit and PoseBusters can hang on a molecule that no chemist would draw, inside C++ where Python
cannot interrupt them. So the work is done in processes that can be killed.
"""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from types import TracebackType
from typing import TypeVar

from pebble import ProcessExpired, ProcessPool

from molgen_energy.data.molecules import Piece

R = TypeVar("R")

_AHEAD = 3  # pieces for each worker that wait or are at work, so that memory stays bounded


def default_workers() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _prepare() -> None:
    """Import before the clock of the first molecule runs; use one thread in each process."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    importlib.import_module("molgen_energy.metrics.judging")
    importlib.import_module("molgen_energy.metrics.relaxation")


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
        self._pool: ProcessPool | None = None

    def __enter__(self) -> Workers:
        if self._count > 0:
            # A fresh interpreter: threads of this one (a progress bar has one) forbid to fork.
            self._pool = ProcessPool(
                max_workers=self._count,
                context=multiprocessing.get_context("spawn"),
                initializer=_prepare,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()

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
        """
        if self._pool is None:
            for piece in pieces:
                yield piece, work(piece)
            return
        waiting: deque[tuple[Piece, Future[R]]] = deque()
        source = iter(pieces)
        while True:
            while len(waiting) < _AHEAD * self._count:
                following = next(source, None)
                if following is None:
                    break
                waiting.append((following, self._schedule(work, following)))
            if not waiting:
                return
            piece, future = waiting.popleft()
            try:
                result = future.result()
            except FutureTimeoutError:
                trouble = f"not finished within {self._seconds:g} s"
            except ProcessExpired:
                trouble = "the process died of it"
            else:
                yield piece, result
                continue
            if len(piece) == 1:
                yield piece, instead(piece, trouble)
                continue
            # Two rounds of cutting find the one molecule among hundreds.
            parts = list(piece.parts(math.isqrt(len(piece) - 1) + 1 if len(piece) > 3 else 1))
            waiting.extendleft((part, self._schedule(work, part)) for part in reversed(parts))

    def _schedule(self, work: Callable[[Piece], R], piece: Piece) -> Future[R]:
        assert self._pool is not None
        future: Future[R] = self._pool.schedule(work, args=(piece,), timeout=self._seconds)
        return future
