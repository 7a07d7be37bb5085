"""Which pairs of atoms are joined by springs.

`EDGES` holds kinds of edges by name. A kind turns samples into `Pairs`, which present the pairs in
blocks, give differences in them, and add up what springs there do to the atoms, with no loop over
atoms, pairs or samples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from molgen_energy.losses.base import Neighbours, Packing, Samples
from molgen_energy.losses.symmetry import automorphisms, may_be_symmetric

Where = Literal["prediction", "target", "features"]


class Block(ABC):
    """Some pairs of atoms. The tensors of a block have one shape, first the samples, then pairs."""

    weight: Tensor | None
    """Factor of a pair's spring constant, 0 for what is no pair of two real atoms; None is 1."""

    @abstractmethod
    def differences(self, where: Where) -> Tensor:
        """x_i − x_j of the pairs, (D, …)."""

    @abstractmethod
    def bonded(self) -> Tensor | None:
        """Whether the pairs are bonded; None where no bonds are given."""

    @abstractmethod
    def add(self, totals: Tensor, values: Tensor) -> None:
        """Add the sum of values over ordered pairs to totals, (B,)."""

    @abstractmethod
    def accumulate_forces(self, forces: Tensor) -> None:
        """Add Σ_j pull_ij (D, …), which is −pull_ji, to the pull on each atom."""


class Pairs(ABC):
    """Pairs of atoms of samples, in blocks."""

    @abstractmethod
    def blocks(self) -> Iterator[Block]:
        """The pairs; a block may be used until the next one is asked for."""

    @abstractmethod
    def forces(self) -> Tensor:
        """What the blocks' `accumulate_forces` gave, (B, N, D)."""


class Edges(ABC):
    """A kind of edges."""

    takes_neighbours = False
    """Whether samples may come with a table of edges that were found before."""

    @abstractmethod
    def pairs(self, samples: Samples) -> Pairs:
        """The pairs of these samples."""


def _coordinates(samples: Samples) -> dict[Where, Tensor]:
    """Views with coordinates apart, (D, B, N); contiguous copies are fast to loop over."""
    by_place: dict[Where, Tensor | None] = {
        "prediction": samples.prediction,
        "target": samples.target,
        "features": samples.features,
    }
    return {
        where: values.detach().movedim(-1, 0)
        for where, values in by_place.items()
        if values is not None
    }


def _pairs_at_once(samples: Samples) -> int:
    """Pairs of a block: few enough for a CPU's cache, enough to occupy a GPU."""
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
    pairs_at_once
        Largest number of pairs of a block; None picks one that suits the device.
    """

    def __init__(self, pairs_at_once: int | None = None) -> None:
        self.pairs_at_once = pairs_at_once

    def pairs(self, samples: Samples) -> Pairs:
        """All pairs of real atoms."""
        return _CompletePairs(samples, self.pairs_at_once or _pairs_at_once(samples))


class _CompletePairs(Pairs):
    def __init__(self, samples: Samples, pairs_at_once: int) -> None:
        self.samples = samples
        self.at = {where: x.contiguous() for where, x in _coordinates(samples).items()}
        self.total = torch.zeros_like(self.at["prediction"])
        batch, atoms = samples.prediction.shape[:2]
        self.rows = min(max(1, pairs_at_once // max(1, atoms)), max(1, atoms))
        together = max(1, pairs_at_once // max(1, self.rows * atoms))
        count = -(-batch // together)
        self.together = -(-batch // max(1, count))  # of equal size

    def blocks(self) -> Iterator[Block]:
        batch, atoms = self.samples.prediction.shape[:2]
        for sample in range(0, batch, max(1, self.together)):
            for row in range(0, atoms, self.rows):
                samples = slice(sample, min(sample + self.together, batch))
                yield _CompleteBlock(self, samples, slice(row, min(row + self.rows, atoms)))

    def forces(self) -> Tensor:
        return self.total.movedim(0, -1)


class _CompleteBlock(Block):
    def __init__(self, pairs: _CompletePairs, samples: slice, rows: slice) -> None:
        self.pairs, self.samples, self.rows = pairs, samples, rows
        atoms, device = pairs.samples.prediction.shape[1], pairs.samples.prediction.device
        number = torch.arange(atoms, device=device)
        apart = number[rows, None] != number
        mask = pairs.samples.mask
        self.weight = apart.to(pairs.total.dtype)
        if mask is not None:
            inside = mask[samples].to(pairs.total.dtype)
            self.weight = (inside[:, rows, None] * inside[:, None]).mul_(self.weight)

    def differences(self, where: Where) -> Tensor:
        values = self.pairs.at[where][:, self.samples]
        return values[:, :, self.rows, None] - values[:, :, None]

    def bonded(self) -> Tensor | None:
        bonds = self.pairs.samples.bonds
        return None if bonds is None else bonds.rows(self.samples, self.rows)

    def add(self, totals: Tensor, values: Tensor) -> None:
        totals[self.samples].add_(values.sum(dim=(1, 2)))

    def accumulate_forces(self, forces: Tensor) -> None:
        self.pairs.total[:, self.samples, self.rows] = forces.sum(dim=3)


# ---- sparse --------------------------------------------------------------------------------------


class SparseEdges(Edges):
    """A random 2D-regular graph for each sample, O(n), that is globally rigid with certainty.

    The atoms are put on a circle in random order and each is joined to the D next ones on either
    side: the D-th power of a cycle. Without any one vertex it still holds the D-th power of a path,
    which is rigid, being a chain of D-simplices glued at their faces; and a graph that is rigid
    without any one vertex is globally rigid (S. Tanigawa, "Sufficient conditions for the global
    rigidity of graphs", Journal of Combinatorial Theory B 113, 2015). With n ≤ 2D + 1 it is the
    complete graph.

    Orders are drawn beforehand, and each sample takes one of them at random. Over many draws every
    pair is as frequent as any other, so the mean over draws is the complete energy times a factor,
    2D/(n−1).

    Above 32,768 atoms, and where no atom is padding, the order 0, a, 2a, … (modulo n) with a random
    a prime to n takes the place of a random permutation, which would cost more than all the rest.
    The graph is as rigid, and the samples of a call share it; but which pairs it can join depends
    on how atoms are numbered, so the mean over draws is another sum over pairs.

    Parameters
    ----------
    pool
        How many graphs there are for each n; fewer where n exceeds 2²² / pool.
    seed
        Of the graphs. Which one a sample takes depends on the loss's `generator`.
    """

    _BLOCK = 256
    _MOST_PERMUTED = 32_768
    _MOST_KEPT = 12_000_000  # places on circles, all sizes together

    def __init__(self, pool: int = 100, seed: int = 0) -> None:
        if pool < 1:
            raise ValueError(f"a pool of {pool} graphs: expected 1 or more")
        self.pool = pool
        self.seed = seed
        self._circles: dict[tuple[int, int, torch.device], _Circles] = {}
        self._strides: dict[tuple[int, int], list[int]] = {}

    def graphs(self, n: int) -> int:
        """How many graphs there are on n atoms."""
        return max(1, min(self.pool, (1 << 22) // max(1, n)))

    def orders(self, n: int) -> NDArray[np.int64]:
        """The random orders on the circle of n atoms, (graphs, n).

        Those of n atoms are those of more atoms without the further ones, so it does not matter how
        far samples are padded.
        """
        graphs = self.graphs(n)
        keys = [np.zeros((graphs, 0))]
        for block in range(-(-n // self._BLOCK)):
            generator = np.random.default_rng([self.seed, block])
            keys.append(generator.random((graphs, self._BLOCK)))
        return np.concatenate(keys, axis=1)[:, :n].argsort(axis=1, kind="stable")

    def strides(self, n: int, dimension: int) -> list[int]:
        """The steps a of the large graphs, prime to n and at most n/(2D)."""
        known = self._strides.get((n, dimension))
        if known is None:
            drawn = np.random.default_rng([self.seed, n]).integers(
                1, max(2, n // (2 * dimension)), 100 * self.pool
            )
            known = [a for a in drawn.tolist() if math.gcd(a, n) == 1][: self.pool] or [1]
            self._strides[n, dimension] = known
        return known

    def edge_lists(self, n: int, dimension: int) -> NDArray[np.int64]:
        """The edges of all graphs of random orders on n atoms, (graphs, E, 2), each once."""
        orders = self.orders(n)
        offset, place = np.meshgrid(np.arange(1, dimension + 1), np.arange(n), indexing="ij")
        # With 2·offset = n an edge is met from both its ends, with more it has been met before.
        keep = (2 * offset < n) | ((2 * offset == n) & (place < offset))
        first, second = place[keep], (place + offset)[keep] % max(1, n)
        return np.stack([orders[:, first], orders[:, second]], axis=2)

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs, which are drawn again."""
        return vars(self) | {"_circles": {}, "_strides": {}}

    def pairs(self, samples: Samples) -> Pairs:
        """The pairs of a graph drawn for each sample."""
        batch, atoms, dimension = samples.prediction.shape
        device = samples.prediction.device
        if samples.mask is None and atoms > max(self._MOST_PERMUTED, 4 * dimension):
            strides = self.strides(atoms, dimension)
            drawn = int(samples.choice(len(strides))[0]) if batch else 0
            return _CircularPairs(samples, None, strides[drawn])
        key = atoms, dimension, device
        circles = self._circles.get(key)
        if circles is None:
            if sum(known.order.numel() for known in self._circles.values()) > self._MOST_KEPT:
                self._circles.clear()
            circles = _circles(self.orders(atoms), dimension)
            circles = self._circles[key] = _Circles(*(x.to(device) for x in circles))
        choice = samples.choice(len(circles.order))
        drawn_circles = _Circles(circles.order[choice], circles.rank[choice])
        if samples.mask is not None:
            drawn_circles = _without_padding(drawn_circles, samples.mask)
        return _CircularPairs(samples, drawn_circles, 1)


class _Circles(NamedTuple):
    """Orders of atoms on circles. Behind the last atom of a circle stand its first ones again."""

    order: Tensor  # (B, N + D), the atom at a place
    rank: Tensor  # (B, N), the place of an atom


def _circles(orders: NDArray[np.int64], dimension: int) -> _Circles:
    """Circles of orders (B, N)."""
    again = np.arange(dimension) % max(1, orders.shape[1])
    extended = np.concatenate([orders, orders[:, again]], axis=1) if orders.size else orders
    return _Circles(torch.from_numpy(extended), torch.from_numpy(orders.argsort(axis=1)))


def _without_padding(circles: _Circles, mask: Tensor) -> _Circles:
    """Circles of the real atoms, in the same order; a rank of padding means nothing."""
    batch, atoms = mask.shape
    places = circles.order.shape[1]
    orders = circles.order[:, :atoms]
    real = mask.gather(1, orders)
    place = torch.where(real, real.cumsum(dim=1) - 1, atoms)
    rank = torch.zeros_like(circles.rank).scatter_(1, orders, place).clamp_(max=max(0, atoms - 1))
    order = orders.new_zeros(batch, atoms + 1).scatter_(1, place, orders)
    beyond = torch.arange(places, device=mask.device)
    count = mask.sum(dim=1, keepdim=True)
    again = torch.where(beyond < count, beyond, (beyond - count) % count.clamp(min=1))
    return _Circles(order.gather(1, again), rank)


class _CircularPairs(Pairs):
    """Each atom and those that stand 1, …, D strides behind it on the circle.

    Without circles the atoms stand in the order of their numbers, and none is padding.
    """

    def __init__(self, samples: Samples, circles: _Circles | None, stride: int) -> None:
        self.samples, self.circles, self.stride = samples, circles, stride
        self.batch, self.atoms, self.dimension = samples.prediction.shape
        self.at: dict[Where, Tensor] = {}
        for where, values in _coordinates(samples).items():
            self.at[where] = self._placed(values)
        self.total = torch.zeros_like(self.at["prediction"])
        self.weight = self._weight()

    def _placed(self, values: Tensor) -> Tensor:
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
        # An offset of half the circle meets each edge from both its ends; larger ones repeat it.
        factor = (2 * offset < count).to(self.total.dtype) + 0.5 * (2 * offset == count)
        return factor * (torch.arange(self.atoms, device=device) < count)

    def blocks(self) -> Iterator[Block]:
        width = max(1, _pairs_at_once(self.samples) // max(1, self.batch * self.dimension))
        for place in range(0, self.atoms, width):
            yield _CircularBlock(self, place, min(place + width, self.atoms))

    def forces(self) -> Tensor:
        # What fell on atoms that stand again belongs to the first ones.
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
        """(C, B, N + D·stride) seen 0, 1, …, D strides ahead, (C, B, 1 + D, n)."""
        stride = self.pairs.stride
        reach = values[:, :, self.start : self.stop + self.pairs.dimension * stride]
        return reach.unfold(2, self.stop - self.start, stride)

    def differences(self, where: Where) -> Tensor:
        windows = self._windows(self.pairs.at[where])
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
    """The bonds that the loss is called with. They do not fix the configuration: an ablation."""

    def pairs(self, samples: Samples) -> Pairs:
        """The bonded pairs."""
        if samples.bonds is None:
            raise ValueError("edges along bonds: give bonds")
        return _TabulatedPairs(samples, samples.bonds.neighbours(len(samples.prediction)))


class SymmetrizedEdges(Edges):
    """A sparse graph of each molecule, averaged over the symmetries of the molecule.

    Atoms that a symmetry exchanges then feel the same springs. The weight of an edge is the share
    of automorphisms of the distance matrix that bring an edge of the sparse graph onto it: equation
    57 of Kaba et al., NeurIPS 2025, divided by the number of automorphisms, so that a symmetric
    molecule counts no more than another.

    Parameters
    ----------
    tolerance
        Distances that differ by less are taken as equal, in the unit of positions.
    pool, seed
        Of the sparse graphs, see `SparseEdges`. A molecule keeps its graph.

    Notes
    -----
    Symmetries are searched for molecule by molecule, by networkx. A training loop does that once,
    by `neighbours`, and calls the loss with the result; without it a loss searches at each call.
    """

    takes_neighbours = True

    def __init__(self, tolerance: float = 0.01, pool: int = 100, seed: int = 0) -> None:
        self.tolerance = tolerance
        self.sparse = SparseEdges(pool, seed)

    def pairs(self, samples: Samples) -> Pairs:
        """The pairs of the table that the samples come with, or of one made here."""
        table = samples.neighbours
        if table is None:
            table = self.neighbours(samples.target, samples.mask)
        return _TabulatedPairs(samples, table)

    def neighbours(
        self,
        positions: Tensor,
        mask: Tensor | None = None,
        *,
        batch: Tensor | None = None,
        numbers: NDArray[np.int64] | None = None,
    ) -> Neighbours:
        """The table of molecules, for the layout that they are given in.

        Parameters
        ----------
        positions, mask, batch
            Padded or packed, as a loss is called.
        numbers
            Which graph of the pool a molecule takes, (B,), counting round; None is 0.

        Raises
        ------
        ValueError
            Positions are not finite, or two atoms of a molecule are too close to tell symmetries
            apart: closer than four times the tolerance.
        """
        if positions.ndim == 2:
            packing = Packing.of(batch, len(positions), positions.device)
            padded = self.neighbours(packing.padded(positions), packing.mask, numbers=numbers)
            assert padded.weight is not None
            at = packing.batch, packing.place
            return Neighbours(
                padded.index[at] + packing.starts[packing.batch, None], padded.weight[at]
            )
        if mask is None:
            mask = torch.ones_like(positions[..., 0], dtype=torch.bool)
        mask = mask.bool()
        inside = torch.where(mask[..., None], positions.detach(), 0).double().cpu()
        real = mask.cpu().numpy()
        distances = torch.cdist(inside, inside, compute_mode="donot_use_mm_for_euclid_dist").numpy()
        if not np.isfinite(distances).all():
            raise ValueError("positions are not finite")
        weights = self._sparse_weights(real, inside.shape[-1], numbers)
        for molecule in np.flatnonzero(may_be_symmetric(distances, real, self.tolerance)):
            place = np.flatnonzero(real[molecule])
            among = np.ix_(place, place)
            group = automorphisms(distances[molecule][among], self.tolerance)
            own, total = weights[molecule][among], np.zeros((len(place), len(place)))
            for start in range(0, len(group), 1000):
                images = group[start : start + 1000]
                total += own[images[:, :, None], images[:, None, :]].sum(axis=0)
            weights[molecule][among] = total / len(group)
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
    """Pairs of a table of neighbours, each from both its ends: no atom is written to twice."""

    def __init__(self, samples: Samples, table: Neighbours) -> None:
        self.samples = samples
        self.table = table
        self.at = {where: x.contiguous() for where, x in _coordinates(samples).items()}
        self.total = torch.zeros_like(self.at["prediction"])

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
        given = pairs.table.weight
        self.weight = valid.to(pairs.total.dtype)
        if given is not None:
            self.weight = torch.where(valid, given.to(self.weight.dtype), 0)

    def differences(self, where: Where) -> Tensor:
        values = self.pairs.at[where]
        at = self.index.flatten(1).expand(len(values), -1, -1)
        return values[..., None] - values.gather(2, at).view(len(values), *self.index.shape)

    def bonded(self) -> Tensor | None:
        bonds = self.pairs.samples.bonds
        if bonds is None:
            return None
        batch, atoms = self.index.shape[:2]
        sample = torch.arange(batch, device=self.index.device)[:, None, None]
        own = torch.arange(atoms, device=self.index.device)[None, :, None]
        return bonds.between(sample.expand_as(self.index), own.expand_as(self.index), self.index)

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
