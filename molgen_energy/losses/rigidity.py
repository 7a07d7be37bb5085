"""Exact tests of generic rigidity: whether edge lengths determine a configuration.

A graph is (generically) rigid in D dimensions if a generic framework on it cannot be deformed
continuously without changing the length of an edge, and globally rigid if no other framework has
the same lengths, up to Euclidean motions. An energy with springs on a globally rigid graph has the
same minimisers as one with springs on all pairs.

The tests place the vertices at random points over a finite field and compute ranks over the field,
without rounding. A rank over the field is at most the generic one, so *yes* is always true; *no* is
wrong with a probability of about n²D²/2²⁶ to the power of `attempts`.
"""

from __future__ import annotations

import networkx as nx
import numpy as np
from numpy.typing import ArrayLike, NDArray

_PRIME = 67_108_859.0  # the largest below 2²⁶: products are exact in float64

Array = NDArray[np.float64]
EdgeList = NDArray[np.int64]


def rigidity_matrix(edges: ArrayLike, positions: Array) -> Array:
    """The Jacobian of half the squared edge lengths: row ij holds p_i − p_j at i, p_j − p_i at j.

    Parameters
    ----------
    edges
        (..., E, 2), each edge once.
    positions
        (n, D).

    Returns
    -------
    (..., E, n·D).
    """
    edges = np.asarray(edges)
    n, dimension = positions.shape
    difference = positions[edges[..., 0]] - positions[edges[..., 1]]
    matrix = np.zeros((*edges.shape[:-1], n, dimension))
    for end, sign in ((0, 1), (1, -1)):
        vertex = np.broadcast_to(edges[..., end, None, None], (*edges.shape[:-1], 1, dimension))
        np.put_along_axis(matrix, vertex, sign * difference[..., None, :], axis=-2)
    return matrix.reshape(*edges.shape[:-1], n * dimension)


def is_rigid(edges: ArrayLike, n: int, dimension: int, seed: int = 0, attempts: int = 2) -> bool:
    """Whether the rigidity matrix has generic rank D·n − D(D+1)/2.

    Parameters
    ----------
    edges
        (E, 2) vertices 0 … n−1, each edge once.
    n, dimension
        Number of vertices and D.
    seed, attempts
        Seed of the random points; a further attempt follows only after a *no*.
    """
    edges = _simple(edges, n)
    if n <= dimension + 1:  # a simplex: every pair must be an edge
        return len(edges) == n * (n - 1) // 2
    full_rank = n * dimension - dimension * (dimension + 1) // 2
    if len(edges) < full_rank:
        return False
    generator = np.random.default_rng(seed)
    for _ in range(attempts):
        matrix = rigidity_matrix(edges, _points(n, dimension, generator))
        if _reduce(_modulo(matrix)[None])[0].sum() == full_rank:
            return True
    return False


def is_globally_rigid(
    edges: ArrayLike, n: int, dimension: int, seed: int = 0, attempts: int = 2
) -> bool:
    """Whether a generic equilibrium stress matrix has rank n − D − 1.

    For a graph of n ≥ D + 2 vertices this is equivalent to generic global rigidity (S. J. Gortler,
    A. D. Healy, D. P. Thurston, "Characterizing generic global rigidity", American Journal of
    Mathematics 132, 2010); a smaller graph must be complete. Parameters as in `is_rigid`.
    """
    edges = _simple(edges, n)
    if n <= dimension + 1:
        return len(edges) == n * (n - 1) // 2
    if len(edges) <= n * dimension - dimension * (dimension + 1) // 2:
        return False  # without a redundant edge, part of the framework can be reflected
    return bool(are_globally_rigid(edges[None], n, dimension, seed, attempts)[0])


def are_globally_rigid(
    edges: ArrayLike, n: int, dimension: int, seed: int = 0, attempts: int = 2
) -> NDArray[np.bool_]:
    """`is_globally_rigid` for graphs (G, E, 2) with equal numbers of edges, n ≥ D + 2; (G,)."""
    edges = np.asarray(edges, dtype=np.int64)
    generator = np.random.default_rng(seed)
    result = np.zeros(len(edges), dtype=bool)
    # A few graphs at a time stay in the cache.
    chunk = max(1, 1_000_000 // max(1, 8 * edges.shape[1] * n * dimension))
    for start in range(0, len(edges), chunk):
        for _ in range(attempts):
            open_ = start + np.flatnonzero(~result[start : start + chunk])
            if len(open_):
                points = _points(n, dimension, generator)
                result[open_] = _stress_ranks(edges[open_], points, generator) == n - dimension - 1
    return result


def _stress_ranks(
    edges: EdgeList, points: Array, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Rank of a random equilibrium stress matrix of each graph (G, E, 2); -1 if not rigid."""
    graphs, count = edges.shape[:2]
    n, dimension = points.shape
    # A stress is a vanishing linear combination of rows: a vector in the kernel of the transpose.
    equations = rigidity_matrix(edges, points).swapaxes(1, 2).copy()
    _modulo(equations)
    pivot_rows, free = _reduce(equations)
    stress = np.where(free, generator.integers(1, int(_PRIME), (graphs, count)), 0).astype(float)
    graph = np.arange(graphs)
    load = -_modulo(equations * np.where(free, stress, 0)[:, None]).sum(axis=2)
    which, row = np.nonzero(pivot_rows)
    solved = np.argmax(np.where(free[:, None], 0, equations)[which, row] != 0, axis=1)
    stress[which, solved] = _modulo(load)[which, row]
    matrix = np.zeros((graphs, n, n))
    first, second = edges[..., 0], edges[..., 1]
    graph_of_edge = np.broadcast_to(graph[:, None], first.shape)
    matrix[graph_of_edge, first, second] = -stress
    matrix[graph_of_edge, second, first] = -stress
    matrix[:, np.arange(n), np.arange(n)] = -matrix.sum(axis=2)
    _modulo(matrix)
    ranks = _reduce(matrix)[0].sum(axis=1)
    rigid = pivot_rows.sum(axis=1) == n * dimension - dimension * (dimension + 1) // 2
    return np.where(rigid, ranks, -1)


def _points(n: int, dimension: int, generator: np.random.Generator) -> Array:
    return generator.integers(0, int(_PRIME), (n, dimension)).astype(np.float64)


def _modulo(values: Array) -> Array:
    """Reduce integers below 2⁵² in float64 to −p/2 … p/2 in place; only multiples of p become 0."""
    quotient = values * (1 / _PRIME)
    values -= np.rint(quotient, out=quotient) * _PRIME
    return values


def _inverse(values: Array) -> Array:
    """1/v modulo the prime, as v^(p−2); 0 for 0."""
    result, power, exponent = np.ones_like(values), values.copy(), int(_PRIME) - 2
    while exponent:
        if exponent & 1:
            result = _modulo(result * power)
        power = _modulo(power * power)
        exponent >>= 1
    return result


def _reduce(matrices: Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Gauss–Jordan elimination modulo the prime of matrices (G, r, c), in place.

    Returns which rows have a pivot, (G, r), and which columns have none, (G, c); pivots become 1.
    """
    graphs, rows, columns = matrices.shape
    used = np.zeros((graphs, rows), dtype=bool)
    free = np.zeros((graphs, columns), dtype=bool)
    graph = np.arange(graphs)
    for column in range(columns):
        candidates = (matrices[:, :, column] != 0) & ~used
        row = candidates.argmax(axis=1)
        found = candidates[graph, row]
        free[:, column] = ~found
        used[graph[found], row[found]] = True
        # Rows without a pivot are zero in the previous columns, and the pivot's row is one of them.
        pivot = matrices[graph, row, column:]
        pivot = _modulo(pivot * _inverse(pivot[:, 0])[:, None])
        factor = np.where(found[:, None], matrices[:, :, column], 0)
        factor[graph, row] -= found
        which, row = np.nonzero(factor)
        changed = matrices[which, row, column:]
        changed -= factor[which, row, None] * pivot[which]
        matrices[which, row, column:] = _modulo(changed)
    return used, free


def _simple(edges: ArrayLike, n: int) -> EdgeList:
    """The edges of a simple graph as an array."""
    array = np.asarray(edges, dtype=np.int64).reshape(-1, 2)
    if len(array) and (array.min() < 0 or array.max() >= n):
        raise ValueError(f"an edge has a vertex outside 0 … {n - 1}")
    ends = np.sort(array, axis=1)
    if (ends[:, 0] == ends[:, 1]).any() or len(np.unique(ends, axis=0)) < len(ends):
        raise ValueError("each edge must join two different vertices and occur once")
    return array


def random_regular_graph(n: int, degree: int, seed: int = 0) -> EdgeList:
    """A random `degree`-regular graph on n vertices, (n·degree/2, 2); not necessarily rigid.

    Raises
    ------
    ValueError
        No such graph exists: n ≤ degree, or n·degree is odd.
    """
    if n <= degree or n * degree % 2:
        raise ValueError(f"there is no {degree}-regular graph on {n} vertices")
    edges = nx.random_regular_graph(degree, n, seed=seed).edges
    return np.array(edges, dtype=np.int64).reshape(-1, 2)
