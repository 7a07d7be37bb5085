"""Random spin glasses with their ground states: drawn by number, solved in several processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from typing import cast

import numpy as np

from molgen_energy.data.lattices import Lattices, Spins, check_size
from molgen_energy.data.sources.ground_states import check_installed, ground_states
from molgen_energy.errors import InputError, ProcessEnded, unknown_name
from molgen_energy.metrics.workers import default_workers

KINDS = ("uniform", "binary")
PER_PIECE = 50

_DIGITS = 23


def draw_couplings(
    numbers: Iterable[int], size: int, periodic: bool, kind: str, seed: int
) -> Lattices:
    """Independent couplings of the lattices of some numbers.

    Those of lattice i depend on seed, size, kind and i alone; with an open boundary they are the
    same as with a periodic one, but for zeros where they have no meaning. `uniform` takes the odd
    multiples of 2⁻²³ between −1 and 1, all equally likely: evenly spread, symmetric, never zero,
    and coarse enough that sums of them are exact. `binary` takes −1 and 1.

    Raises
    ------
    InputError
        There are no lattices of the size, or no such kind.
    """
    check_size(size, periodic)
    if kind not in KINDS:
        raise InputError(unknown_name("kind of couplings", kind, KINDS))
    if seed < 0:
        raise InputError(f"a seed of {seed} is negative; take 0 or more")
    # The generator's own words: they are the same in every version of numpy.
    words = [
        np.random.PCG64(np.random.SeedSequence([seed, i])).random_raw(2 * size * size)
        for i in numbers
    ]
    bits = 1 if kind == "binary" else _DIGITS
    whole = (np.array(words, np.uint64) >> np.uint64(64 - bits)).astype(np.int64)
    values = (2 * whole + 1 - 2**bits) * (1.0 if kind == "binary" else 2.0**-_DIGITS)
    both = values.reshape(-1, 2, size, size).astype(np.float32)
    if not periodic:
        both[:, 0, :, -1] = 0
        both[:, 1, -1, :] = 0
    return Lattices(both[:, 0], both[:, 1], periodic)


def pieces_of(count: int, per_piece: int = PER_PIECE) -> dict[int, range]:
    """The numbers 0 … count − 1 in pieces, by the piece's number."""
    starts = range(0, count, per_piece)
    return {k: range(first, min(count, first + per_piece)) for k, first in enumerate(starts)}


def solved_pieces(
    source: Lattices | Callable[[range], Lattices],
    pieces: Mapping[int, range],
    workers: int | None = None,
) -> Iterator[tuple[int, Lattices]]:
    """Ground states of pieces, as they are finished and in no order.

    Parameters
    ----------
    source
        All lattices, or what makes those of some numbers; called in this process, for a piece at a
        time.
    pieces
        The lattices of each piece that is wanted, by its number.
    workers
        Processes, of one thread each; None takes as many as there are processors, 0 works in this
        one. They end with the iterator, and with Ctrl-C.

    Yields
    ------
    The number of a piece, and its lattices with spins.

    Raises
    ------
    InputError
        A solver is not installed, or a lattice is not in order.
    RuntimeError
        A solver failed; the message names the piece and the lattice.
    ProcessEnded
        A process is gone.
    """
    if workers is None:
        workers = default_workers()

    def lattices_of(number: int) -> Lattices:
        numbers = pieces[number]
        if isinstance(source, Lattices):
            return source.select(slice(numbers.start, numbers.stop, numbers.step))
        return source(numbers)

    waiting = list(reversed(list(pieces)))
    if not workers:
        while waiting:
            number = waiting.pop()
            lattices = lattices_of(number)
            yield number, lattices.with_spins(_solve(number, lattices))
        return
    pool: list[_Solver] = []
    try:
        while waiting and len(pool) < workers:
            number = waiting.pop()
            lattices = lattices_of(number)
            if not pool:
                check_installed(lattices.periodic)  # before any process is started
            pool.append(_Solver())
            pool[-1].give(number, lattices)
        while busy := {solver.connection: solver for solver in pool if solver.busy}:
            for connection in wait(list(busy)):
                solver = busy[cast(Connection, connection)]
                solved = solver.take()
                if waiting:  # nobody should be idle while the caller looks at a result
                    number = waiting.pop()
                    solver.give(number, lattices_of(number))
                yield solved
    finally:
        for solver in pool:
            solver.stop()


def _solve(number: int, lattices: Lattices) -> Spins:
    try:
        return ground_states(lattices)
    except RuntimeError as error:
        raise RuntimeError(f"piece {number}: {error}") from error


class _Solver:
    """A process that solves a piece at a time."""

    def __init__(self) -> None:
        # A fresh interpreter: threads of this one, such as torch's, forbid to fork.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._task: tuple[int, Lattices] | None = None

    @property
    def busy(self) -> bool:
        """Whether it has a piece that it has not answered."""
        return self._task is not None

    def give(self, number: int, lattices: Lattices) -> None:
        """Have a piece solved."""
        self._task = number, lattices
        with contextlib.suppress(OSError):  # it is dead; `take` will find it so
            self.connection.send(self._task)

    def take(self) -> tuple[int, Lattices]:
        """The piece and its solution, once the connection has something to say."""
        assert self._task is not None
        number, lattices = self._task
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise ProcessEnded(
                f"a process that solves ground states is gone (exit code {self._process.exitcode}) "
                f"and piece {number} with it; where memory is short take fewer processes; a script "
                'must call this under `if __name__ == "__main__":`'
            ) from None
        if isinstance(answer, Exception):
            raise answer
        self._task = None
        return number, lattices.with_spins(answer)

    def stop(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection) -> None:
    """What a process does: take pieces and send their spins, or the exception."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that holds us
    while True:
        try:
            number, lattices = connection.recv()
        except (EOFError, OSError):
            return
        answer: Spins | Exception
        try:
            answer = _solve(number, lattices)
        except (InputError, RuntimeError) as error:
            answer = error
        except Exception as error:
            answer = RuntimeError(f"piece {number}: {type(error).__name__}: {error}")
        try:
            connection.send(answer)
        except OSError:
            return
