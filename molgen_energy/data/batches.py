"""Training data as batches of molecules of about the same size, resident or streamed.

Training molecules come in *windows*: sets of molecules that are in memory, on the device, with the
other inputs of a loss. Data that fits in memory is one window, made at the start. A larger file is
cut into short runs of molecules. Each epoch is a new sequence of windows, each of many runs, and a
thread reads the next window during training on the current one. A `BatchIndex` names its window and
the molecules in it.
"""

from __future__ import annotations

import bisect
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecules, batch_by_size
from molgen_energy.data.splits import SPLITS

_BATCHES_PER_BLOCK = 32
_RUN = 4096  # most molecules of a run: few enough to mix well, enough to read fast
_RUNS_PER_WINDOW = 32  # at least, where batches are small enough
_BLOCK = 1 << 20  # molecules whose split is read at once


@dataclass(frozen=True)
class PairBudget:
    """Size of batches of at most so many pairs of atoms, B·N², instead of so many molecules.

    Batches of larger molecules hold fewer of them, so that all take about the same memory and time.
    A molecule with more pairs is a batch of its own.
    """

    pairs: int

    def expected(self, sizes: NDArray[np.int64]) -> int:
        """About how many molecules of these sizes make a batch, if it is not padded."""
        return max(1, int(self.pairs / np.mean(np.square(sizes, dtype=np.float64))))


BatchSize = int | PairBudget
"""Molecules in a batch, or a bound of their pairs of atoms."""

Window = TypeVar("Window")
Window_co = TypeVar("Window_co", covariant=True)


@dataclass(frozen=True)
class BatchIndex:
    """Which training molecules a batch holds.

    window
        Number of the window that holds them.
    which
        Their numbers within the window, (B,).
    sizes
        Their numbers of atoms, (B,), known without the window.
    weight
        Of the mean of their losses: 1, but for a `PairBudget` the number of molecules over its mean
        in the epoch. With it a molecule of a large batch counts as much as one of a small batch.
    """

    window: int
    which: NDArray[np.int64]
    sizes: NDArray[np.int64]
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.which)

    def shard(self, rank: int, world: int) -> BatchIndex:
        """The shard of process `rank` of `world`; empty with more processes than molecules."""
        return replace(self, which=self.which[rank::world], sizes=self.sizes[rank::world])

    def largest(self, count: int) -> BatchIndex:
        """The `count` largest molecules of the batch."""
        order = np.argsort(-self.sizes, kind="stable")[:count]
        return replace(self, which=self.which[order], sizes=self.sizes[order])


@dataclass(frozen=True)
class MoleculeBatch:
    """Padded molecules: B of them, N atoms of the largest; zero at padding.

    mask
        (B, N), true at real atoms.
    data
        `positions` (B, N, 3) float32 in Å, `atomic_numbers` (B, N) uint8, and of the optional
        columns, if they were read, `formal_charges` (B, N) int8 and `bond_orders` (B, N, N) uint8.
    properties
        (B,) float64 by name, NaN where missing.
    bonds
        Bonded pairs as an edge list (3, E): the molecule in the batch and two atoms of it.
    groups
        (B,) int64.
    smiles
        (B,) texts, on the CPU.
    """

    mask: Tensor
    data: dict[str, Tensor]
    properties: dict[str, Tensor]
    bonds: Tensor | None = None
    groups: Tensor | None = None
    smiles: NDArray[np.object_] | None = None


class DeviceMolecules:
    """Molecules on a device, unpadded; a batch is an index into them.

    Parameters
    ----------
    molecules
        With the optional columns that batches should have. Positions take 12 bytes an atom,
        elements and charges 1 each, a bond 9 bytes, offsets and properties 8 bytes a molecule.
    device
        Where they are kept.
    dense_bonds
        Whether batches hold `bond_orders`, besides the list of bonds.
    """

    def __init__(
        self, molecules: Molecules, device: torch.device, dense_bonds: bool = False
    ) -> None:
        self.sizes = molecules.sizes
        self._offsets = torch.from_numpy(molecules.offsets).to(device)
        atoms = {
            "positions": molecules.positions,
            "atomic_numbers": molecules.atomic_numbers,
            "formal_charges": molecules.formal_charges,
        }
        self._atoms = {
            name: torch.from_numpy(values).to(device)
            for name, values in atoms.items()
            if values is not None
        }
        self._properties = {
            name: torch.from_numpy(p.values).to(device) for name, p in molecules.properties.items()
        }
        self._groups = None
        if molecules.groups is not None:
            self._groups = torch.from_numpy(molecules.groups).to(device)
        self._smiles = molecules.smiles
        self._dense_bonds = dense_bonds
        self._bond_counts: NDArray[np.int64] | None = None
        if (bonds := molecules.bonds) is not None:
            self._bond_counts = np.diff(bonds.offsets)
            self._bond_offsets = torch.from_numpy(bonds.offsets).to(device)
            self._bond_index = torch.from_numpy(bonds.index.astype(np.int32)).to(device)
            self._bond_order = torch.from_numpy(bonds.order).to(device)

    def __len__(self) -> int:
        return len(self.sizes)

    def batch(self, which: NDArray[np.int64]) -> MoleculeBatch:
        """The chosen molecules (B,), padded to the largest of them."""
        largest = int(self.sizes[which].max())
        index = on_device(which, self._offsets.device)
        atoms = self._offsets[index, None] + torch.arange(largest, device=index.device)
        mask = atoms < self._offsets[index + 1, None]
        atoms = torch.where(mask, atoms, 0)
        data = {}
        for name, values in self._atoms.items():
            inside = mask.view(*mask.shape, *[1] * (values.ndim - 1))
            data[name] = torch.where(inside, values[atoms], 0)
        bonds = None
        if self._bond_counts is not None:
            bonds, order = self._bonds_of(index, self._bond_counts[which])
            if self._dense_bonds:
                dense = order.new_zeros(len(which), largest, largest)
                molecule, i, j = bonds
                dense[molecule, i, j] = dense[molecule, j, i] = order
                data["bond_orders"] = dense
        properties = {name: values[index] for name, values in self._properties.items()}
        return MoleculeBatch(
            mask,
            data,
            properties,
            bonds,
            None if self._groups is None else self._groups[index],
            None if self._smiles is None else self._smiles[which],
        )

    def _bonds_of(self, index: Tensor, counts: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Edge list (3, E) and orders (E,) of the chosen molecules, from their numbers of bonds."""
        device, total = index.device, int(counts.sum())
        repeats = on_device(counts, device)
        place = torch.arange(len(counts), device=device)
        molecule = torch.repeat_interleave(place, repeats, output_size=total)
        first = self._bond_offsets[index] - (repeats.cumsum(0) - repeats)
        rows = torch.arange(total, device=device) + first[molecule]
        pairs = self._bond_index[rows].long()
        return torch.cat([molecule[None], pairs.t()]), self._bond_order[rows]


def on_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """An array on a device. A GPU does not finish its other work before the copy."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class EpochStarts:
    """The number of batches before each epoch, which is the step at which the epoch begins.

    Parameters
    ----------
    batches
        Of every epoch; or a function that counts those of one epoch, which is called for all epochs
        up to the one in question, once each.
    """

    def __init__(self, batches: int | Callable[[int], int]) -> None:
        self._batches = batches
        self._starts = [0]

    def __getitem__(self, epoch: int) -> int:
        """The first step of an epoch."""
        if isinstance(self._batches, int):
            return epoch * self._batches
        while len(self._starts) <= epoch:
            self._count(self._batches)
        return self._starts[epoch]

    def epoch_of(self, step: int) -> int:
        """The epoch of a step, both from 0."""
        if isinstance(self._batches, int):
            return step // self._batches
        while self._starts[-1] <= step:
            self._count(self._batches)
        return bisect.bisect_right(self._starts, step) - 1

    def _count(self, batches: Callable[[int], int]) -> None:
        self._starts.append(self._starts[-1] + batches(len(self._starts) - 1))


class TrainingData(Protocol[Window_co]):
    """Batches of training molecules, epoch by epoch."""

    starts: EpochStarts
    seconds_waited: float
    """Seconds that `window` has waited for data, including the first window."""

    def epoch(self, epoch: int) -> Sequence[BatchIndex]:
        """The batches of an epoch: every training molecule once, by seed and `epoch` alone."""

    def window(self, number: int) -> Window_co:
        """The window with a number, which `BatchIndex.window` names."""

    def sample(self, molecules: int) -> Window_co:
        """About `molecules` training molecules for averages; all of them if they are in memory."""

    def close(self) -> None:
        """Stop reading; no window is available after that."""


class ResidentData(Generic[Window]):
    """Training data that is one window.

    Parameters
    ----------
    window
        The molecules, with the other inputs of a loss.
    sizes
        Atoms of each, (M,).
    batch_size, seed
        Of the batches.
    """

    def __init__(
        self, window: Window, sizes: NDArray[np.int64], batch_size: BatchSize, seed: int
    ) -> None:
        self._window, self._sizes = window, sizes
        self._batch_size, self._seed = batch_size, seed
        if isinstance(batch_size, PairBudget):
            self.starts = EpochStarts(lambda epoch: len(self._batches(epoch)))
        else:
            self.starts = EpochStarts(batches_per_epoch(len(sizes), batch_size))
        self.seconds_waited = 0.0

    def _batches(self, epoch: int) -> list[NDArray[np.int64]]:
        return epoch_batches(self._sizes, self._batch_size, self._seed, epoch)

    def epoch(self, epoch: int) -> list[BatchIndex]:
        """The batches of an epoch: every training molecule once, by seed and `epoch` alone."""
        batches = self._batches(epoch)
        mean = _mean_batch(self._batch_size, len(self._sizes), len(batches))
        return _indices(0, batches, self._sizes, mean)

    def window(self, number: int) -> Window:
        """All molecules."""
        return self._window

    def sample(self, molecules: int) -> Window:
        """All molecules."""
        return self._window

    def close(self) -> None:
        """Nothing is read after the start."""


class StreamedData(Generic[Window]):
    """Training data of a file that need not fit in memory, in windows read in advance.

    The training molecules of the file are cut into short runs. An epoch puts the runs in random
    order and makes each window of several; within a window batches are made as for resident data.
    Window k of epoch e has the number e·windows + k, which determines its molecules. At most two
    windows are in memory: the current one, and the next one, which a thread reads.

    Parameters
    ----------
    file
        An open file with training molecules; `close` closes it. Only its offsets and split
        (9 bytes a molecule) take memory that grows with the file.
    make
        Makes a window of molecules, their numbers in the file and among the training molecules,
        (M,) each, and `check_cancelled`, which raises once the window is not needed any more.
        Called in the reading thread.
    molecules
        Most molecules of a window; at least a batch of a number of molecules.
    batch_size, seed
        Size of the batches, and seed of their order.
    columns
        Optional columns of the file that molecules are read with.
    """

    def __init__(
        self,
        file: MoleculeFile,
        make: Callable[
            [Molecules, NDArray[np.int64], NDArray[np.int64], Callable[[], None]], Window
        ],
        *,
        molecules: int,
        batch_size: BatchSize,
        seed: int,
        columns: Collection[str] = (),
    ) -> None:
        self._file, self._make, self._columns = file, make, columns
        self._batch_size, self._seed = batch_size, seed
        # All runs except the last are whole batches of a number of molecules, so every epoch has
        # the same number of these for any combination of runs, and no window ends with a small one.
        whole = batch_size if isinstance(batch_size, int) else 1
        self._run = whole * max(1, min(_RUN, molecules // _RUNS_PER_WINDOW) // whole)
        self._cuts, self._total = self._cut()
        self._windows = -(-(len(self._cuts) - 1) // max(1, molecules // self._run))
        if isinstance(batch_size, PairBudget):
            self.starts = EpochStarts(lambda epoch: sum(self._counts(epoch)))
        else:
            self.starts = EpochStarts(batches_per_epoch(self._total, batch_size))
        self.seconds_waited = 0.0
        self._present: tuple[int, Window] | None = None
        self._following: tuple[int, Future[Window]] | None = None
        self._cancelled = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="molecules")

    def _cut(self) -> tuple[NDArray[np.int64], int]:
        """Starts of the runs, then the file's end; and the number of training molecules."""
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
            begin, end = self._cuts[run], self._cuts[run + 1]
            split = self._file.split[begin:end]
            members = begin + np.flatnonzero(split == SPLITS.index("train"))
            numbers.append(members)
            ranks.append(run * self._run + np.arange(len(members)))
        return np.concatenate(numbers), np.concatenate(ranks)

    def _shuffled(self, stream: int, epoch: int) -> NDArray[np.int64]:
        """All runs in a random order, which differs from that of batches by the stream."""
        rng = np.random.default_rng([self._seed, epoch, stream])
        return rng.permutation(len(self._cuts) - 1)

    def _runs(self, epoch: int) -> list[NDArray[np.int64]]:
        """The runs of each window of an epoch, ascending within the window."""
        windows = np.array_split(self._shuffled(1, epoch), self._windows)
        return [np.sort(window) for window in windows]

    def _content(self, window: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Training molecules of a window: numbers in the file and among all of training."""
        epoch, place = divmod(window, self._windows)
        return self._members(self._runs(epoch)[place])

    def _batches(self, window: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """The batches of a window, and the sizes of its molecules."""
        sizes = self._file.sizes(self._content(window)[0])
        return epoch_batches(sizes, self._batch_size, self._seed, window), sizes

    def _counts(self, epoch: int) -> list[int]:
        """The number of batches of each window of an epoch."""
        if isinstance(self._batch_size, PairBudget):
            return [len(self._batches(window)[0]) for window in self._windows_of(epoch)]
        last, whole = len(self._cuts) - 2, self._run // self._batch_size
        # Batches that the last run lacks.
        short = (last + 1) * whole - batches_per_epoch(self._total, self._batch_size)
        return [len(runs) * whole - short * int(runs[-1] == last) for runs in self._runs(epoch)]

    def _windows_of(self, epoch: int) -> range:
        return range(epoch * self._windows, (epoch + 1) * self._windows)

    def epoch(self, epoch: int) -> Sequence[BatchIndex]:
        """The batches of an epoch: every training molecule once, by seed and `epoch` alone.

        Batches of a window are made when the first of them is used; no molecules are read.
        """
        counts = self._counts(epoch)
        mean = _mean_batch(self._batch_size, self._total, sum(counts))

        def make(window: int) -> list[BatchIndex]:
            return _indices(window, *self._batches(window), mean)

        return _BatchSequence(make, self._windows_of(epoch), counts)

    def window(self, number: int) -> Window:
        """The molecules that batches of this window index; starts reading the next window.

        Raises
        ------
        InputError
            The file is cut off, or holds data that cannot be trained on.
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
            self._cancelled.set()  # the thread is reading another window than the next one
            self._following[1].exception()
            self._cancelled.clear()
        self._following = None  # freed first, so that there are never three windows in memory
        self._following = number, self._thread.submit(self._read, *self._content(number))

    def _read(self, numbers: NDArray[np.int64], ranks: NDArray[np.int64]) -> Window:
        molecules = self._file.read(numbers, self._columns, self._check_cancelled)
        return self._make(molecules, numbers, ranks, self._check_cancelled)

    def _check_cancelled(self) -> None:
        if self._cancelled.is_set():
            raise _Cancelled

    def sample(self, molecules: int) -> Window:
        """About `molecules` training molecules, in runs that the seed chooses."""
        runs = self._shuffled(2, 0)[: max(1, molecules // self._run)]
        return self._read(*self._members(np.sort(runs)))

    def close(self) -> None:
        """End the reading thread and close the file."""
        self._cancelled.set()
        self._thread.shutdown(cancel_futures=True)
        self._present = self._following = None
        self._file.close()


class _Cancelled(Exception):
    """The window that is being read is not needed any more."""


class _BatchSequence(Sequence[BatchIndex]):
    """The batches of several windows; those of a window are made when one of them is used."""

    def __init__(
        self,
        make: Callable[[int], list[BatchIndex]],
        windows: Sequence[int],
        counts: Sequence[int],
        at: range | None = None,
    ) -> None:
        self._make, self._windows, self._counts = make, windows, counts
        self._ends = np.cumsum(counts)
        self._at = range(sum(counts)) if at is None else at
        self._made: tuple[int, list[BatchIndex]] | None = None

    def __len__(self) -> int:
        return len(self._at)

    @overload
    def __getitem__(self, at: int) -> BatchIndex: ...

    @overload
    def __getitem__(self, at: slice) -> _BatchSequence: ...

    def __getitem__(self, at: int | slice) -> BatchIndex | _BatchSequence:
        if isinstance(at, slice):
            return _BatchSequence(self._make, self._windows, self._counts, self._at[at])
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
    sizes: NDArray[np.int64], batch_size: BatchSize, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """Every molecule once in random batches of similar size; depends on seed and epoch alone.

    A random order is cut into blocks of 32 batches; within a block molecules are sorted by size
    and cut into batches, whose order is random again. Padding stays small, and batches still hold
    other molecules in each epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(sizes))
    count = batch_size.expected(sizes) if isinstance(batch_size, PairBudget) else batch_size
    block = count * _BATCHES_PER_BLOCK
    # Blocks hold a whole number of batches of a number of molecules, so only the epoch's last one
    # can be smaller. With a budget of pairs, that of the largest molecules of a block can be.
    batches = []
    for start in range(0, len(order), block):
        members = order[start : start + block]
        batches += [members[which] for which in _by_size(sizes[members], batch_size)]
    return [batches[k] for k in rng.permutation(len(batches))]


def _by_size(sizes: NDArray[np.int64], batch_size: BatchSize) -> Iterable[NDArray[np.int64]]:
    """Every molecule once, by ascending size, in batches."""
    if isinstance(batch_size, PairBudget):
        return batch_by_size(sizes, batch_size.pairs)
    order = np.argsort(sizes, kind="stable")
    return [order[k : k + batch_size] for k in range(0, len(order), batch_size)]


def _mean_batch(batch_size: BatchSize, molecules: int, batches: int) -> float | None:
    """Mean molecules of a batch if their numbers differ; None if not, but for the last batch."""
    return molecules / batches if isinstance(batch_size, PairBudget) else None


def _indices(
    window: int, batches: list[NDArray[np.int64]], sizes: NDArray[np.int64], mean: float | None
) -> list[BatchIndex]:
    """Batches of a window, with weights in proportion to their numbers unless `mean` is None."""
    return [
        BatchIndex(window, which, sizes[which], 1.0 if mean is None else len(which) / mean)
        for which in batches
    ]


class Padding(NamedTuple):
    """Share of a padded batch that is padding, from 0 to 1."""

    atoms: float
    """Of B·N atoms."""
    pairs: float
    """Of B·N² pairs."""


def padding(batches: Iterable[BatchIndex]) -> Padding:
    """The share of padding in all batches together."""
    real, padded = np.zeros(2), np.zeros(2)
    for batch in batches:
        largest = float(batch.sizes.max())
        real += batch.sizes.sum(), (batch.sizes**2).sum()
        padded += len(batch) * largest, len(batch) * largest**2
    return Padding(*(1 - real / padded).tolist())
