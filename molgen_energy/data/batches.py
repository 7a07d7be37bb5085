"""Training data as batches of molecules of about the same size, resident or streamed.

Training molecules come in *windows*: sets of molecules that are in memory as a whole, on the
device, with what a loss needs besides. Data that fits is one window, made at the start. Of a larger
file, each epoch is a new sequence of windows, each of many short runs of the file, read while the
one before it is trained on. A batch names its window and the molecules within it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecules
from molgen_energy.data.splits import SPLITS

_BATCHES_PER_BLOCK = 32
_RUN = 4096  # most molecules of a run: few enough to mix, enough to be read at speed
_RUNS_PER_WINDOW = 32  # at least, where batches are small enough
_BLOCK = 1 << 20  # molecules whose split is looked at in one go

Window = TypeVar("Window")
Window_co = TypeVar("Window_co", covariant=True)


@dataclass(frozen=True)
class Batch:
    """Which training molecules to take together.

    window
        Number of the window that holds them.
    which
        Their numbers within the window, (B,).
    sizes
        Their numbers of atoms, (B,), known without the window.
    """

    window: int
    which: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.which)

    def share(self, rank: int, world: int) -> Batch:
        """What process `rank` of `world` takes of it; nothing, where there are more processes."""
        return Batch(self.window, self.which[rank::world], self.sizes[rank::world])

    def largest(self, count: int) -> Batch:
        """So many of its largest molecules."""
        order = np.argsort(-self.sizes, kind="stable")[:count]
        return Batch(self.window, self.which[order], self.sizes[order])


class MoleculeBatch(NamedTuple):
    """Padded molecules: positions (B, N, 3) Å, types (B, N), mask (B, N) true at real atoms."""

    positions: Tensor
    types: Tensor
    mask: Tensor


class ResidentMolecules:
    """Molecules that stay on the device, unpadded; a batch is an index into them.

    Parameters
    ----------
    molecules
        Positions are kept as they are, 12 bytes an atom; types take 1 byte, offsets 8 a molecule.
    type_lookup
        Type by atomic number, (256,).
    device
        Where they are kept.
    """

    def __init__(self, molecules: Molecules, type_lookup: Tensor, device: torch.device) -> None:
        self.sizes = molecules.sizes
        types = type_lookup.clamp(min=0).to(torch.uint8).numpy()[molecules.atomic_numbers]
        self._positions = torch.from_numpy(molecules.positions).to(device)
        self._types = torch.from_numpy(types).to(device)
        self._offsets = torch.from_numpy(molecules.offsets).to(device)

    def __len__(self) -> int:
        return len(self.sizes)

    def batch(self, which: NDArray[np.int64]) -> MoleculeBatch:
        """The chosen molecules, padded with zeros to the largest of them."""
        largest = int(self.sizes[which].max())
        index = torch.from_numpy(which).to(self._offsets.device)
        atoms = self._offsets[index, None] + torch.arange(largest, device=index.device)
        mask = atoms < self._offsets[index + 1, None]
        atoms = torch.where(mask, atoms, 0)
        positions = torch.where(mask[..., None], self._positions[atoms], 0)
        return MoleculeBatch(positions, torch.where(mask, self._types[atoms].long(), 0), mask)


class TrainingData(Protocol[Window_co]):
    """Where batches come from."""

    batches_per_epoch: int
    seconds_waited: float
    """Time that `window` has waited for data, the first window included."""

    def epoch(self, epoch: int) -> Sequence[Batch]:
        """The batches of an epoch: every training molecule once, by seed and `epoch` alone."""

    def window(self, number: int) -> Window_co:
        """The window that batches of this number index; reads it where it is not there."""

    def sample(self, molecules: int) -> Window_co:
        """Some training molecules to take averages over: about so many, or more at no cost."""

    def close(self) -> None:
        """Read no more; windows are not to be had after that."""


class ResidentData(Generic[Window]):
    """Training data that is one window.

    Parameters
    ----------
    window
        The molecules, with what goes with them.
    sizes
        Atoms of each, (M,).
    batch_size, seed
        Of the batches.
    """

    def __init__(
        self, window: Window, sizes: NDArray[np.int64], batch_size: int, seed: int
    ) -> None:
        self._window, self._sizes = window, sizes
        self._batch_size, self._seed = batch_size, seed
        self.batches_per_epoch = batches_per_epoch(len(sizes), batch_size)
        self.seconds_waited = 0.0

    def epoch(self, epoch: int) -> list[Batch]:
        """The batches of an epoch: every training molecule once, by seed and `epoch` alone."""
        batches = epoch_batches(self._sizes, self._batch_size, self._seed, epoch)
        return [Batch(0, which, self._sizes[which]) for which in batches]

    def window(self, number: int) -> Window:
        """All molecules."""
        return self._window

    def sample(self, molecules: int) -> Window:
        """All molecules."""
        return self._window

    def close(self) -> None:
        """Nothing is read after the start."""


class StreamedData(Generic[Window]):
    """Training data of a file that need not fit in memory, in windows that are read ahead.

    The file's training molecules are cut into short runs. An epoch puts the runs in random order
    and makes a window of every few; within a window molecules meet in batches as those of resident
    data do. Window k of epoch e has the number e·windows + k, from which what it holds follows. At
    most two windows are in memory: the one asked for last, and the one behind it, which a thread
    reads meanwhile.

    Parameters
    ----------
    file
        Open, with training molecules; closed by `close`. Its offsets and split (9 bytes a molecule)
        are all that grows with it in memory.
    make
        Makes a window of molecules, given their numbers in the file and among the training
        molecules (M,), and a function to call now and then, which raises when the window is not
        wanted any more. Called in the reading thread.
    molecules
        In a window, at most, but at least a batch.
    batch_size, seed
        Of the batches.
    bonds
        Whether molecules are read with the bonds that the file has.
    """

    def __init__(
        self,
        file: MoleculeFile,
        make: Callable[
            [Molecules, NDArray[np.int64], NDArray[np.int64], Callable[[], None]], Window
        ],
        *,
        molecules: int,
        batch_size: int,
        seed: int,
        bonds: bool = False,
    ) -> None:
        self._file, self._make, self._bonds = file, make, bonds
        self._batch_size, self._seed = batch_size, seed
        # Runs are whole batches, but for the last, so that every epoch has as many batches
        # whichever runs meet, and no window ends in a small one.
        self._run = batch_size * max(1, min(_RUN, molecules // _RUNS_PER_WINDOW) // batch_size)
        self._starts, total = self._cut()
        self._windows = -(-(len(self._starts) - 1) // max(1, molecules // self._run))
        self.batches_per_epoch = batches_per_epoch(total, batch_size)
        self.seconds_waited = 0.0
        self._present: tuple[int, Window] | None = None
        self._following: tuple[int, Future[Window]] | None = None
        self._unwanted = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="molecules")

    def _cut(self) -> tuple[NDArray[np.int64], int]:
        """Where runs start in the file, with the file's end behind, and all training molecules."""
        starts, total = [], 0
        for begin in range(0, len(self._file), _BLOCK):
            split = self._file.split[begin : begin + _BLOCK]
            members = begin + np.flatnonzero(split == SPLITS.index("train"))
            starts.append(members[-total % self._run :: self._run])
            total += len(members)
        return np.append(np.concatenate(starts), len(self._file)), total

    def _members(self, runs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Training molecules of ascending runs: numbers in the file and among all of training."""
        numbers, ranks = [], []
        for run in runs.tolist():
            begin, end = self._starts[run], self._starts[run + 1]
            split = self._file.split[begin:end]
            members = begin + np.flatnonzero(split == SPLITS.index("train"))
            numbers.append(members)
            ranks.append(run * self._run + np.arange(len(members)))
        return np.concatenate(numbers), np.concatenate(ranks)

    def _shuffled(self, stream: int, epoch: int) -> NDArray[np.int64]:
        """All runs in a random order; the stream keeps it apart from the orders of batches."""
        rng = np.random.default_rng([self._seed, epoch, stream])
        return rng.permutation(len(self._starts) - 1)

    def _runs(self, epoch: int) -> list[NDArray[np.int64]]:
        """The runs of each window of an epoch, ascending within the window."""
        windows = np.array_split(self._shuffled(1, epoch), self._windows)
        return [np.sort(window) for window in windows]

    def _content(self, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Training molecules of a window: numbers in the file and among all of training."""
        epoch, place = divmod(window, self._windows)
        return self._members(self._runs(epoch)[place])

    def _batches(self, window: int) -> list[Batch]:
        sizes = self._file.sizes(self._content(window)[0])
        batches = epoch_batches(sizes, self._batch_size, self._seed, window)
        return [Batch(window, which, sizes[which]) for which in batches]

    def epoch(self, epoch: int) -> Sequence[Batch]:
        """The batches of an epoch: every training molecule once, by seed and `epoch` alone.

        Found when asked for, window by window; nothing is read.
        """
        last, whole = len(self._starts) - 2, self._run // self._batch_size
        short = (last + 1) * whole - self.batches_per_epoch  # batches that the last run lacks
        counts = [len(runs) * whole - short * int(runs[-1] == last) for runs in self._runs(epoch)]
        first = epoch * self._windows
        return _Batches(self._batches, range(first, first + self._windows), counts)

    def window(self, number: int) -> Window:
        """The molecules that batches of this number index; has the following one read meanwhile.

        Raises
        ------
        InputError
            The file breaks off, or holds what cannot be trained on.
        """
        if self._present is None or self._present[0] != number:
            began = time.perf_counter()
            if self._following is None or self._following[0] != number:
                self._read_ahead(number)
            assert self._following is not None
            self._present = number, self._following[1].result()
            self.seconds_waited += time.perf_counter() - began
            self._read_ahead(number + 1)
        return self._present[1]

    def _read_ahead(self, number: int) -> None:
        if self._following is not None and not self._following[1].done():
            self._unwanted.set()  # another window is being read than the one that is wanted
            self._following[1].exception()
            self._unwanted.clear()
        self._following = (
            None  # what was read for nothing goes first, so that there are never three
        )
        self._following = number, self._thread.submit(self._read, *self._content(number))

    def _read(self, numbers: NDArray[np.int64], ranks: NDArray[np.int64]) -> Window:
        columns = ("bonds",) if self._bonds and "bonds" in self._file.columns else ()
        molecules = self._file.read(numbers, columns, self._go_on)
        return self._make(molecules, numbers, ranks, self._go_on)

    def _go_on(self) -> None:
        if self._unwanted.is_set():
            raise _Unwanted

    def sample(self, molecules: int) -> Window:
        """About so many training molecules, in runs that the seed chooses."""
        runs = self._shuffled(2, 0)[: max(1, molecules // self._run)]
        return self._read(*self._members(np.sort(runs)))

    def close(self) -> None:
        """End the reading thread and close the file; windows are not to be had after that."""
        self._unwanted.set()
        self._thread.shutdown(cancel_futures=True)
        self._present = self._following = None
        self._file.close()


class _Unwanted(Exception):
    """Nobody waits for the window that is being read."""


class _Batches(Sequence[Batch]):
    """The batches of several windows, those of a window made when one of them is asked for."""

    def __init__(
        self,
        make: Callable[[int], list[Batch]],
        windows: Sequence[int],
        counts: Sequence[int],
        at: range | None = None,
    ) -> None:
        self._make, self._windows, self._counts = make, windows, counts
        self._ends = np.cumsum(counts)
        self._at = range(sum(counts)) if at is None else at
        self._made: tuple[int, list[Batch]] | None = None

    def __len__(self) -> int:
        return len(self._at)

    @overload
    def __getitem__(self, at: int) -> Batch: ...

    @overload
    def __getitem__(self, at: slice) -> _Batches: ...

    def __getitem__(self, at: int | slice) -> Batch | _Batches:
        if isinstance(at, slice):
            return _Batches(self._make, self._windows, self._counts, self._at[at])
        number = self._at[at]
        place = int(np.searchsorted(self._ends, number, "right"))
        window = self._windows[place]
        if self._made is None or self._made[0] != window:
            self._made = window, self._make(window)
        return self._made[1][number - int(self._ends[place]) + self._counts[place]]


def batches_per_epoch(molecules: int, batch_size: int) -> int:
    """Number of batches that hold every molecule once."""
    return -(-molecules // batch_size)


def epoch_batches(
    sizes: NDArray[np.int64], batch_size: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Every molecule once in random batches of similar size; depends on seed and epoch alone.

    A random order is cut into blocks of 32 batches; within a block molecules are sorted by size
    and dealt into batches, whose order is random again. Padding stays small, and which molecules
    meet in a batch still changes from epoch to epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(sizes))
    block = batch_size * _BATCHES_PER_BLOCK
    # Blocks hold a whole number of batches, so only the epoch's last batch can be smaller.
    batches = []
    for start in range(0, len(order), block):
        members = order[start : start + block]
        members = members[np.argsort(sizes[members], kind="stable")]
        batches += [members[k : k + batch_size] for k in range(0, len(members), batch_size)]
    return [batches[k] for k in rng.permutation(len(batches))]


class Padding(NamedTuple):
    """Which part of a padded batch is padding, from 0 to 1."""

    atoms: float
    """Of the N places of B molecules."""
    pairs: float
    """Of the N² pairs of places."""


def padding(batches: Iterable[Batch]) -> Padding:
    """The share of padding in all batches together."""
    real, padded = np.zeros(2), np.zeros(2)
    for batch in batches:
        largest = float(batch.sizes.max())
        real += batch.sizes.sum(), (batch.sizes**2).sum()
        padded += len(batch) * largest, len(batch) * largest**2
    return Padding(*(1 - real / padded).tolist())
