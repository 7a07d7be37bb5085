"""Symmetries of a configuration: the permutations of atoms that preserve all distances."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Permutations = NDArray[np.int64]

_LARGEST_GROUP = 100_000
_LARGEST_CLOSED = 300


def automorphisms(distances: Array, tolerance: float = 0.01) -> Permutations:
    """All permutations π with |d_π(i)π(j) − d_ij| ≤ tolerance for all i and j, (G, n).

    networkx finds them by a VF2 search. Those of points in space are the isometries that map the
    set of points onto itself, including the identity. Equality within a tolerance is not
    transitive, so products are added until the set is a group; sets of more than 300 permutations
    are returned as found.

    Parameters
    ----------
    distances
        (n, n), symmetric.
    tolerance
        In the unit of the distances.

    Raises
    ------
    ValueError
        A distance is not finite, two points are closer than four times the tolerance, or there are
        more than 100,000 symmetries.
    """
    n = len(distances)
    if not np.isfinite(distances).all():
        raise ValueError("distances are not finite")
    pairs = distances[np.triu_indices(n, k=1)]
    if pairs.min(initial=np.inf) < 4 * tolerance:
        raise ValueError("two atoms are closer than four times the tolerance")
    profiles = np.sort(distances, axis=1)
    alike = np.zeros((n, n), dtype=bool)
    for i in range(n):  # all rows at once would take n³ numbers
        alike[i] = np.abs(profiles - profiles[i]).max(axis=1) <= tolerance
    if alike.sum() == n:
        return np.arange(n)[None]
    found = []
    for image in _matcher(distances, alike, tolerance).isomorphisms_iter():
        found.append([image[i] for i in range(n)])
        if len(found) > _LARGEST_GROUP:
            raise ValueError(f"there are more than {_LARGEST_GROUP:,} symmetries")
    return _closed(np.array(found, dtype=np.int64))


def _matcher(distances: Array, alike: NDArray[np.bool_], tolerance: float) -> Any:
    """A search for the isomorphisms of a graph to itself that preserve distances."""
    import networkx as nx  # slow to import, and few runs need it
    from networkx.algorithms.isomorphism import GraphMatcher

    class Matcher(GraphMatcher):  # type: ignore[misc]
        """The graph only gives the order of the search; distances decide."""

        def semantic_feasibility(self, first: int, second: int) -> bool:
            if not alike[first, second]:
                return False
            images = np.fromiter(self.core_1.values(), np.int64, len(self.core_1))
            known = np.fromiter(self.core_1.keys(), np.int64, len(self.core_1))
            change = np.abs(distances[first, known] - distances[second, images])
            return bool(change.max(initial=0.0) <= tolerance)

    graph = nx.Graph()
    graph.add_nodes_from(range(len(distances)))
    cutoff = _connecting_cutoff(distances, tolerance)
    i, j = np.nonzero(np.triu(distances <= cutoff, k=1))
    graph.add_edges_from(zip(i.tolist(), j.tolist(), strict=True))
    return Matcher(graph, graph)


def _connecting_cutoff(distances: Array, tolerance: float) -> float:
    """The smallest cutoff for which pairs within it form a connected, symmetry-invariant graph.

    No distance exceeds the cutoff by less than the tolerance, so a symmetry maps pairs within it to
    pairs within it. A search over few edges is much faster than one over all pairs.
    """
    n = len(distances)
    lengths = np.sort(distances[np.triu_indices(n, k=1)])
    ends = np.flatnonzero(np.diff(lengths, append=np.inf) > 2 * tolerance)
    # Prim's algorithm: the longest edge of the minimum spanning tree connects the points.
    nearest, longest = distances[0].copy(), 0.0
    outside = np.arange(n) != 0
    while outside.any():
        following = int(np.where(outside, nearest, np.inf).argmin())
        longest = max(longest, float(nearest[following]))
        outside[following] = False
        nearest = np.minimum(nearest, distances[following])
    return float(lengths[ends[np.searchsorted(lengths[ends], longest)]]) + tolerance


def _closed(group: Permutations) -> Permutations:
    """The group that permutations (G, n) generate; a large set is returned unchanged."""
    while len(group) <= _LARGEST_CLOSED:
        products = np.unique(group[:, group].reshape(-1, group.shape[1]), axis=0)
        if len(products) == len(group):
            break
        group = products
    return group


def may_be_symmetric(
    distances: Array, mask: NDArray[np.bool_], tolerance: float
) -> NDArray[np.bool_]:
    """Whether two atoms of a molecule may have equal distances to the other atoms, (B,).

    If not, the identity is its only automorphism. Distances (B, N, N), mask (B, N).
    """
    pairs = mask[:, :, None] & mask[:, None, :]
    real = np.where(pairs, distances, 0)
    alike = pairs.copy()
    count = np.maximum(mask.sum(axis=1), 1)[:, None]
    # If two sorted rows agree within the tolerance, so do these functions of them.
    for summary in (
        real.sum(axis=2) / count,
        np.sqrt((real**2).sum(axis=2) / count),
        real.max(axis=2, initial=0.0),
    ):
        alike &= np.abs(summary[:, :, None] - summary[:, None, :]) <= tolerance
    symmetric: NDArray[np.bool_] = alike.sum(axis=(1, 2)) > mask.sum(axis=1)
    return symmetric
