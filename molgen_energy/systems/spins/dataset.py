"""Spin glasses with their ground states: drawn by number, solved in several processes."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from molgen_energy import __version__
from molgen_energy.data.datasets.base import Dataset, option
from molgen_energy.data.splits import check_fractions, check_seed, parse_fractions, random_split
from molgen_energy.distributed import default_workers
from molgen_energy.errors import InputError, PeerLostError, unknown_name
from molgen_energy.progress import ProgressCallback
from molgen_energy.systems.spins.lattices import BOUNDARIES, Lattices, Spins, check_size

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
) -> Generator[tuple[int, Lattices], None, None]:
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
    from molgen_energy.systems.spins.ground_states import check_installed

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
    from molgen_energy.systems.spins.ground_states import ground_states  # SciPy, for this alone

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
            raise PeerLostError(
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


@dataclass(frozen=True)
class SpinGlasses(Dataset):
    """Spin glasses on square lattices, with their exact ground states.

    Solved pieces wait in FILE.parts; the same command goes on with what was broken off.
    """

    name = "spins"
    samples = "lattices"
    output = "spins.h5"

    size: int | None = option(None, "Sites along a side; default: 16.")
    count: int | None = option(None, "How many lattices; default: 20,000.")
    boundary: str = option("open", "open, or periodic for an even size.")
    couplings: str = option(
        "uniform",
        "uniform in [-1, 1], binary (-1 or 1), or an .npz of your own with `right` and `down`, "
        "(M, L, L) each: from site (r, c) to (r, c+1) and to (r+1, c).",
    )
    split: str = option("0.475,0.025,0.5", "Shares for training, validation, test.")
    seed: int = option(0, "Of couplings and split.")
    workers: int | None = option(
        None, "Processes, 0 for this one alone; default: one for each processor."
    )

    def _size(self) -> int:
        return 16 if self.size is None else self.size

    def _count(self) -> int:
        return 20_000 if self.count is None else self.count

    def lattices(self) -> Lattices | Callable[[range], Lattices]:
        """The lattices without ground states, or what draws those of some numbers.

        Raises
        ------
        InputError
            An option does not serve.
        """
        if self.boundary not in BOUNDARIES:
            raise InputError(unknown_name("boundary", self.boundary, BOUNDARIES))
        periodic = self.boundary == "periodic"
        check_seed(self.seed)
        if self.workers is not None and self.workers < 0:
            raise InputError(f"--workers {self.workers}: expected 0 or more")
        check_fractions(parse_fractions(self.split))
        if self.couplings not in KINDS:
            path = Path(self.couplings)
            if path.suffix.lower() != ".npz":
                raise InputError(unknown_name("--couplings", self.couplings, (*KINDS, "FILE.npz")))
            from molgen_energy.systems.spins.files import read_couplings

            if self.size is not None or self.count is not None:
                raise InputError(f"--size and --count are those of {path}; leave them out")
            return read_couplings(path, periodic)
        size, kind, seed = self._size(), self.couplings, self.seed
        check_size(size, periodic, f"--size {size}")
        if self._count() < 1:
            raise InputError(f"--count {self.count}: ask for at least one lattice")
        return lambda numbers: draw_couplings(numbers, size, periodic, kind, seed)

    def write(self, output: Path, progress: ProgressCallback) -> str:
        """Solve the lattices and write them, from the pieces that are solved already."""
        from molgen_energy.data.arrays import write_arrays
        from molgen_energy.data.hdf5 import check_hdf5_name
        from molgen_energy.data.shards import ShardFolder, check_unchanged, shards_folder
        from molgen_energy.systems.spins.ground_states import check_installed

        check_hdf5_name(output)
        source = self.lattices()
        count, size = self._count(), self._size()
        if isinstance(source, Lattices):
            count, size = len(source), source.size
        asked: dict[str, Any] = {
            "couplings": _name(source) if isinstance(source, Lattices) else self.couplings,
            "size": size,
            "count": count,
            "boundary": self.boundary,
            "seed": self.seed,
        }
        check_installed(self.boundary == "periodic")
        begun = asked | {"version": __version__}
        if not shards_folder(output).exists():
            ShardFolder.begin(output, "preprocess spins", begun)
        wanted = pieces_of(count)
        with ShardFolder(output, "preprocess spins", lead=True) as pieces:
            check_unchanged(pieces.manifest, begun, pieces.folder, "preprocess")
            solved = {k: found for k in wanted if (found := pieces.load(_file(k))) is not None}
            done = sum(len(found["spins"]) for found in solved.values())
            progress(done, count)
            missing = {k: numbers for k, numbers in wanted.items() if k not in solved}
            try:
                with contextlib.closing(solved_pieces(source, missing, self.workers)) as finished:
                    for k, lattices in finished:
                        solved[k] = _columns(lattices)
                        pieces.keep(_file(k), solved[k])
                        done += len(lattices)
                        progress(done, count)
            finally:
                if not solved:
                    pieces.remove()
            columns = {
                name: np.concatenate([solved[k][name] for k in wanted])
                for name in ("right", "down", "spins", "energy")
            }
            labels = random_split(count, parse_fractions(self.split), self.seed)
            write_arrays(
                output,
                "spins",
                f"{count:,} {asked['couplings']} spin glasses of {size}×{size}, "
                f"{self.boundary} boundary, seed {self.seed}",
                columns | {"split": labels},
                asked,
            )
            pieces.remove()
        per_site = float(columns["energy"].mean()) / size**2
        return f"ground states of mean energy {per_site:.4f} a site"


def _file(piece: int) -> str:
    return f"{piece:06d}.part"


def _name(lattices: Lattices) -> str:
    """What tells given couplings from others."""
    digest = hashlib.sha256(lattices.couplings().tobytes()).hexdigest()[:16]
    return f"given ({digest})"


def _columns(lattices: Lattices) -> dict[str, NDArray[Any]]:
    assert lattices.spins is not None
    return {
        "right": np.ascontiguousarray(lattices.right),
        "down": np.ascontiguousarray(lattices.down),
        "spins": np.ascontiguousarray(lattices.spins),
        "energy": lattices.energies(),
    }
