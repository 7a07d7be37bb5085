"""Spin glasses with exact ground states: couplings drawn by number, solved in worker processes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from molgen_energy import __version__
from molgen_energy.data.splits import check_fractions, check_seed, parse_fractions, random_split
from molgen_energy.datasets.base import Dataset, option, workers_option
from molgen_energy.distributed import check_workers, worker_count
from molgen_energy.errors import InputError, PeerLostError, counted, unknown_name
from molgen_energy.progress import ProgressCallback
from molgen_energy.systems.spins.lattices import BOUNDARIES, Lattices, Spins, check_size

if TYPE_CHECKING:
    from molgen_energy.data.shards import ShardFolder
    from molgen_energy.systems.spins.shards import SpinManifest

KINDS = ("uniform", "binary")
CHUNK_SIZE = 50
"""Lattices in a chunk: a few seconds of work, so that little is lost when a run stops."""

_SOLVERS = "molgen_energy.systems.spins.ground_states"
_BITS = 23  # of uniform couplings


def draw_couplings(
    numbers: Iterable[int], size: int, periodic: bool, kind: str, seed: int
) -> Lattices:
    """Independent random couplings of the lattices with the given numbers.

    Those of lattice i depend on seed, size, kind and i alone. With an open boundary they are the
    same as with a periodic one, except for zeros where a coupling has no meaning.

    Parameters
    ----------
    numbers
        Lattices to draw.
    size
        Sites along a side, L.
    kind
        `uniform`: odd multiples of 2⁻²³ between −1 and 1, all equally likely; symmetric, never
        zero, and coarse enough that their sums are exact. `binary`: −1 and 1.

    Returns
    -------
    Lattices without spins; couplings (M, L, L), in the unit of energy.

    Raises
    ------
    InputError
        The size, the kind or the seed is not valid.
    """
    check_size(size, periodic)
    if kind not in KINDS:
        raise InputError(unknown_name("kind of couplings", kind, KINDS))
    if seed < 0:
        raise InputError(f"a seed of {seed} is negative; take 0 or more")
    # Raw words of the generator are the same in every version of NumPy.
    words = [
        np.random.PCG64(np.random.SeedSequence([seed, i])).random_raw(2 * size * size)
        for i in numbers
    ]
    bits = 1 if kind == "binary" else _BITS
    whole = (np.array(words, np.uint64) >> np.uint64(64 - bits)).astype(np.int64)
    values = (2 * whole + 1 - 2**bits) * (1.0 if kind == "binary" else 2.0**-_BITS)
    both = values.reshape(-1, 2, size, size).astype(np.float32)
    if not periodic:
        both[:, 0, :, -1] = 0
        both[:, 1, -1, :] = 0
    return Lattices(both[:, 0], both[:, 1], periodic)


@dataclass(frozen=True)
class LatticeChunk:
    """Lattices that one worker process solves together."""

    number: int
    lattices: Lattices

    def __len__(self) -> int:
        return len(self.lattices)

    def __str__(self) -> str:
        return f"chunk {self.number}"


def chunk_ranges(count: int, chunk_size: int = CHUNK_SIZE) -> dict[int, range]:
    """Ranges of at most `chunk_size` of the numbers 0 … count − 1, by the number of the chunk."""
    starts = range(0, count, chunk_size)
    return {k: range(start, min(count, start + chunk_size)) for k, start in enumerate(starts)}


def solve_chunks(
    source: Lattices | Callable[[range], Lattices],
    chunks: Mapping[int, range],
    workers: int | None = None,
) -> Generator[LatticeChunk, None, None]:
    """Find the ground states of chunks of lattices.

    Parameters
    ----------
    source
        All lattices, or a function that draws those of a range; it runs in this process.
    chunks
        The lattices of each chunk, by the number of the chunk.
    workers
        Number of processes, of one thread each; None uses one for each processor, 0 solves in this
        process. They end with the iterator, and with Ctrl-C.

    Yields
    ------
    Each chunk, with spins, as soon as it is solved: not in order.

    Raises
    ------
    InputError
        A solver is not installed, or a lattice is invalid.
    RuntimeError
        A solver failed; the message names the chunk and the lattice.
    PeerLostError
        A worker process died.
    """
    from molgen_energy.systems.spins.ground_states import check_installed
    from molgen_energy.workers import WorkerPool

    drawn = (
        LatticeChunk(
            number,
            source.select(slice(numbers.start, numbers.stop, numbers.step))
            if isinstance(source, Lattices)
            else source(numbers),
        )
        for number, numbers in chunks.items()
    )
    first = next(drawn, None)
    if first is None:
        return
    check_installed(first.lattices.periodic)  # before any process starts
    count = min(worker_count(workers), len(chunks))
    with WorkerPool(count, preload=[_SOLVERS]) as pool:
        for chunk, spins in pool.map(
            _solve_chunk, chain([first], drawn), _report_lost, ordered=False
        ):
            yield replace(chunk, lattices=chunk.lattices.with_spins(spins))


def _solve_chunk(chunk: LatticeChunk) -> Spins:
    """Ground states (M, L, L) of a chunk; runs in a worker process."""
    from molgen_energy.systems.spins.ground_states import ground_states  # imports SciPy

    try:
        return ground_states(chunk.lattices)
    except InputError:
        raise
    except Exception as error:
        kind = "" if type(error) is RuntimeError else f"{type(error).__name__}: "
        raise RuntimeError(f"{chunk}: {kind}{error}") from error


def _report_lost(chunk: LatticeChunk, reason: str) -> Spins:
    raise PeerLostError(f"{chunk}: {reason}; if memory is short, use fewer processes (--workers)")


@dataclass(frozen=True)
class SpinGlasses(Dataset):
    """Spin glasses on square lattices, with their exact ground states.

    Solved chunks are kept in FILE.shards. After an interruption the same command continues there.
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
    seed: int = option(0, "Seed of couplings and split.")
    workers: int | None = workers_option()

    def _size(self) -> int:
        return 16 if self.size is None else self.size

    def _count(self) -> int:
        return 20_000 if self.count is None else self.count

    def lattices(self) -> Lattices | Callable[[range], Lattices]:
        """The lattices without ground states, or a function that draws those of a range.

        Raises
        ------
        InputError
            The value of an option is not valid.
        """
        if self.boundary not in BOUNDARIES:
            raise InputError(unknown_name("boundary", self.boundary, BOUNDARIES))
        periodic = self.boundary == "periodic"
        check_seed(self.seed)
        check_workers(self.workers)
        check_fractions(parse_fractions(self.split))
        if self.couplings not in KINDS:
            path = Path(self.couplings)
            if path.suffix.lower() != ".npz":
                raise InputError(unknown_name("--couplings", self.couplings, (*KINDS, "FILE.npz")))
            from molgen_energy.systems.spins.files import read_couplings

            if self.size is not None or self.count is not None:
                raise InputError(f"{path} sets --size and --count; leave them out")
            return read_couplings(path, periodic)
        size, kind, seed = self._size(), self.couplings, self.seed
        check_size(size, periodic, f"--size {size}")
        if self._count() < 1:
            raise InputError(f"--count {self.count}: expected 1 or more")
        return lambda numbers: draw_couplings(numbers, size, periodic, kind, seed)

    def write(self, output: Path, progress: ProgressCallback) -> str:
        """Solve the lattices and write them; continues from the chunks in FILE.shards.

        Parameters
        ----------
        output
            HDF5 file to write.
        progress
            Called with the number of solved lattices and of all lattices.

        Returns
        -------
        A line about the result.

        Raises
        ------
        InputError
            The value of an option is not valid, a solver is not installed, the file cannot be
            written, or FILE.shards belongs to other options.
        RuntimeError, PeerLostError
            See `solve_chunks`.
        """
        from molgen_energy.data.arrays import write_arrays
        from molgen_energy.data.hdf5 import check_hdf5_name
        from molgen_energy.data.shards import FORMAT, ShardFolder, check_unchanged, shards_folder
        from molgen_energy.systems.spins.ground_states import check_installed
        from molgen_energy.systems.spins.shards import SpinManifest

        check_hdf5_name(output)
        source = self.lattices()
        count, size = self._count(), self._size()
        if isinstance(source, Lattices):
            count, size = len(source), source.size
        options: dict[str, Any] = {
            "couplings": _fingerprint(source) if isinstance(source, Lattices) else self.couplings,
            "size": size,
            "count": count,
            "boundary": self.boundary,
            "seed": self.seed,
        }
        check_installed(self.boundary == "periodic")
        manifest = SpinManifest(**options, format=FORMAT, version=__version__)
        if not shards_folder(output).exists():
            ShardFolder.begin(output, manifest)
        ranges = chunk_ranges(count)
        with ShardFolder(output, "preprocess spins", SpinManifest, lead=True) as shards:
            check_unchanged(shards.manifest, manifest, shards.folder, "preprocess")
            solved = {k: arrays for k in ranges if (arrays := _solved(shards, k, ranges[k], size))}
            done = sum(len(arrays["spins"]) for arrays in solved.values())
            progress(done, count)
            unsolved = {k: numbers for k, numbers in ranges.items() if k not in solved}
            try:
                with contextlib.closing(solve_chunks(source, unsolved, self.workers)) as chunks:
                    for chunk in chunks:
                        solved[chunk.number] = _columns(chunk.lattices)
                        shards.store(_shard(chunk.number), solved[chunk.number])
                        done += len(chunk)
                        progress(done, count)
            finally:
                if not solved:
                    shards.remove()
            columns = {
                name: np.concatenate([solved[k][name] for k in ranges])
                for name in ("right", "down", "spins", "energy")
            }
            labels = random_split(count, parse_fractions(self.split), self.seed)
            write_arrays(
                output,
                "spins",
                f"{counted(count, options['couplings'] + ' spin glasses')} of {size}×{size}, "
                f"{self.boundary} boundary, seed {self.seed}",
                columns | {"split": labels},
                options,
            )
            shards.remove()
        per_site = float(columns["energy"].mean()) / size**2
        return f"ground states of mean energy {per_site:.4f} a site"


def _shard(chunk: int) -> str:
    """File name of a solved chunk."""
    return f"{chunk:06d}.shard"


def _solved(
    shards: ShardFolder[SpinManifest], chunk: int, numbers: range, size: int
) -> dict[str, NDArray[Any]] | None:
    """The arrays of a solved chunk; None if it is missing or damaged."""
    from molgen_energy.systems.spins.shards import SHAPES

    arrays = shards.load(_shard(chunk), SHAPES)
    if arrays is None or arrays["right"].shape != (len(numbers), size, size):
        return None
    lattices = Lattices(arrays["right"], arrays["down"], shards.manifest.boundary == "periodic")
    spins_are_signs = np.isin(arrays["spins"], (-1, 1)).all()
    if not spins_are_signs or not np.isfinite(lattices.couplings()).all():
        return None
    energies = lattices.energies(arrays["spins"])
    return arrays if np.allclose(energies, arrays["energy"], rtol=1e-9) else None


def _fingerprint(lattices: Lattices) -> str:
    """Text that distinguishes couplings from a file from any others."""
    digest = hashlib.sha256(lattices.couplings().tobytes()).hexdigest()[:16]
    return f"given ({digest})"


def _columns(lattices: Lattices) -> dict[str, NDArray[Any]]:
    """Arrays to store, by the name of the data set."""
    assert lattices.spins is not None
    return {
        "right": np.ascontiguousarray(lattices.right),
        "down": np.ascontiguousarray(lattices.down),
        "spins": np.ascontiguousarray(lattices.spins),
        "energy": lattices.energies(),
    }
