"""Which pairs springs join: rigidity, random graphs, symmetries."""

from __future__ import annotations

import pickle

import networkx as nx
import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from molgen_energy.losses import PairwiseEnergy, SparseEdges, SymmetrizedEdges, mean_stiffness
from molgen_energy.losses.rigidity import (
    are_globally_rigid,
    is_globally_rigid,
    is_rigid,
    random_regular_graph,
    rigidity_matrix,
)
from molgen_energy.losses.symmetry import automorphisms


@pytest.fixture
def forty(molecules):
    """A prediction near 40 molecules, the molecules, and the mask."""
    positions, numbers = molecules.select(np.arange(0, 40)).padded()
    target, mask = torch.from_numpy(positions).double(), torch.from_numpy(numbers > 0)
    return target + 0.1 * torch.randn_like(target), target, mask


def complete(n):
    return np.array([(i, j) for i in range(n) for j in range(i)]).reshape(-1, 2)


def bipartite(m, n):
    return np.array([(i, m + j) for i in range(m) for j in range(n)])


def without(edges, *pairs):
    return np.array([e for e in edges.tolist() if set(e) not in [set(p) for p in pairs]])


def two_cliques(size, shared):
    """Two complete graphs that have some vertices in common: the double banana, for one."""
    other = np.concatenate([np.arange(shared), np.arange(size, 2 * size - shared)])
    edges = np.concatenate([complete(size), other[complete(size)]])
    return np.unique(np.sort(edges, axis=1), axis=0), 2 * size - shared


BANANA = without(two_cliques(5, 2)[0], (0, 1))


# Answers from the literature on rigidity.
@pytest.mark.parametrize(
    ("edges", "n", "dimension", "rigid", "globally"),
    [
        (complete(1), 1, 3, True, True),
        (complete(2), 2, 3, True, True),
        (complete(4), 4, 3, True, True),
        (without(complete(4), (0, 1)), 4, 3, False, False),
        (complete(7), 7, 3, True, True),
        # one edge short of complete on D + 2 vertices: a vertex can be mirrored
        (without(complete(4), (0, 1)), 4, 2, True, False),
        (without(complete(5), (0, 1)), 5, 3, True, False),
        (np.array([(0, 1), (1, 2), (2, 3), (3, 0)]), 4, 1, True, True),
        (np.array([(0, 1), (1, 2), (2, 3)]), 4, 1, True, False),
        (np.array([(0, 1), (1, 2), (2, 3), (3, 0)]), 4, 2, False, False),
        (bipartite(3, 3), 6, 2, True, False),
        (bipartite(4, 4), 8, 2, True, True),
        # K(4,6) is rigid in space with no edge to spare; K(5,5) is redundantly rigid and
        # 5-connected and yet not globally rigid (Connelly)
        (bipartite(4, 6), 10, 3, True, False),
        (bipartite(5, 5), 10, 3, True, False),
        (bipartite(5, 5), 10, 2, True, True),
        (np.zeros((0, 2), int), 5, 3, False, False),
        # has the 3n − 6 edges and all counts right, but turns about the line 0–1
        (BANANA, 8, 3, False, False),
        (two_cliques(6, 3)[0], 9, 3, True, False),
        (two_cliques(6, 4)[0], 8, 3, True, True),
    ],
)
def test_known_graphs(edges, n, dimension, rigid, globally):
    assert is_rigid(edges, n, dimension) is rigid
    assert is_globally_rigid(edges, n, dimension) is globally


@pytest.mark.parametrize("dimension", [2, 3])
def test_rank_agrees_with_floating_point(dimension):
    """Random graphs near the edge of rigidity, against numpy's rank at a random configuration."""
    rng = np.random.default_rng(0)
    n, answers = 9, []
    for k in range(60):
        every = complete(n)
        count = n * dimension - dimension * (dimension + 1) // 2 + k % 5 - 1
        edges = every[rng.choice(len(every), count, replace=False)]
        matrix = rigidity_matrix(edges, rng.normal(size=(n, dimension)))
        wanted = n * dimension - dimension * (dimension + 1) // 2
        answers.append(bool(np.linalg.matrix_rank(matrix) == wanted))
        assert is_rigid(edges, n, dimension) is answers[-1]
    assert 5 < sum(answers) < 55


@pytest.mark.slow
def test_global_rigidity_in_the_plane_agrees_with_combinatorics():
    """In the plane it is 3-connection and rigidity without any one edge (Jackson and Jordán)."""
    rng = np.random.default_rng(1)
    answers = []
    for k in range(40):
        every = complete(8)
        edges = every[rng.choice(28, 14 + k % 4, replace=False)]
        graph = nx.Graph(edges.tolist())
        graph.add_nodes_from(range(8))
        redundantly = all(is_rigid(np.delete(edges, e, 0), 8, 2) for e in range(len(edges)))
        answers.append(nx.node_connectivity(graph) >= 3 and redundantly)
        assert is_globally_rigid(edges, 8, 2) is answers[-1]
    assert 5 < sum(answers) < 35


def test_rigidity_matrix():
    """Its rows are the derivatives of half the squared lengths."""
    positions = np.random.default_rng(0).normal(size=(5, 3))
    edges = np.array([(0, 1), (2, 4), (3, 1)])
    step = np.random.default_rng(1).normal(size=(5, 3))

    def lengths(x):
        return 0.5 * ((x[edges[:, 0]] - x[edges[:, 1]]) ** 2).sum(1)

    change = (lengths(positions + 1e-6 * step) - lengths(positions - 1e-6 * step)) / 2e-6
    np.testing.assert_allclose(rigidity_matrix(edges, positions) @ step.ravel(), change, rtol=1e-6)


@pytest.mark.parametrize(
    ("edges", "message"),
    [([(0, 9)], "outside"), ([(0, 0)], "different"), ([(0, 1), (1, 0)], "occur once")],
)
def test_bad_graphs(edges, message):
    with pytest.raises(ValueError, match=message):
        is_rigid(edges, 5, 3)


def test_random_regular_graphs_are_mostly_globally_rigid():
    """A small part of the paper's Figure 5, with graphs of both kinds."""
    graphs = np.stack([random_regular_graph(13, 4, seed=13000 + k) for k in range(300)])
    answers = are_globally_rigid(graphs, 13, 2)
    assert 0.97 < answers.mean() < 1
    assert (np.bincount(graphs[0].ravel()) == 4).all()
    for k in (int(answers.argmin()), int(answers.argmax())):
        assert is_globally_rigid(graphs[k], 13, 2, seed=5) is bool(answers[k])
    with pytest.raises(ValueError, match="no 4-regular graph"):
        random_regular_graph(4, 4)


@pytest.mark.parametrize("dimension", [1, 2, 3, 4])
def test_sparse_graphs_are_regular_and_globally_rigid(dimension):
    """With certainty: the theorem, and an exact test of every small graph."""
    edges = SparseEdges(pool=3, seed=1)
    for n in range(1, 30):
        graphs = edges.edge_lists(n, dimension)
        degree = min(2 * dimension, n - 1)
        for graph in graphs:
            assert (np.bincount(graph.ravel(), minlength=n) == degree).all()
            assert len(np.unique(np.sort(graph, axis=1), axis=0)) == n * degree // 2
        if n >= dimension + 2:
            assert are_globally_rigid(graphs, n, dimension).all()
        else:
            assert is_globally_rigid(graphs[0], n, dimension)
    assert is_globally_rigid(edges.edge_lists(100, dimension)[0], 100, dimension)


@pytest.mark.parametrize(("n", "dimension"), [(32_800, 3), (32_801, 2)])
def test_large_sparse_graphs_are_powers_of_cycles(n, dimension):
    """Above 32,768 atoms: 0, a, 2a, … is a circle through all atoms; springs reach D ahead."""
    edges = SparseEdges(pool=5)
    strides = edges.strides(n, dimension)
    assert len(set(strides)) > 1
    target = torch.randn(2, n, dimension, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(1))
    prediction = target + 0.1 * noise
    loss = PairwiseEnergy("constant", 1.0, edges)
    generator = torch.Generator().manual_seed(3)
    drawn = int(torch.randint(len(strides), (), generator=generator))
    order = strides[drawn] * np.arange(n) % n
    assert len(set(order.tolist())) == n
    expected = torch.zeros(2).double()
    for offset in range(1, dimension + 1):
        other = np.roll(order, -offset)
        rest = (target[:, order] - target[:, other]).norm(dim=-1)
        now = (prediction[:, order] - prediction[:, other]).norm(dim=-1)
        expected += (rest - now).square().sum(1) / n
    position = prediction.clone().requires_grad_()
    got = loss(position, target, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(got, expected)
    (gradient,) = torch.autograd.grad(got.sum(), position)
    step = torch.randn_like(position)
    change = [
        loss(prediction + s * step, target, generator=torch.Generator().manual_seed(3)).sum()
        for s in (1e-6, -1e-6)
    ]
    expected_change = float(change[0] - change[1]) / 2e-6
    assert float((gradient * step).sum()) == pytest.approx(expected_change, rel=1e-5)
    bonds = torch.stack([torch.arange(n - 1), torch.arange(1, n)])
    lennard_jones = PairwiseEnergy("lennard_jones", 1.0, edges)
    assert torch.isfinite(lennard_jones(prediction[0], target[0], bonds=bonds)).all()


def test_mean_over_sparse_graphs_is_the_complete_energy():
    n = 12
    target = torch.randn(1, n, 3, generator=torch.Generator().manual_seed(0)).double()
    prediction = target + 0.2
    prediction[0, 0] += 1
    generator = torch.Generator().manual_seed(0)
    sparse = PairwiseEnergy("inverse", 1.0, SparseEdges(pool=4000))
    drawn = sparse(
        prediction.expand(20_000, -1, -1), target.expand(20_000, -1, -1), generator=generator
    )
    expected = PairwiseEnergy("inverse")(prediction, target) * 6 / (n - 1)
    assert float(drawn.mean() / expected) == pytest.approx(1, abs=0.02)
    assert drawn.std() > 0.05 * drawn.mean()


def test_graphs_depend_on_seed_and_generator():
    target = torch.randn(4, 15, 3, generator=torch.Generator().manual_seed(0))
    prediction = target + torch.randn(target.shape, generator=torch.Generator().manual_seed(1))

    def energy(seed, draw):
        loss = PairwiseEnergy("constant", edges=SparseEdges(seed=seed))
        return loss(prediction, target, generator=torch.Generator().manual_seed(draw))

    assert torch.equal(energy(0, 0), energy(0, 0))
    assert (energy(0, 0) != energy(1, 0)).all()
    assert (energy(0, 0) != energy(0, 1)).any()
    with pytest.raises(ValueError, match="pool"):
        SparseEdges(pool=0)


def square():
    return np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]])


POINTS = {
    "one": (np.zeros((1, 3)), 1),
    "two": (np.array([[0.0, 0, 0], [0, 0, 1]]), 2),
    "square": (square(), 8),
    "rectangle": (square() * [1, 2], 4),
    "kite": (np.array([[0.0, 0], [1, 0.4], [2.3, 0], [1, -0.4]]), 2),
    "helix": (np.array([[0.0, 0, 0], [1, 0.3, 0], [1.4, 1, 1], [3, 0.2, 0.1], [0, 2, 5]]), 1),
    "line": (np.array([[-2.0], [-1], [1], [2]]), 2),
}


@pytest.mark.parametrize("name", POINTS)
def test_automorphisms(name):
    points, order = POINTS[name]
    distances = cdist(points, points)
    group = automorphisms(distances, 1e-6)
    assert len(group) == len(np.unique(group, axis=0)) == order
    for image in group:
        np.testing.assert_allclose(distances[np.ix_(image, image)], distances, atol=1e-6)
    assert np.arange(len(points)).tolist() in group.tolist()


def test_tolerance_of_symmetry():
    points = square()
    points[0] += 0.01
    distances = cdist(points, points)
    assert len(automorphisms(distances, 0.05)) == 8
    with pytest.raises(ValueError, match="not finite"):
        automorphisms(np.full((3, 3), np.nan))
    assert len(automorphisms(distances, 1e-4)) == 2
    with pytest.raises(ValueError, match="closer than four times"):
        automorphisms(cdist(points, points), 5.0)


def test_what_is_equal_within_a_tolerance_is_made_a_group():
    """A hexagon with errors about as large as the tolerance: some symmetries are seen, some not."""
    rng = np.random.default_rng(0)
    angle = 2 * np.pi * np.arange(6) / 6
    sizes = []
    for _ in range(30):
        points = 1.4 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.004 * rng.normal(size=(6, 2))
        group = automorphisms(cdist(points, points), 0.01)
        known = {tuple(p) for p in group.tolist()}
        assert {tuple(p[q].tolist()) for p in group for q in group} == known
        sizes.append(len(group))
    assert set(sizes) <= {1, 2, 3, 4, 6, 12}
    assert len(set(sizes)) > 1


@pytest.mark.slow
def test_large_rings_are_searched_at_once():
    angle = 2 * np.pi * np.arange(80) / 80
    points = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    assert len(automorphisms(cdist(points, points), 1e-4)) == 160


def test_symmetrized_edges_of_packed_molecules(forty):
    prediction, target, mask = forty
    edges = SymmetrizedEdges(pool=1)
    loss = PairwiseEnergy("exponential", 1.0, edges)
    expected = loss(prediction, target, mask)
    batch = mask.nonzero()[:, 0]
    table = edges.prepare_neighbours(target[mask], batch=batch)
    assert table.index.shape[0] == len(batch)
    got = loss(prediction[mask], target[mask], batch=batch, neighbours=table)
    torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match="not finite"):
        edges.prepare_neighbours(torch.full((1, 3, 3), torch.nan))
    whole = edges.prepare_neighbours(target, mask.float())
    assert torch.equal(whole.index, edges.prepare_neighbours(target, mask).index)


def test_graphs_are_not_kept_without_end_nor_pickled():
    edges = SparseEdges(pool=2)
    loss = PairwiseEnergy(edges=edges)
    edges._CACHE_SIZE = 1000
    for n in range(50, 80):
        loss(torch.zeros(1, n, 3), torch.zeros(1, n, 3))
        assert sum(circles.order.numel() for circles in edges._circles.values()) < 1500
    assert len(pickle.dumps(edges)) < 1000


def test_symmetrized_edges_treat_equivalent_atoms_alike():
    """Hydrogens of methane and of benzene feel the same springs; in a sparse graph they do not."""
    tetrahedron = np.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    methane = np.concatenate([np.zeros((1, 3)), 0.63 * tetrahedron])
    hexagon = 2 * np.pi * np.arange(6) / 6
    ring = np.stack([np.cos(hexagon), np.sin(hexagon), 0 * hexagon], axis=1)
    for points in (methane, np.concatenate([1.39 * ring, 2.48 * ring])):
        target = torch.from_numpy(points)[None]
        mask = torch.ones(target.shape[:2], dtype=torch.bool)
        edges = SymmetrizedEdges(pool=4)
        table = edges.prepare_neighbours(target, mask, numbers=np.array([1]))
        totals = table.weight.sum(2)[0].numpy()
        hydrogens = totals[-len(points) // 2 :]
        np.testing.assert_allclose(hydrogens, hydrogens[0], rtol=1e-5)
        # the mean over the group keeps the number of edges
        sparse = edges.sparse.edge_lists(len(points), 3)[1]
        assert totals.sum() / 2 == pytest.approx(len(sparse), rel=1e-5)
        # a small displacement of one atom feels the symmetric springs
        loss = PairwiseEnergy("constant", 1.0, edges)
        energies = []
        for atom in range(len(points) // 2, len(points)):
            moved = target.clone()
            moved[0, atom] *= 1.1
            energies.append(float(loss(moved, target, neighbours=table)))
        np.testing.assert_allclose(energies, energies[0], rtol=1e-3)


def test_a_table_found_before_gives_the_same(forty):
    prediction, target, mask = forty
    edges = SymmetrizedEdges(pool=1)
    loss = PairwiseEnergy("exponential", 1.0, edges)
    table = edges.prepare_neighbours(target, mask)
    torch.testing.assert_close(
        loss(prediction, target, mask, neighbours=table), loss(prediction, target, mask)
    )


def test_mean_stiffness_calibrates_to_one(molecules):
    pieces = [molecules.select(np.arange(k, 2000, 100)) for k in (0, 1, 2)]
    batches = []
    for piece in pieces:
        positions, numbers = piece.padded()
        batches.append(
            {"target": torch.from_numpy(positions), "mask": torch.from_numpy(numbers > 0)}
        )
    scale = 1 / mean_stiffness(PairwiseEnergy("exponential"), batches)
    everything = [
        np.exp(-cdist(m.positions, m.positions))[~np.eye(len(m), dtype=bool)]
        for piece in pieces
        for m in piece
    ]
    assert scale * np.concatenate(everything).mean() == pytest.approx(1, rel=1e-5)
    lonely = {"target": torch.zeros(1, 1, 3), "mask": torch.ones(1, 1, dtype=torch.bool)}
    assert mean_stiffness(PairwiseEnergy(), [lonely]) == 1.0
