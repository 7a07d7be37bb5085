"""Edges: the pairs of atoms that springs connect.

`EDGES` is the registry of kinds of edges. A kind turns samples into `Pairs`, which iterate over the
pairs in blocks, compute differences of a block, and accumulate the forces on the atoms, without a
loop over atoms, pairs or samples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from molgen_energy.config import PositiveFloat, Section, Whole, one_of
from molgen_energy.losses.base import Neighbours, Packing, Samples
from molgen_energy.losses.symmetry import automorphisms, may_be_symmetric

Operand = Literal["prediction", "target", "noisy", "features"]


class Block(ABC):
    """A block of pairs. Its tensors have one shape: first samples, then pairs."""

    weight: Tensor | None
    """Factor of a pair's spring constant, 0 unless both atoms are real and differ; None is 1."""

    @abstractmethod
    def differences(self, operand: Operand) -> Tensor:
        """x_i − x_j of the pairs, (D, …)."""

    @abstractmethod
    def bonded(self) -> Tensor | None:
        """Whether the pairs are bonded; None without bonds."""

    @abstractmethod
    def of_samples(self, values: Tensor) -> Tensor:
        """Values (B,) of the samples of the pairs, of a shape that broadcasts to the pairs."""

    @abstractmethod
    def add(self, totals: Tensor, values: Tensor) -> None:
        """Add the sum of values over ordered pairs to totals, (B,)."""

    @abstractmethod
    def accumulate_forces(self, forces: Tensor) -> None:
        """Add the forces f_ij = −f_ji of the pairs, (D, …), to the totals of both atoms."""


class Pairs(ABC):
    """The connected pairs of atoms of samples, in blocks."""

    @abstractmethod
    def blocks(self) -> Iterator[Block]:
        """The blocks; each is valid until the next one is drawn from the iterator."""

    @abstractmethod
    def forces(self) -> Tensor:
        """The total force on each atom that the blocks accumulated, (B, N, D)."""


class Edges(ABC):
    """A kind of edges."""

    requires: frozenset[str] = frozenset()
    """Inputs that these edges require besides positions, see `Loss.requires`."""
    connects_all: ClassVar[bool] = False
    """Whether all pairs are connected, with weight 1."""

    @classmethod
    def from_config(cls, config: EdgesConfig, seed: int) -> Edges:
        """Edges with the settings of a configuration; of a kind without any, the defaults."""
        return cls()

    @abstractmethod
    def pairs(self, samples: Samples) -> Pairs:
        """The pairs of the samples."""

    def prepare_neighbours(
        self,
        positions: Tensor,
        mask: Tensor | None = None,
        numbers: NDArray[np.int64] | None = None,
    ) -> Neighbours:
        """Edges of samples as a table, which is part of the data.

        Parameters
        ----------
        positions, mask
            As in a call of a loss, (B, N, D) and (B, N).
        numbers
            Which graph of the pool each sample takes, (B,); None is the first.

        Raises
        ------
        ValueError
            This kind finds its edges at each call.
        """
        raise ValueError("these edges do not prepare neighbours: they are found at each call")


def _coordinates(samples: Samples) -> dict[Operand, Tensor]:
    """Views with the coordinate first, (D, B, N); contiguous copies are fast to loop over."""
    operands: dict[Operand, Tensor | None] = {
        "prediction": samples.prediction,
        "target": samples.target,
        "noisy": samples.noisy,
        "features": samples.features,
    }
    return {
        operand: values.detach().movedim(-1, 0)
        for operand, values in operands.items()
        if values is not None
    }


def _pairs_per_block(samples: Samples) -> int:
    """Few enough for a CPU's cache, enough to occupy a GPU."""
    on_cpu = samples.prediction.device.type == "cpu"
    pairs = min(torch.get_num_threads(), 2) << 16 if on_cpu else 1 << 22
    channels = samples.prediction.shape[-1]
    if samples.features is not None:
        channels = max(channels, samples.features.shape[-1])
    return max(1, 3 * pairs // max(3, channels))


# ---- complete ------------------------------------------------------------------------------------


class CompleteEdges(Edges):
    """All pairs, O(n²), in blocks of bounded memory.

    Parameters
    ----------
    pairs_per_block
        Largest number of pairs of a block; None chooses one for the device.
    """

    connects_all = True

    def __init__(self, pairs_per_block: int | None = None) -> None:
        self.pairs_per_block = pairs_per_block

    def pairs(self, samples: Samples) -> Pairs:
        """All pairs of real atoms."""
        return _CompletePairs(samples, self.pairs_per_block or _pairs_per_block(samples))


class _CompletePairs(Pairs):
    def __init__(self, samples: Samples, pairs_per_block: int) -> None:
        self.samples = samples
        self.coordinates = {key: x.contiguous() for key, x in _coordinates(samples).items()}
        self.total = torch.zeros_like(self.coordinates["prediction"])
        batch, atoms = samples.prediction.shape[:2]
        self.rows = min(max(1, pairs_per_block // max(1, atoms)), max(1, atoms))
        whole = max(1, pairs_per_block // max(1, self.rows * atoms))
        count = -(-batch // whole)
        self.samples_per_block = -(-batch // max(1, count))  # blocks of equal size

    def blocks(self) -> Iterator[Block]:
        batch, atoms = self.samples.prediction.shape[:2]
        for sample in range(0, batch, max(1, self.samples_per_block)):
            for row in range(0, atoms, self.rows):
                samples = slice(sample, min(sample + self.samples_per_block, batch))
                yield _CompleteBlock(self, samples, slice(row, min(row + self.rows, atoms)))

    def forces(self) -> Tensor:
        return self.total.movedim(0, -1)


class _CompleteBlock(Block):
    def __init__(self, pairs: _CompletePairs, samples: slice, rows: slice) -> None:
        self.pairs, self.samples, self.rows = pairs, samples, rows
        atoms, device = pairs.samples.prediction.shape[1], pairs.samples.prediction.device
        atom = torch.arange(atoms, device=device)
        distinct = atom[rows, None] != atom
        mask = pairs.samples.mask
        self.weight = distinct.to(pairs.total.dtype)
        if mask is not None:
            real = mask[samples].to(pairs.total.dtype)
            self.weight = (real[:, rows, None] * real[:, None]).mul_(self.weight)

    def differences(self, operand: Operand) -> Tensor:
        values = self.pairs.coordinates[operand][:, self.samples]
        return values[:, :, self.rows, None] - values[:, :, None]

    def bonded(self) -> Tensor | None:
        bonds = self.pairs.samples.bonds
        return None if bonds is None else bonds.rows(self.samples, self.rows)

    def of_samples(self, values: Tensor) -> Tensor:
        return values[self.samples, None, None]

    def add(self, totals: Tensor, values: Tensor) -> None:
        totals[self.samples].add_(values.sum(dim=(1, 2)))

    def accumulate_forces(self, forces: Tensor) -> None:
        self.pairs.total[:, self.samples, self.rows] = forces.sum(dim=3)


# ---- sparse --------------------------------------------------------------------------------------


class SparseEdges(Edges):
    """A random 2D-regular graph for each sample, O(n), always globally rigid.

    The atoms are arranged on a circle in random order, and each is connected to the next D on
    either side: the D-th power of a cycle. After removal of any one vertex it still contains the
    D-th power of a path, which is a chain of D-simplices glued at their faces and so rigid; and a
    graph that is rigid after removal of any one vertex is globally rigid (S. Tanigawa, "Sufficient
    conditions for the global rigidity of graphs", Journal of Combinatorial Theory B 113, 2015).
    With n ≤ 2D + 1 it is the complete graph.

    A pool of orders is drawn once, and each sample takes one of them at random. All pairs are
    equally frequent over draws, so the mean over draws is the complete energy times 2D/(n−1).

    Above 32,768 atoms, and without padding, the order 0, a, 2a, … (modulo n) with a random a
    coprime to n replaces a random permutation, which would take most of the time. The graph is as
    rigid, and all samples of a call share it; but the pairs that it can connect depend on the order
    of the atoms, so the mean over draws is another sum over pairs.

    Parameters
    ----------
    pool
        Number of graphs for each n; fewer where n exceeds 2²² / pool.
    seed
        Of the graphs. Which one a sample takes depends on the loss's `generator`.
    """

    _BLOCK = 256
    _LARGEST_PERMUTED = 32_768
    _CACHE_SIZE = 12_000_000  # places on circles, over all sizes

    def __init__(self, pool: int = 100, seed: int = 0) -> None:
        if pool < 1:
            raise ValueError(f"a pool of {pool} graphs: expected 1 or more")
        self.pool = pool
        self.seed = seed
        self._circles: dict[tuple[int, int, torch.device], _Circles] = {}
        self._strides: dict[tuple[int, int], list[int]] = {}

    @classmethod
    def from_config(cls, config: EdgesConfig, seed: int) -> SparseEdges:
        """Edges with the pool of a configuration."""
        return cls(config.pool, seed)

    def graphs(self, n: int) -> int:
        """Number of graphs on n atoms."""
        return max(1, min(self.pool, (1 << 22) // max(1, n)))

    def orders(self, n: int) -> NDArray[np.int64]:
        """The random orders on the circle of n atoms, (graphs, n).

        The orders of n atoms are those of more atoms without the later ones, so the amount of
        padding has no effect.
        """
        graphs = self.graphs(n)
        keys = [np.zeros((graphs, 0))]
        for block in range(-(-n // self._BLOCK)):
            generator = np.random.default_rng([self.seed, block])
            keys.append(generator.random((graphs, self._BLOCK)))
        return np.concatenate(keys, axis=1)[:, :n].argsort(axis=1, kind="stable")

    def strides(self, n: int, dimension: int) -> list[int]:
        """The steps a of large graphs, coprime to n and at most n/(2D)."""
        known = self._strides.get((n, dimension))
        if known is None:
            drawn = np.random.default_rng([self.seed, n]).integers(
                1, max(2, n // (2 * dimension)), 100 * self.pool
            )
            known = [a for a in drawn.tolist() if math.gcd(a, n) == 1][: self.pool] or [1]
            self._strides[n, dimension] = known
        return known

    def edge_lists(self, n: int, dimension: int) -> NDArray[np.int64]:
        """The edges of all graphs on n atoms, (graphs, E, 2), each once."""
        orders = self.orders(n)
        offset, place = np.meshgrid(np.arange(1, dimension + 1), np.arange(n), indexing="ij")
        # With 2·offset = n an edge occurs from both its ends, with more it has occurred before.
        keep = (2 * offset < n) | ((2 * offset == n) & (place < offset))
        first, second = place[keep], (place + offset)[keep] % max(1, n)
        return np.stack([orders[:, first], orders[:, second]], axis=2)

    def __getstate__(self) -> dict[str, Any]:
        """Without the cached graphs, which are drawn again."""
        return vars(self) | {"_circles": {}, "_strides": {}}

    def pairs(self, samples: Samples) -> Pairs:
        """The pairs of a random graph for each sample."""
        batch, atoms, dimension = samples.prediction.shape
        device = samples.prediction.device
        if samples.mask is None and atoms > max(self._LARGEST_PERMUTED, 4 * dimension):
            strides = self.strides(atoms, dimension)
            drawn = int(samples.random_integers(len(strides))[0]) if batch else 0
            return _CircularPairs(samples, None, strides[drawn])
        key = atoms, dimension, device
        circles = self._circles.get(key)
        if circles is None:
            # Steps that a GPU has recorded may read its circles again.
            if (
                device.type == "cpu"
                and sum(known.order.numel() for known in self._circles.values()) > self._CACHE_SIZE
            ):
                self._circles.clear()
            circles = _circles(self.orders(atoms), dimension)
            circles = self._circles[key] = _Circles(*(x.to(device) for x in circles))
        choice = samples.random_integers(len(circles.order))
        drawn_circles = _Circles(circles.order[choice], circles.rank[choice])
        if samples.mask is not None:
            drawn_circles = _without_padding(drawn_circles, samples.mask)
        return _CircularPairs(samples, drawn_circles, 1)


class _Circles(NamedTuple):
    """Orders of atoms on circles. The first D atoms of a circle are repeated after its last."""

    order: Tensor  # (B, N + D), the atom at a place
    rank: Tensor  # (B, N), the place of an atom


def _circles(orders: NDArray[np.int64], dimension: int) -> _Circles:
    """Circles of orders (B, N)."""
    repeated = np.arange(dimension) % max(1, orders.shape[1])
    extended = np.concatenate([orders, orders[:, repeated]], axis=1) if orders.size else orders
    return _Circles(torch.from_numpy(extended), torch.from_numpy(orders.argsort(axis=1)))


def _without_padding(circles: _Circles, mask: Tensor) -> _Circles:
    """Circles of the real atoms, in the same order; ranks of padding are arbitrary."""
    batch, atoms = mask.shape
    places = circles.order.shape[1]
    orders = circles.order[:, :atoms]
    real = mask.gather(1, orders)
    place = torch.where(real, real.cumsum(dim=1) - 1, atoms)
    rank = torch.zeros_like(circles.rank).scatter_(1, orders, place).clamp_(max=max(0, atoms - 1))
    order = orders.new_zeros(batch, atoms + 1).scatter_(1, place, orders)
    beyond = torch.arange(places, device=mask.device)
    count = mask.sum(dim=1, keepdim=True)
    wrapped = torch.where(beyond < count, beyond, (beyond - count) % count.clamp(min=1))
    return _Circles(order.gather(1, wrapped), rank)


class _CircularPairs(Pairs):
    """Each atom with those 1, …, D strides after it on the circle.

    Without circles the atoms are on the circle in the order of their indices, without padding.
    """

    def __init__(self, samples: Samples, circles: _Circles | None, stride: int) -> None:
        self.samples, self.circles, self.stride = samples, circles, stride
        self.batch, self.atoms, self.dimension = samples.prediction.shape
        self.coordinates: dict[Operand, Tensor] = {}
        for operand, values in _coordinates(samples).items():
            self.coordinates[operand] = self._on_circle(values)
        self.total = torch.zeros_like(self.coordinates["prediction"])
        self.weight = self._weight()

    def _on_circle(self, values: Tensor) -> Tensor:
        """(C, B, N) to (C, B, N + D·stride), in the order of places."""
        if self.circles is not None:
            return values.gather(2, self.circles.order.expand(len(values), -1, -1))
        return torch.cat([values, values[:, :, : self.dimension * self.stride]], dim=2)

    def _weight(self) -> Tensor | None:
        """Weights (B or 1, D, N or 1) of the pairs; None where all are 1."""
        mask, device = self.samples.mask, self.total.device
        if mask is None and self.atoms > 2 * self.dimension:
            return None
        offset = torch.arange(1, self.dimension + 1, device=device)[:, None]
        if mask is None:
            count = torch.full((1, 1, 1), self.atoms, device=device)
        else:
            count = mask.sum(dim=1)[:, None, None]
        # An offset of half the circle has each edge from both its ends; larger ones repeat edges.
        factor = (2 * offset < count).to(self.total.dtype) + 0.5 * (2 * offset == count)
        return factor * (torch.arange(self.atoms, device=device) < count)

    def blocks(self) -> Iterator[Block]:
        width = max(1, _pairs_per_block(self.samples) // max(1, self.batch * self.dimension))
        for place in range(0, self.atoms, width):
            yield _CircularBlock(self, place, min(place + width, self.atoms))

    def forces(self) -> Tensor:
        # The forces on repeated atoms belong to the first atoms of the circle.
        mask, total = self.samples.mask, self.total
        width = min(self.dimension * self.stride, self.atoms)
        if mask is None:
            total[:, :, :width].add_(total[:, :, self.atoms : self.atoms + width].clone())
        else:
            last = mask.sum(dim=1, keepdim=True) + torch.arange(width, device=mask.device)
            total[:, :, :width].add_(total.gather(2, last.expand(self.dimension, -1, -1)))
        if self.circles is None:
            return total[:, :, : self.atoms].movedim(0, -1)
        result = total.gather(2, self.circles.rank.expand(self.dimension, -1, -1)).movedim(0, -1)
        return result if mask is None else torch.where(mask[..., None], result, 0)


class _CircularBlock(Block):
    def __init__(self, pairs: _CircularPairs, start: int, stop: int) -> None:
        self.pairs, self.start, self.stop = pairs, start, stop
        self.weight = None if pairs.weight is None else pairs.weight[:, :, start:stop]

    def _windows(self, values: Tensor) -> Tensor:
        """(C, B, N + D·stride) shifted by 0, 1, …, D strides, (C, B, 1 + D, n)."""
        stride = self.pairs.stride
        visible = values[:, :, self.start : self.stop + self.pairs.dimension * stride]
        return visible.unfold(2, self.stop - self.start, stride)

    def differences(self, operand: Operand) -> Tensor:
        windows = self._windows(self.pairs.coordinates[operand])
        return windows[:, :, :1] - windows[:, :, 1:]

    def bonded(self) -> Tensor | None:
        bonds = self.pairs.samples.bonds
        if bonds is None:
            return None
        if self.pairs.circles is None:
            atoms = self.pairs.atoms
            order = torch.arange(atoms, device=self.pairs.total.device)
            order = torch.cat([order, order[: self.pairs.dimension * self.pairs.stride]])
            order = order.expand(self.pairs.batch, -1)
        else:
            order = self.pairs.circles.order
        windows = self._windows(order[None])[0]
        second = windows[:, 1:]
        first = windows[:, :1].expand_as(second)
        sample = torch.arange(len(order), device=order.device)[:, None, None]
        return bonds.between(sample.expand_as(first), first, second)

    def of_samples(self, values: Tensor) -> Tensor:
        return values[:, None, None]

    def add(self, totals: Tensor, values: Tensor) -> None:
        totals.add_(values.sum(dim=(1, 2)), alpha=2)

    def accumulate_forces(self, forces: Tensor) -> None:
        total, stride = self.pairs.total, self.pairs.stride
        for k in range(self.pairs.dimension):
            ahead = (k + 1) * stride
            total[:, :, self.start : self.stop].add_(forces[:, :, k])
            total[:, :, self.start + ahead : self.stop + ahead].sub_(forces[:, :, k])


# ---- tables of neighbours ------------------------------------------------------------------------


class BondEdges(Edges):
    """The bonded pairs. They do not determine the configuration: an ablation."""

    requires = frozenset({"bonds"})

    def pairs(self, samples: Samples) -> Pairs:
        """The bonded pairs.

        Raises
        ------
        ValueError
            The samples have no bonds.
        """
        if samples.bonds is None:
            raise ValueError("edges along bonds: give bonds")
        return _TabulatedPairs(samples, samples.bonds.neighbours())


class SymmetrizedEdges(Edges):
    """A sparse graph of each molecule, averaged over the symmetries of the molecule.

    Atoms that a symmetry exchanges then have the same springs. The weight of an edge is the share
    of automorphisms of the distance matrix that map an edge of the sparse graph onto it: equation
    57 of Kaba et al., NeurIPS 2025, divided by the number of automorphisms, so that a symmetric
    molecule weighs no more than another.

    Parameters
    ----------
    tolerance
        Distances that differ by less are equal, in the unit of positions.
    pool, seed
        Of the sparse graphs, see `SparseEdges`. Each molecule has one graph.

    Notes
    -----
    networkx searches the symmetries, one molecule after another. A training loop searches once, by
    `prepare_neighbours`, and passes the table to the loss; without a table each call searches.
    """

    requires = frozenset({"neighbours"})

    def __init__(self, tolerance: float = 0.01, pool: int = 100, seed: int = 0) -> None:
        self.tolerance = tolerance
        self.sparse = SparseEdges(pool, seed)

    @classmethod
    def from_config(cls, config: EdgesConfig, seed: int) -> SymmetrizedEdges:
        """Edges with the tolerance and the pool of a configuration."""
        return cls(config.tolerance, config.pool, seed)

    def pairs(self, samples: Samples) -> Pairs:
        """The pairs of the samples' table, or of a new one for samples without."""
        table = samples.neighbours
        if table is None:
            table = self.prepare_neighbours(samples.target, samples.mask)
        return _TabulatedPairs(samples, table)

    def prepare_neighbours(
        self,
        positions: Tensor,
        mask: Tensor | None = None,
        numbers: NDArray[np.int64] | None = None,
        *,
        batch: Tensor | None = None,
    ) -> Neighbours:
        """The edges of molecules as a table, in the layout of the positions.

        Parameters
        ----------
        positions, mask, batch
            Padded or packed, as in a call of a loss.
        numbers
            Graph of the pool that a molecule takes, (B,), modulo the size of the pool; None is 0.

        Raises
        ------
        ValueError
            Positions are not finite, or two atoms of a molecule are closer than four times the
            tolerance, so that symmetries cannot be distinguished.
        """
        if positions.ndim == 2:
            packing = Packing.of(batch, len(positions), positions.device)
            padded = self.prepare_neighbours(packing.padded(positions), packing.mask, numbers)
            assert padded.weight is not None
            atoms = packing.batch, packing.place
            return Neighbours(
                padded.index[atoms] + packing.starts[packing.batch, None], padded.weight[atoms]
            )
        if mask is None:
            mask = torch.ones_like(positions[..., 0], dtype=torch.bool)
        mask = mask.bool()
        points = torch.where(mask[..., None], positions.detach(), 0).double().cpu()
        real = mask.cpu().numpy()
        distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").numpy()
        if not np.isfinite(distances).all():
            raise ValueError("positions are not finite")
        weights = self._sparse_weights(real, points.shape[-1], numbers)
        for molecule in np.flatnonzero(may_be_symmetric(distances, real, self.tolerance)):
            own = np.flatnonzero(real[molecule])
            pairs = np.ix_(own, own)
            group = automorphisms(distances[molecule][pairs], self.tolerance)
            sparse, total = weights[molecule][pairs], np.zeros((len(own), len(own)))
            for start in range(0, len(group), 1000):
                images = group[start : start + 1000]
                total += sparse[images[:, :, None], images[:, None, :]].sum(axis=0)
            weights[molecule][pairs] = total / len(group)
        width = int((weights > 0).sum(axis=2).max(initial=0))
        first = np.argsort(-weights, axis=2, kind="stable")[:, :, :width]
        weight = np.take_along_axis(weights, first, axis=2)
        index = np.where(weight > 0, first, np.arange(real.shape[1])[None, :, None])
        device = positions.device
        return Neighbours(torch.from_numpy(index).to(device), torch.from_numpy(weight).to(device))

    def _sparse_weights(
        self, real: NDArray[np.bool_], dimension: int, numbers: NDArray[np.int64] | None
    ) -> NDArray[np.float32]:
        """Adjacency (B, N, N) of a sparse graph of each molecule."""
        batch, atoms = real.shape
        weights = np.zeros((batch, atoms, atoms), dtype=np.float32)
        numbers = np.zeros(batch, dtype=np.int64) if numbers is None else numbers
        sizes = real.sum(axis=1)
        for size in np.unique(sizes):
            members = np.flatnonzero(sizes == size)
            edges = self.sparse.edge_lists(int(size), dimension)
            edges = edges[numbers[members] % len(edges)]  # (members, E, 2)
            places = np.nonzero(real[members])[1].reshape(len(members), size)
            i, j = (np.take_along_axis(places, edges[..., end], axis=1) for end in (0, 1))
            weights[members[:, None], i, j] = weights[members[:, None], j, i] = 1
        return weights


class _TabulatedPairs(Pairs):
    """Pairs of a table of neighbours, each in both rows: every row is the sum over one atom."""

    def __init__(self, samples: Samples, table: Neighbours) -> None:
        self.samples = samples
        self.table = table
        self.coordinates = {key: x.contiguous() for key, x in _coordinates(samples).items()}
        self.total = torch.zeros_like(self.coordinates["prediction"])

    def blocks(self) -> Iterator[Block]:
        if self.table.index.shape[-1]:
            yield _TabulatedBlock(self)

    def forces(self) -> Tensor:
        return self.total.movedim(0, -1)


class _TabulatedBlock(Block):
    def __init__(self, pairs: _TabulatedPairs) -> None:
        self.pairs = pairs
        samples, self.index = pairs.samples, pairs.table.index
        own = torch.arange(self.index.shape[1], device=self.index.device)[None, :, None]
        valid = self.index != own
        if samples.mask is not None:
            other = samples.mask.gather(1, self.index.flatten(1)).view_as(self.index)
            valid = valid & samples.mask[:, :, None] & other
        weight = pairs.table.weight
        self.weight = valid.to(pairs.total.dtype)
        if weight is not None:
            self.weight = torch.where(valid, weight.to(self.weight.dtype), 0)

    def differences(self, operand: Operand) -> Tensor:
        values = self.pairs.coordinates[operand]
        neighbours = self.index.flatten(1).expand(len(values), -1, -1)
        gathered = values.gather(2, neighbours).view(len(values), *self.index.shape)
        return values[..., None] - gathered

    def bonded(self) -> Tensor | None:
        bonds = self.pairs.samples.bonds
        if bonds is None:
            return None
        batch, atoms = self.index.shape[:2]
        sample = torch.arange(batch, device=self.index.device)[:, None, None]
        own = torch.arange(atoms, device=self.index.device)[None, :, None]
        return bonds.between(sample.expand_as(self.index), own.expand_as(self.index), self.index)

    def of_samples(self, values: Tensor) -> Tensor:
        return values[:, None, None]

    def add(self, totals: Tensor, values: Tensor) -> None:
        totals += values.sum(dim=(1, 2))

    def accumulate_forces(self, forces: Tensor) -> None:
        self.pairs.total = forces.sum(dim=3)


EDGES: dict[str, type[Edges]] = {
    "complete": CompleteEdges,
    "sparse": SparseEdges,
    "symmetrized": SymmetrizedEdges,
    "bonds": BondEdges,
}
"""Kinds of edges."""


class EdgesConfig(Section):
    """The pairs that springs connect."""

    kind: Annotated[str, one_of("edges", EDGES)] = "complete"
    pool: Annotated[Whole, Field(gt=0, le=10_000)] = 100
    """Number of random graphs for each number of atoms; `sparse` and `symmetrized`."""
    tolerance: PositiveFloat = 0.01
    """Distances in Å that differ by less are equal by symmetry; `symmetrized`."""

    def build(self, seed: int) -> Edges:
        """The configured edges, with graphs of a seed."""
        return EDGES[self.kind].from_config(self, seed)
