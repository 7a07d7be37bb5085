"""Do the lengths of a graph's edges fix the whole configuration? Generic rigidity, decided exactly.

A graph is (generically) rigid in D dimensions when a generic framework on it cannot be deformed
continuously without changing an edge's length, and globally rigid when there is no other framework
with the same lengths at all, up to Euclidean motions. An energy with springs on a globally rigid
graph has the same minimisers as one with springs on all pairs.

The tests put the vertices on random points of a finite field and take ranks there, without
rounding. A rank over the field is never above the generic one, so *yes* is always true; *no* is
wrong with a probability of about n²D²/2²⁶ to the power of `attempts`.
"""

from __future__ import annotations

import networkx as nx
import numpy as np
from numpy.typing import ArrayLike, NDArray

_PRIME = 67_108_859.0  # the largest below 2²⁶: products are exact in float64

Array = NDArray[np.float64]
Edges = NDArray[np.int64]


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
        at = np.broadcast_to(edges[..., end, None, None], (*edges.shape[:-1], 1, dimension))
        np.put_along_axis(matrix, at, sign * difference[..., None, :], axis=-2)
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
        Of the random points; further ones are tried only where the answer would be *no*.
    """
    edges = _simple(edges, n)
    if n <= dimension + 1:  # a simplex: every pair must be held
        return len(edges) == n * (n - 1) // 2
    wanted = n * dimension - dimension * (dimension + 1) // 2
    if len(edges) < wanted:
        return False
    generator = np.random.default_rng(seed)
    for _ in range(attempts):
        matrix = rigidity_matrix(edges, _points(n, dimension, generator))
        if _reduce(_modulo(matrix)[None])[0].sum() == wanted:
            return True
    return False


def is_globally_rigid(
    edges: ArrayLike, n: int, dimension: int, seed: int = 0, attempts: int = 2
) -> bool:
    """Whether a generic equilibrium stress matrix has rank n − D − 1.

    A graph of n ≥ D + 2 vertices is generically globally rigid exactly then (S. J. Gortler, A. D.
    Healy, D. P. Thurston, "Characterizing generic global rigidity", American Journal of
    Mathematics 132, 2010); a smaller one when it is complete. Parameters as in `is_rigid`.
    """
    edges = _simple(edges, n)
    if n <= dimension + 1:
        return len(edges) == n * (n - 1) // 2
    if len(edges) <= n * dimension - dimension * (dimension + 1) // 2:
        return False  # none to spare: some edge's other side can be mirrored
    return bool(are_globally_rigid(edges[None], n, dimension, seed, attempts)[0])


def are_globally_rigid(
    edges: ArrayLike, n: int, dimension: int, seed: int = 0, attempts: int = 2
) -> NDArray[np.bool_]:
    """`is_globally_rigid` for graphs (G, E, 2) with as many edges each, n ≥ D + 2; (G,)."""
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


def _stress_ranks(edges: Edges, points: Array, generator: np.random.Generator) -> NDArray[np.int64]:
    """Rank of the matrix of a random equilibrium stress of each graph (G, E, 2); -1: flexible."""
    graphs, count = edges.shape[:2]
    n, dimension = points.shape
    # A stress is a combination of rows that vanishes: a vector in the kernel of the transpose.
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
    at = np.broadcast_to(graph[:, None], first.shape)
    matrix[at, first, second] = -stress
    matrix[at, second, first] = -stress
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

    Returns which rows hold a pivot, (G, r), and which columns hold none, (G, c); pivots become 1.
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
        # Rows that hold no pivot yet are zero in the columns behind, and the pivot's row is one.
        pivot = matrices[graph, row, column:]
        pivot = _modulo(pivot * _inverse(pivot[:, 0])[:, None])
        factor = np.where(found[:, None], matrices[:, :, column], 0)
        factor[graph, row] -= found
        which, at = np.nonzero(factor)
        changed = matrices[which, at, column:]
        changed -= factor[which, at, None] * pivot[which]
        matrices[which, at, column:] = _modulo(changed)
    return used, free


def _simple(edges: ArrayLike, n: int) -> Edges:
    """Edges as an array; no loops, no edge twice."""
    array = np.asarray(edges, dtype=np.int64).reshape(-1, 2)
    if len(array) and (array.min() < 0 or array.max() >= n):
        raise ValueError(f"an edge names a vertex outside 0 … {n - 1}")
    ends = np.sort(array, axis=1)
    if (ends[:, 0] == ends[:, 1]).any() or len(np.unique(ends, axis=0)) < len(ends):
        raise ValueError("each edge must join two different vertices and be given once")
    return array


def random_regular_graph(n: int, degree: int, seed: int = 0) -> Edges:
    """A random `degree`-regular graph on n vertices, (n·degree/2, 2); not necessarily rigid.

    Raises
    ------
    ValueError
        There is none: n ≤ degree, or n·degree is odd.
    """
    if n <= degree or n * degree % 2:
        raise ValueError(f"there is no {degree}-regular graph on {n} vertices")
    edges = nx.random_regular_graph(degree, n, seed=seed).edges
    return np.array(edges, dtype=np.int64).reshape(-1, 2)
