"""Symmetries of a configuration: the permutations of atoms that keep all distances."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Permutations = NDArray[np.int64]

_MOST = 100_000
_MOST_MULTIPLIED = 300


def automorphisms(distances: Array, tolerance: float = 0.01) -> Permutations:
    """All permutations π with |d_π(i)π(j) − d_ij| ≤ tolerance for all i and j, (G, n).

    They are found by networkx's VF2 search. Those of points in space are the rotations, reflections
    and so on that bring the points onto themselves; the identity is one. "Equal within a tolerance"
    is not transitive, so the products of what was found are added until there is a group; sets of
    more than 300 are taken as they are found.

    Parameters
    ----------
    distances
        (n, n), symmetric.
    tolerance
        In the unit of the distances.

    Raises
    ------
    ValueError
        A distance is not finite; two points are closer than four times the tolerance, so that
        being equal says little; or there are more than 100,000 symmetries.
    """
    n = len(distances)
    if not np.isfinite(distances).all():
        raise ValueError("distances are not finite")
    pairs = distances[np.triu_indices(n, k=1)]
    if pairs.min(initial=np.inf) < 4 * tolerance:
        raise ValueError("two atoms are closer than four times the tolerance")
    profiles = np.sort(distances, axis=1)
    alike = np.zeros((n, n), dtype=bool)
    for i in range(n):  # not all at once: that would take n³ numbers
        alike[i] = np.abs(profiles - profiles[i]).max(axis=1) <= tolerance
    if alike.sum() == n:
        return np.arange(n)[None]
    found = []
    for image in _matcher(distances, alike, tolerance).isomorphisms_iter():
        found.append([image[i] for i in range(n)])
        if len(found) > _MOST:
            raise ValueError(f"there are more than {_MOST:,} symmetries")
    return _closed(np.array(found, dtype=np.int64))


def _matcher(distances: Array, alike: NDArray[np.bool_], tolerance: float) -> Any:
    """A search for the isomorphisms of a graph to itself that keep distances."""
    import networkx as nx  # takes a while to load, and few runs need it
    from networkx.algorithms.isomorphism import GraphMatcher

    class Matcher(GraphMatcher):  # type: ignore[misc]
        """Its graph only says where to go next; distances decide."""

        def semantic_feasibility(self, first: int, second: int) -> bool:
            if not alike[first, second]:
                return False
            images = np.fromiter(self.core_1.values(), np.int64, len(self.core_1))
            known = np.fromiter(self.core_1.keys(), np.int64, len(self.core_1))
            change = np.abs(distances[first, known] - distances[second, images])
            return bool(change.max(initial=0.0) <= tolerance)

    graph = nx.Graph()
    graph.add_nodes_from(range(len(distances)))
    reach = _reach(distances, tolerance)
    i, j = np.nonzero(np.triu(distances <= reach, k=1))
    graph.add_edges_from(zip(i.tolist(), j.tolist(), strict=True))
    return Matcher(graph, graph)


def _reach(distances: Array, tolerance: float) -> float:
    """The shortest length such that pairs within it make a connected graph that symmetries keep.

    No distance is longer by less than the tolerance, so a symmetry takes short pairs to short ones.
    A graph with few edges is searched much faster than one with all.
    """
    n = len(distances)
    lengths = np.sort(distances[np.triu_indices(n, k=1)])
    ends = np.flatnonzero(np.diff(lengths, append=np.inf) > 2 * tolerance)
    # Prim's algorithm: the longest edge of the shortest spanning tree is what connects the points.
    nearest, longest = distances[0].copy(), 0.0
    outside = np.arange(n) != 0
    while outside.any():
        following = int(np.where(outside, nearest, np.inf).argmin())
        longest = max(longest, float(nearest[following]))
        outside[following] = False
        nearest = np.minimum(nearest, distances[following])
    return float(lengths[ends[np.searchsorted(lengths[ends], longest)]]) + tolerance


def _closed(group: Permutations) -> Permutations:
    """The group that permutations (G, n) generate; a large set is taken as it is."""
    while len(group) <= _MOST_MULTIPLIED:
        products = np.unique(group[:, group].reshape(-1, group.shape[1]), axis=0)
        if len(products) == len(group):
            break
        group = products
    return group


def may_be_symmetric(
    distances: Array, mask: NDArray[np.bool_], tolerance: float
) -> NDArray[np.bool_]:
    """Whether two atoms of a molecule may see the others at the same distances, (B,).

    Where not, the identity is its only automorphism. Distances (B, N, N), mask (B, N).
    """
    pairs = mask[:, :, None] & mask[:, None, :]
    inside = np.where(pairs, distances, 0)
    alike = pairs.copy()
    count = np.maximum(mask.sum(axis=1), 1)[:, None]
    # Rows that agree within the tolerance, in any order, have all of these within it.
    for summary in (
        inside.sum(axis=2) / count,
        np.sqrt((inside**2).sum(axis=2) / count),
        inside.max(axis=2, initial=0.0),
    ):
        alike &= np.abs(summary[:, :, None] - summary[:, None, :]) <= tolerance
    symmetric: NDArray[np.bool_] = alike.sum(axis=(1, 2)) > mask.sum(axis=1)
    return symmetric
