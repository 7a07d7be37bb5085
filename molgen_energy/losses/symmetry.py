"""Symmetries of a configuration: the permutations of atoms that keep all distances."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def automorphisms(distances: Array, tolerance: float = 0.01) -> NDArray[np.int64]:
    """All permutations π with |d_π(i)π(j) − d_ij| ≤ tolerance for all i and j, (G, n).

    They are found by networkx's VF2 search over the complete graph whose edges carry distances.
    Those of points in space are its rotations, reflections and so on that bring the points onto
    themselves; the identity is one.

    Parameters
    ----------
    distances
        (n, n), symmetric.
    tolerance
        In the unit of the distances.

    Raises
    ------
    ValueError
        Two points are closer than the tolerance: any permutation of such points is a symmetry.
    """
    import networkx as nx  # takes a while to load, and few runs need it
    from networkx.algorithms.isomorphism import GraphMatcher

    n = len(distances)
    if n > 1 and (distances + np.diag(np.full(n, np.inf))).min() <= tolerance:
        raise ValueError("two atoms are closer than the tolerance")
    alike = _alike(distances, tolerance)
    if alike.sum() == n:
        return np.arange(n)[None]
    graph = nx.complete_graph(n)
    nx.set_node_attributes(graph, {i: i for i in range(n)}, "atom")
    nx.set_edge_attributes(
        graph, {(i, j): float(distances[i, j]) for i, j in graph.edges}, "distance"
    )
    matcher = GraphMatcher(
        graph,
        graph,
        node_match=lambda a, b: alike[a["atom"], b["atom"]],
        edge_match=lambda a, b: abs(a["distance"] - b["distance"]) <= tolerance,
    )
    found = [[image[i] for i in range(n)] for image in matcher.isomorphisms_iter()]
    return np.array(found, dtype=np.int64)


def may_be_symmetric(
    distances: Array, mask: NDArray[np.bool_], tolerance: float
) -> NDArray[np.bool_]:
    """Whether two atoms of a molecule see the others at the same distances, (B,).

    Where not, the identity is its only automorphism. Distances (B, N, N), mask (B, N).
    """
    pairs = mask[:, :, None] & mask[:, None, :]
    alike = _alike(np.where(pairs, distances, np.inf), tolerance) & pairs
    symmetric: NDArray[np.bool_] = alike.sum(axis=(1, 2)) > mask.sum(axis=1)
    return symmetric


def _alike(distances: Array, tolerance: float) -> NDArray[np.bool_]:
    """Whether the sorted distances of two atoms agree, (…, n, n)."""
    profiles = np.sort(distances, axis=-1)
    with np.errstate(invalid="ignore"):  # ∞ − ∞ at padding
        difference = np.abs(profiles[..., :, None, :] - profiles[..., None, :, :])
    alike: NDArray[np.bool_] = np.nan_to_num(difference).max(axis=-1, initial=0.0) <= tolerance
    return alike
