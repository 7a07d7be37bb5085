"""Torsions and signed volumes against RDKit, NumPy and plain loops, and where they are singular."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import of_smiles
from rdkit import Chem
from rdkit.Chem import rdMolTransforms
from torch.autograd import forward_ad

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.data.molecules import Molecules
from molgen_energy.losses import ChiralityError, MeanSquaredError, TorsionError

SOFTENING = 0.1
TERMS = {"torsion": TorsionError, "chirality": ChiralityError}

over_terms = pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
over_rests = pytest.mark.parametrize("rest", ["value", "projected"])


def neighbours_of(n, pairs):
    found = [set() for _ in range(n)]
    for i, j in pairs.tolist():
        if i != j:
            found[i].add(j)
            found[j].add(i)
    return found


def chains_of(n, pairs):
    """All i–j–k–l of distinct atoms, each once."""
    near = neighbours_of(n, pairs)
    return [
        (i, j, k, end)
        for j in range(n)
        for k in sorted(near[j])
        if j < k
        for i in near[j] - {k}
        for end in near[k] - {j}
        if i != end
    ]


def centres_of(n, pairs):
    """The triples of neighbours of each atom that has some."""
    triples = [list(itertools.combinations(sorted(x), 3)) for x in neighbours_of(n, pairs)]
    return {atom: found for atom, found in enumerate(triples) if found}


def directions(x, *pairs):
    """Softened, of the second atom from the first."""
    vectors = np.array([x[b] - x[a] for a, b in pairs])
    return vectors / np.sqrt((vectors**2).sum(axis=1, keepdims=True) + SOFTENING**2)


def torsion_of(x, chain):
    """The angle, and the weight of one configuration: sin²·sin² with softened directions."""
    i, j, k, end = chain
    conformer = Chem.Conformer(len(x))
    conformer.SetPositions(np.ascontiguousarray(x, np.float64))
    angle = rdMolTransforms.GetDihedralRad(conformer, i, j, k, end)
    sines = [
        np.sin(rdMolTransforms.GetAngleRad(conformer, *three)) for three in ((i, j, k), (j, k, end))
    ]
    first, middle, last = np.linalg.norm(directions(x, (j, i), (k, j), (k, end)), axis=1)
    return angle, (sines[0] * sines[1] * first * middle**2 * last) ** 2


def plain_torsion_error(x, y, pairs):
    total, chains = 0.0, chains_of(len(x), pairs)
    for chain in chains:
        (now, w), (rest, v) = torsion_of(x, chain), torsion_of(y, chain)
        total += w * v * (1 - np.cos(now - rest))
    return total / max(1, len(chains))


def volume_of(x, atom, triple):
    return np.linalg.det(directions(x, *((atom, other) for other in triple)))


def plain_chirality_error(x, y, pairs):
    centres = centres_of(len(x), pairs)
    total = 0.0
    for atom, triples in centres.items():
        errors = [0.5 * (volume_of(x, atom, t) - volume_of(y, atom, t)) ** 2 for t in triples]
        total += sum(errors) / len(errors)
    return total / max(1, len(centres))


PLAIN = {TorsionError: plain_torsion_error, ChiralityError: plain_chirality_error}


def bonds_of(molecule):
    return perceive(Molecules.from_list([molecule])).bonds.index.astype(np.int64)


@over_terms
@pytest.mark.parametrize("scale", [0.02, 0.3, 2.0])
def test_equals_plain_loops_over_molecules_of_qm9(molecules, rng, term, scale):
    loss = term()
    for number in range(0, 2000, 67):
        molecule = molecules[number]
        y, pairs = molecule.positions.astype(np.float64), bonds_of(molecule)
        x = y + scale * rng.normal(size=y.shape)
        got = loss(torch.from_numpy(x), torch.from_numpy(y), bonds=torch.from_numpy(pairs).T)
        assert float(got) == pytest.approx(PLAIN[term](x, y, pairs), rel=1e-7, abs=1e-12)


@over_terms
def test_equals_plain_loops_over_random_graphs(rng, term):
    """With rings of three and four, atoms of many bonds, loops and repeated bonds."""
    for edges in (0, 3, 8, 20, 60):
        x, y = rng.normal(size=(2, 12, 3))
        pairs = rng.integers(0, 12, (edges, 2))
        bonds = torch.from_numpy(pairs).T
        got = term()(torch.from_numpy(x), torch.from_numpy(y), bonds=bonds)
        assert float(got) == pytest.approx(PLAIN[term](x, y, pairs), rel=1e-9, abs=1e-15)


def chain_with(angle, bond=1.5, opening=110.0):
    """Four atoms with a torsion and two equal angles in degrees."""
    turn = np.radians(angle)
    x, y = bond * np.cos(np.radians(opening)), bond * np.sin(np.radians(opening))
    start, end = [x, y, 0], [bond - x, y * np.cos(turn), y * np.sin(turn)]
    points = np.array([start, [0, 0, 0], [bond, 0, 0], end])
    return torch.from_numpy(points)


CHAIN = torch.tensor([[0, 1, 2], [1, 2, 3]])


def test_a_torsion_sees_its_sign():
    """+60° against −60°: 1 − cos 120° = 3/2, where every distance is the same."""
    plus, minus = chain_with(60.0), chain_with(-60.0)
    torch.testing.assert_close(torch.pdist(plus), torch.pdist(minus))
    angle, weight = torsion_of(plus.numpy(), (0, 1, 2, 3))
    assert np.degrees(angle) == pytest.approx(60)
    assert weight == pytest.approx(np.sin(np.radians(110)) ** 4, rel=0.02)
    loss = float(TorsionError()(plus, minus, bonds=CHAIN))
    assert loss == pytest.approx(1.5 * weight**2)


@pytest.mark.parametrize("smiles", ["C[C@H](N)O", "FC(Cl)Br", "OO"])
def test_mirror_images_of_chiral_molecules(smiles):
    molecule = of_smiles(smiles)
    y = torch.from_numpy(molecule.positions).double()
    bonds = torch.from_numpy(bonds_of(molecule)).T
    mirrored = y * torch.tensor([1.0, 1, -1])
    if smiles != "OO":
        assert float(ChiralityError()(mirrored, y, bonds=bonds)) > 0.1
    if smiles != "FC(Cl)Br":
        assert float(TorsionError()(mirrored, y, bonds=bonds)) > 0.1


def test_an_exchange_of_two_neighbours_is_a_mirror_image():
    molecule = of_smiles("FC(Cl)Br")
    y = torch.from_numpy(molecule.positions).double()
    bonds = torch.from_numpy(bonds_of(molecule)).T
    exchanged = y[[2, 1, 0, 3, 4]]
    assert float(ChiralityError()(exchanged, y, bonds=bonds)) > 0.1


def test_planar_atoms_resist_pyramidalisation():
    turn = 2 * np.pi * np.arange(3) / 3
    ring = np.stack([np.cos(turn), np.sin(turn), 0 * turn], axis=1)
    y = torch.from_numpy(np.concatenate([np.zeros((1, 3)), 1.4 * ring]))
    bonds = torch.tensor([[0, 0, 0], [1, 2, 3]])
    values = []
    for height in (0.0, 0.05, 0.1, -0.1):
        x = y.clone()
        x[0, 2] = height
        values.append(float(ChiralityError()(x, y, bonds=bonds)))
    assert values[0] == 0
    assert values[2] == pytest.approx(values[3])
    assert values[2] == pytest.approx(4 * values[1], rel=0.02)


@over_terms
@over_rests
def test_samples_without_such_coordinates_cost_nothing(term, rest):
    """No bonds; a bond; three atoms in a row."""
    x, y = torch.randn(2, 3, 3, 3).unbind(0)
    x.requires_grad_()
    bonds = torch.tensor([[1, 2, 2], [0, 0, 1], [1, 1, 2]])
    loss = term(rest)(x, y, bonds=bonds)
    assert (loss == 0).all()
    loss.sum().backward()
    assert (x.grad == 0).all()


SINGULAR = {
    "straight": [[-1.5, 0, 0], [0, 0, 0], [1.5, 0, 0], [2.0, 1.4, 0]],
    "straight at both": [[-1.5, 0, 0], [0, 0, 0], [1.5, 0, 0], [3.0, 0, 0]],
    "folded": [[1.5, 0, 0], [0, 0, 0], [1.5, 0, 0], [2.0, 1.4, 0]],
    "first coincide": [[0, 0, 0], [0, 0, 0], [1.5, 0, 0], [2.0, 1.4, 0]],
    "middle coincide": [[-0.5, 1.4, 0], [0, 0, 0], [0, 0, 0], [0.5, 0.3, 1.4]],
    "all coincide": [[0.0, 0, 0]] * 4,
}
RING = torch.tensor(
    [[0, 1, 2, 0, 0], [1, 2, 3, 2, 3]]
)  # every atom has a torsion, 0 has three bonds


@over_terms
@pytest.mark.parametrize("where", ["prediction", "target"])
@pytest.mark.parametrize("name", SINGULAR)
def test_value_and_gradient_are_continuous_at_singular_points(rng, term, where, name):
    """From every direction the gradient tends to that of the point, which is the derivative."""
    singular = torch.tensor(SINGULAR[name], dtype=torch.float64)
    other = chain_with(70.0)
    step = torch.from_numpy(rng.normal(size=(20, 4, 3)))

    def at(points):
        x, y = (points, other) if where == "prediction" else (other, points)
        x = x.expand(len(points), -1, -1).clone().requires_grad_()
        bonds = torch.cat([torch.full((1, RING.shape[1]), 0), RING])
        bonds = torch.cat([bonds + torch.tensor([[b], [0], [0]]) for b in range(len(x))], dim=1)
        loss = term()(x, y.expand(len(points), -1, -1), bonds=bonds)
        return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]

    value, gradient = at(singular[None])
    assert torch.isfinite(gradient).all()
    for size, tolerance in ((1e-4, 0.2), (1e-6, 2e-3), (1e-8, 2e-5)):
        near, near_gradient = at(singular + size * step)
        assert (near - value).abs().max() < tolerance
        assert (near_gradient - gradient).abs().max() < tolerance
    if where == "prediction":
        size = 1e-7
        found = (at(singular + size * step)[0] - at(singular - size * step)[0]) / (2 * size)
        torch.testing.assert_close(found, (step * gradient).sum((1, 2)), rtol=0, atol=1e-4)


@over_terms
@over_rests
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_bounded(rng, term, rest, dtype):
    """Below 22/δ at any scale of the configurations, down to numbers whose squares are 0."""
    x, y = torch.from_numpy(rng.normal(size=(2, 4000, 4, 3))).to(dtype)
    scale = torch.from_numpy(10.0 ** rng.uniform(-24, 3, (2, 4000, 4, 1))).to(dtype)
    x, y = (scale[0] * x).requires_grad_(), scale[1] * y
    bonds = torch.stack(
        [
            torch.arange(4000).repeat_interleave(3),
            torch.tensor([0, 1, 2]).repeat(4000),
            torch.tensor([1, 2, 3]).repeat(4000),
        ]
    )
    if term is ChiralityError:
        bonds[1] = 0
    loss = term(rest)(x, y, bonds=bonds)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(x.grad).all()
    assert (loss >= 0).all()
    if rest == "value":
        assert loss.max() <= 2
        assert x.grad.norm(dim=-1).max() < 22 / SOFTENING


def test_nothing_is_lost_near_the_target(rng):
    """In float32, 1 − cos of a thousandth of a degree would be 0."""
    y = chain_with(50.0)
    x = chain_with(50.001)
    exact = float(TorsionError()(x, y, bonds=CHAIN))
    assert 0 < exact < 2e-10
    got = float(TorsionError()(x.float(), y.float(), bonds=CHAIN))
    assert got == pytest.approx(exact, rel=0.05)


def q_torsion(x, chain):
    """The torsion by atan2, with PyTorch's gradient."""
    i, j, k, end = chain
    a, b, c = x[j] - x[i], x[k] - x[j], x[end] - x[k]
    left, right = torch.linalg.cross(a, b), torch.linalg.cross(b, c)
    return torch.atan2((a @ right) * b.norm(), left @ right)


def q_volume(x, atom, triple):
    vectors = torch.stack([x[other] - x[atom] for other in triple])
    return torch.linalg.det(vectors / (vectors.square().sum(1, keepdim=True) + SOFTENING**2).sqrt())


def projection(q, x, change):
    (g,) = torch.autograd.grad(q, x)
    return 0.5 * float((g * change).sum()) ** 2


@over_terms
def test_projected_is_its_definition(molecules, rng, term):
    """½·w·(g·(ŷ − y))² with the gradient of each coordinate by autograd."""
    for number in (5, 800, 1600):
        molecule = molecules[number]
        y, pairs = torch.from_numpy(molecule.positions).double(), bonds_of(molecule)
        change = 0.2 * torch.from_numpy(rng.normal(size=y.shape))
        x = (y + change).requires_grad_()
        if term is TorsionError:
            terms = [
                torsion_of(x.detach().numpy(), c)[1] ** 2 * projection(q_torsion(x, c), x, change)
                for c in chains_of(len(y), pairs)
            ]
        else:
            terms = [
                np.mean([projection(q_volume(x, atom, t), x, change) for t in triples])
                for atom, triples in centres_of(len(y), pairs).items()
            ]
        got = term("projected")(x.detach(), y, bonds=torch.from_numpy(pairs).T)
        assert float(got) == pytest.approx(float(np.mean(terms)), rel=1e-9)


@over_terms
def test_projected_agrees_with_value_near_the_target(molecules, rng, term):
    molecule = molecules[1200]
    y = torch.from_numpy(molecule.positions).double()
    bonds = torch.from_numpy(bonds_of(molecule)).T
    x = y + 1e-6 * torch.from_numpy(rng.normal(size=y.shape))
    expected = term()(x, y, bonds=bonds)
    torch.testing.assert_close(term("projected")(x, y, bonds=bonds), expected, rtol=1e-4, atol=0)


@over_terms
def test_projected_is_stationary_at_the_mean_of_random_targets(molecules, rng, term):
    """As the squared error; the plain form is not."""
    molecule = molecules[1200]
    y = torch.from_numpy(molecule.positions).double()
    bonds = torch.from_numpy(bonds_of(molecule)).T
    targets = y + 0.5 * torch.from_numpy(rng.normal(size=(40, *y.shape)))
    count = len(targets)
    sample = torch.arange(count).repeat_interleave(bonds.shape[1])
    many = torch.cat([sample[None], bonds.repeat(1, count)])

    def residual(loss, at):
        x = at.clone().requires_grad_()
        loss(x.expand(count, -1, -1), targets, bonds=many).mean().backward()
        return float(x.grad.norm())

    mean = targets.mean(dim=0)
    scale = residual(term("projected"), mean + 0.1 * (y - mean))
    assert residual(term("projected"), mean) < 1e-12 * scale
    assert residual(MeanSquaredError(), mean) < 1e-12
    assert residual(term(), mean) > 0.01 * scale > 0


@over_terms
@over_rests
def test_a_hundred_thousand_atoms(term, rest):
    """Time and memory are linear: a matrix of pairs would have 10¹⁰ numbers."""
    n = 100_000
    y = torch.arange(3 * n).reshape(n, 3).double().mul(1.7).sin()
    atom = torch.arange(n - 1)
    x = (y + 0.1 * torch.cos(y * 3)).requires_grad_()
    bonds = torch.cat([torch.stack([atom, atom + 1]), torch.stack([atom[::2], atom[::2] // 2])], 1)
    loss = term(rest)(x, y, bonds=bonds)
    loss.sum().backward()
    assert float(loss) > 0
    assert torch.isfinite(x.grad).all()


@over_terms
def test_forward_mode_and_functional_gradients(term):
    prediction, target, step = torch.randn(3, 2, 6, 3).double().unbind(0)
    atom = torch.arange(6)
    bonds = (atom[:, None] != atom).expand(2, -1, -1)
    loss = term()
    position = prediction.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(position, target, bonds=bonds).sum(), position)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(prediction, step)
        tangent = forward_ad.unpack_dual(loss(dual, target, bonds=bonds)).tangent
    torch.testing.assert_close(tangent, (gradient * step).sum((1, 2)))
    found = torch.func.grad(lambda x: loss(x, target, bonds=bonds).sum())(prediction)
    torch.testing.assert_close(found, gradient)


@over_terms
@over_rests
def test_other_strides_and_empty_batches(term, rest):
    loss = term(rest)
    prediction, target = torch.randn(2, 3, 3, 6).transpose(2, 3).unbind(0)
    bonds = torch.ones(3, 6, 6)
    expected = loss(prediction.contiguous(), target.contiguous(), bonds=bonds)
    torch.testing.assert_close(loss(prediction, target, bonds=bonds), expected)
    for shape in ((0, 5, 3), (2, 0, 3)):
        x = torch.zeros(shape)
        got = loss(x, x, bonds=torch.zeros(3, 0).long())
        assert got.tolist() == [0.0] * shape[0]
    x, none = torch.zeros(0, 3), torch.zeros(2, 0).long()
    assert loss(x, x, batch=torch.zeros(0).long(), bonds=none).shape == (0,)
    x = torch.randn(4, 3)
    more = loss(x, x + 1, batch=torch.tensor([0, 0, 0, 2]), bonds=none, size=5)
    assert more.tolist() == [0.0] * 5


@over_terms
@pytest.mark.parametrize(
    ("options", "shape", "given", "message"),
    [
        ({"rest": "valu"}, (4, 3), {}, r"unknown rest 'valu' \(valid: value, projected\)"),
        ({}, (4, 3), {}, "give bonds"),
        ({}, (4, 2), {"bonds": CHAIN}, "need 3 dimensions, not 2"),
    ],
)
def test_what_does_not_fit_is_refused(term, options, shape, given, message):
    with pytest.raises(ValueError, match=message):
        term(**options)(torch.zeros(shape), torch.zeros(shape), **given)


@over_terms
def test_sections_say_where_the_term_is_at_rest(term):
    section = term.Config(rest="projected")
    assert section.build().rest == "projected"
    assert section.describe() == ", rest projected"
    assert term.Config().build().rest == "value"
