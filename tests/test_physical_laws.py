"""Laws that every registered loss, model and sampler must obey. Registering one tests it."""

from __future__ import annotations

import copy
import re
from functools import cache
from itertools import combinations_with_replacement, permutations, product
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import dense_orders, padded_batch
from scipy.spatial.transform import Rotation
from states import CALLS, alike, layout_of, network
from states import inputs_of as network_inputs
from torch.autograd import forward_ad

from molgen_energy.diffusion.noise import RandomNumbers
from molgen_energy.diffusion.process import PROCESSES
from molgen_energy.diffusion.samplers import SAMPLERS, build_sampler
from molgen_energy.diffusion.state import State, pairs_inside
from molgen_energy.losses import (
    EDGES,
    LOSSES,
    POSITION_TERMS,
    SPIN_LOSSES,
    SPRINGS,
    EdgesConfig,
    EnergyConfig,
    Neighbours,
    PairwiseEnergy,
    ScoreEnergyConfig,
    SparseEdges,
    SpinLoss,
    SpringsConfig,
    SymmetrizedEdges,
    lattice_couplings,
)
from molgen_energy.losses.energy import Rest, SpringsAt
from molgen_energy.losses.spin import LabelledLossConfig
from molgen_energy.losses.symmetry import automorphisms
from molgen_energy.models import SHAPE_MODELS, SPIN_MODELS


def energy_sections():
    """Sections of the energy with every family of springs on every kind of edges.

    One graph for each number of atoms: a sample has the same graph in any batch.
    """
    sections = {
        f"energy-{springs}-{edges}": EnergyConfig(
            springs=SpringsConfig(family=springs, scale=scale_of(springs)),
            edges=EdgesConfig(kind=edges, pool=1),
        )
        for springs in SPRINGS
        for edges in EDGES
    }
    by_features = SpringsConfig(scale=1.7, distance="features")
    sections["energy-features"] = EnergyConfig(springs=by_features)
    by_sample = SpringsConfig(scale="sample")
    sections["energy-sample"] = EnergyConfig(springs=by_sample)
    sections["energy-noisy"] = EnergyConfig(springs=by_sample, springs_at="noisy")
    return sections


def scale_of(springs):
    return "sample" if SPRINGS[springs].adaptive else 1.7


def stopped_sections():
    """Sections of losses with a part that is constant for the gradient."""
    sections = {
        f"score_energy-{springs}-{edges}": ScoreEnergyConfig(
            springs=SpringsConfig(family=springs, scale="sample"),
            edges=EdgesConfig(kind=edges, pool=1),
        )
        for springs, edges in [*((springs, "complete") for springs in SPRINGS),
                               *(("exponential", edges) for edges in EDGES)]
        if not SPRINGS[springs].requires_bonds and not EDGES[edges].requires
    }  # fmt: skip
    sections["score_energy-noisy"] = ScoreEnergyConfig(springs_at="noisy")
    for rest in get_args(Rest):
        for place in get_args(SpringsAt):
            if rest == "distance" and place != "prediction":
                continue
            springs = SpringsConfig(scale="sample")
            name = f"{rest}-{place}"
            sections[name] = EnergyConfig(springs=springs, rest=rest, springs_at=place)
    return sections


def position_losses():
    """Every registered loss on positions, built from its section class."""
    special = ("energy", "score_energy")
    others = {name: kind.Config() for name, kind in LOSSES.items() if name not in special}
    sections = energy_sections() | stopped_sections() | others
    return {name: section.build() for name, section in sections.items()}


ALL_LOSSES = position_losses()
ALL_LOSSES["energy-callable"] = PairwiseEnergy(lambda d: 1 / d**3, 1.7)
ENERGIES = {name: loss for name, loss in ALL_LOSSES.items() if name.startswith("energy")}
RIGID = {name: loss for name, loss in ENERGIES.items() if not name.endswith("-bonds")}
STOPPED = {name: ALL_LOSSES[name] for name in stopped_sections()}
DIFFERENTIABLE = {name: loss for name, loss in ALL_LOSSES.items() if name not in STOPPED}
POINTWISE = {name: loss for name, loss in DIFFERENTIABLE.items() if name not in ENERGIES}
TERMS = {name: kind() for name, kind in POSITION_TERMS.items() if name not in LOSSES}
PROJECTED = {f"{name}-projected": POSITION_TERMS[name](rest="projected") for name in TERMS}
EVERY_TERM = ALL_LOSSES | TERMS | PROJECTED


def over(losses):
    return pytest.mark.parametrize("loss", losses.values(), ids=losses)


def inputs_of(target, mask):
    """All inputs that losses may require besides positions; NaN at padding."""
    nan = torch.tensor(torch.nan, dtype=target.dtype)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(*mask.shape, 4, generator=generator).to(target.dtype)
    inside = torch.where(mask[..., None], target, 99).float().numpy()
    orders = dense_orders(inside[..., :3], np.where(mask.numpy(), 6, 0).astype(np.uint8))
    noise = torch.randn(target.shape, generator=generator).to(target.dtype)
    return {
        "features": torch.where(mask[..., None], features, nan),
        "bonds": torch.from_numpy(orders > 0),
        "noisy": target + 0.5 * noise,
        "noise_level": torch.full((len(target),), 0.5, dtype=target.dtype),
    }


def value(loss, prediction, target, mask, extras=None):
    extras = inputs_of(target, mask) if extras is None else extras
    return loss(prediction, target, mask, **extras)


def prediction_of(molecules):
    """A prediction near the data, the data, and the mask, in float64 with NaN at padding."""
    target, mask = padded_batch(molecules.select(np.arange(0, 2000, 250)))
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(0)).double()
    return target + 0.3 * noise, target, mask


@pytest.fixture(scope="module")
def pair(molecules):
    return prediction_of(molecules)


@pytest.mark.parametrize(
    ("registry", "name"),
    [
        *((registry, name) for registry in (LOSSES, SPIN_LOSSES) for name in registry),
        *((POSITION_TERMS, name) for name in TERMS),
    ],
    ids=[*LOSSES, *SPIN_LOSSES, *TERMS],
)
def test_sections_stand_beside_their_losses(registry, name):
    """The section of a row has its name, and builds a loss of its class with the same inputs."""
    section = registry[name].Config()
    assert section.name == name
    resolved = section.resolve(lambda: [{"target": torch.randn(2, 5, 3).double()}], seed=0)
    loss = resolved.config.build(seed=0, channels=None)
    assert type(loss) is registry[name]
    assert section.requires == resolved.config.requires == loss.requires
    assert resolved.stiffness == pytest.approx(1.0, rel=1e-12, abs=0)


@pytest.mark.parametrize("name", energy_sections())
def test_the_energy_requires_what_its_section_says(pair, name):
    """And nothing more: with these inputs alone it has a value, without any one of them none."""
    section = energy_sections()[name]
    loss = section.build()
    assert section.requires == loss.requires
    prediction, target, mask = pair
    inputs = {k: v for k, v in inputs_of(target, mask).items() if k in loss.requires}
    if "neighbours" in loss.requires:
        inputs["neighbours"] = loss.prepare_neighbours(target, mask)
    assert torch.isfinite(loss(prediction, target, mask, **inputs)).all()
    for key in loss.requires - {"neighbours"}:  # edges that are not prepared are found
        others = {k: v for k, v in inputs.items() if k != key}
        with pytest.raises(ValueError, match=f"give {key}"):
            loss(prediction, target, mask, **others)


def moved(positions, mirror=1, seed=1):
    rotation = mirror * torch.from_numpy(Rotation.random(random_state=seed).as_matrix())
    return positions @ rotation.T + torch.tensor([5.0, -3.0, 1.0]).double()


def naive_energy(prediction, target, mask, stiffness):
    """Equation 7 as it is written, pair by pair."""
    energies = []
    for k in range(len(mask)):
        n, total = int(mask[k].sum()), 0.0
        for i in range(n):
            for j in range(n):
                if i != j:
                    rest = (target[k, i] - target[k, j]).norm()
                    now = (prediction[k, i] - prediction[k, j]).norm()
                    total += 0.5 * 1.7 / n * stiffness(k, i, j, rest) * (rest - now) ** 2
        energies.append(float(total))
    return torch.tensor(energies, dtype=torch.float64)


@pytest.mark.parametrize("edges", EDGES)
@pytest.mark.parametrize("springs", SPRINGS)
def test_energy_is_the_equation(pair, springs, edges):
    _, target, mask = pair
    extras = inputs_of(target, mask)
    bonded = extras["bonds"]
    joined = np.ones((*mask.shape, mask.shape[1])) if edges == "complete" else bonded.numpy()
    if edges in ("sparse", "symmetrized"):
        joined = np.zeros_like(joined, dtype=float)
        for k, n in enumerate(mask.sum(1).tolist()):
            i, j = SparseEdges(pool=1).edge_lists(n, 3)[0].T
            joined[k, i, j] = joined[k, j, i] = 1
            if edges == "symmetrized":
                group = automorphisms(torch.cdist(target[k, :n], target[k, :n]).numpy(), 0.01)
                images = joined[k, :n, :n][group[:, :, None], group[:, None, :]]
                joined[k, :n, :n] = images.mean(axis=0)

    def stiffness(k, i, j, rest):
        return SPRINGS[springs](rest, bonded[k, i, j]) * float(joined[k, i, j])

    expected = naive_energy(*pair, stiffness)
    if scale_of(springs) == "sample":  # before anything is learnt all springs are equal
        expected = expected / 1.7
    torch.testing.assert_close(value(ENERGIES[f"energy-{springs}-{edges}"], *pair), expected)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("constant", lambda d: 1.0),
        ("exponential", lambda d: np.exp(-d)),
        ("inverse", lambda d: 1 / (d + 1e-5)),
        ("inverse_square", lambda d: 1 / (d**2 + 1e-5)),
        ("lennard_jones", lambda d: np.where(np.arange(5) == 2, 1, 1 / (d**2 + 1e-5))),
        ("auto", lambda d: 1.0),
    ],
)
def test_spring_families(name, formula):
    d = np.array([0.0, 0.7, 1.1, 1.54, 5.0])
    expected = np.broadcast_to(formula(d), d.shape)
    found = SPRINGS[name](torch.from_numpy(d), torch.arange(5) == 2)
    np.testing.assert_allclose(found.numpy(), expected)


@over(EVERY_TERM)
def test_zero_at_the_data_positive_elsewhere(pair, loss):
    prediction, target, mask = pair
    assert value(loss, target, target, mask).abs().max() < 1e-20
    assert (value(loss, prediction, target, mask) > 0).all()


@over(EVERY_TERM)
def test_padding_has_no_effect(pair, loss):
    prediction, target, mask = pair
    extras = inputs_of(target, mask)
    together = value(loss, prediction, target, mask, extras)
    assert together.shape == (len(mask),)
    for k in range(len(mask)):
        n = int(mask[k].sum())
        one = {
            "features": extras["features"][k : k + 1, :n],
            "bonds": extras["bonds"][k : k + 1, :n, :n],
            "noisy": extras["noisy"][k : k + 1, :n],
            "noise_level": extras["noise_level"][k : k + 1],
        }
        cut = slice(k, k + 1), slice(n)
        alone = loss(prediction[cut], target[cut], mask[cut], **one)
        torch.testing.assert_close(together[k : k + 1], alone)
        no_mask = loss(prediction[cut], target[cut], **one)
        torch.testing.assert_close(no_mask, alone)


# Elsewhere an atom has another number and so other edges in a random graph.
@over({name: loss for name, loss in EVERY_TERM.items() if "-s" not in name})
def test_where_padding_stands_has_no_effect(pair, loss):
    prediction, target, mask = pair
    extras = inputs_of(target, mask)

    def padded_in_front(values, fill):
        return torch.cat([torch.full_like(values[:, :2], fill), values], dim=1)

    got = loss(
        padded_in_front(prediction, torch.nan),
        padded_in_front(target, torch.nan),
        padded_in_front(mask, False),
        features=padded_in_front(extras["features"], torch.nan),
        bonds=torch.nn.functional.pad(extras["bonds"], (2, 0, 2, 0), value=True),
        noisy=padded_in_front(extras["noisy"], torch.nan),
        noise_level=extras["noise_level"],
    )
    torch.testing.assert_close(got, value(loss, prediction, target, mask, extras))


@over(EVERY_TERM)
def test_packed_is_padded(pair, loss):
    prediction, target, mask = pair
    extras = inputs_of(target, mask)
    expected = value(loss, prediction, target, mask, extras)
    batch, _ = mask.nonzero().T
    number = torch.full(mask.shape, -1)
    number[mask] = torch.arange(len(batch))
    sample, i, j = (extras["bonds"].triu() & mask[:, :, None] & mask[:, None]).nonzero().T
    packed = {
        "features": extras["features"][mask],
        "bonds": torch.stack([number[sample, i], number[sample, j]]),
        "noisy": extras["noisy"][mask],
        "noise_level": extras["noise_level"],
    }
    value_ = prediction[mask].requires_grad_()
    got = loss(value_, target[mask], batch=batch, **packed)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    padded = torch.where(mask[..., None], prediction, 0).requires_grad_()
    value(loss, padded, target, mask, extras).sum().backward()
    torch.testing.assert_close(value_.grad, padded.grad[mask])


@over(EVERY_TERM)
def test_bonds_as_a_list_are_bonds_as_a_matrix(pair, loss):
    """(3, E), in either or both directions and in any order, for (B, N, N)."""
    prediction, target, mask = pair
    extras = inputs_of(target, mask)
    expected = value(loss, prediction, target, mask, extras)
    both = extras["bonds"].nonzero().T
    one = both[:, both[1] < both[2]]
    for bonds in (both, one, one[[0, 2, 1]].flip(1), both.repeat(1, 2).int()):
        got = value(loss, prediction, target, mask, extras | {"bonds": bonds})
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@over(DIFFERENTIABLE | TERMS)
def test_gradient_against_finite_differences(pair, loss):
    prediction, target, mask = (x[:1] for x in pair)
    position = prediction.clone()
    position[~mask] = 0  # gradcheck perturbs the padding too
    position.requires_grad_()
    extras = inputs_of(target, mask)
    if "neighbours" in loss.requires:
        extras["neighbours"] = loss.prepare_neighbours(target, mask)
    assert torch.autograd.gradcheck(lambda x: value(loss, x, target, mask, extras), position)


def spin_losses():
    """Every registered loss on spins; one with a gauge in both."""
    sections = {name: kind.Config() for name, kind in SPIN_LOSSES.items()}
    for name, section in list(sections.items()):
        if isinstance(section, LabelledLossConfig):
            sections[f"{name}-fixed"] = section.model_copy(update={"gauge": "fixed"})
    return {name: section.build() for name, section in sections.items()}


def differentiable_inputs(loss, pair):
    """Every input of real numbers, and the sum of a loss as a function of them."""
    generator = torch.Generator().manual_seed(6)
    loss, index = copy.deepcopy(loss), None
    prediction, target, mask = (x[:2] for x in pair)
    if isinstance(loss, SpinLoss):
        mask = torch.arange(9) < torch.tensor([[9], [7]])
        padding, shape = ~mask[..., None], (2, 9, 1)
        target = torch.randn(shape, generator=generator).double().sign()
        logits = target + torch.randn(shape, generator=generator)
        prediction, target = (x.masked_fill(padding, torch.nan) for x in (logits, target))
        table = lattice_couplings(*torch.rand(2, 2, 3, 3, generator=generator).double())
        inputs, bonds = {}, None
    else:
        inputs = inputs_of(target, mask)
        bonds = inputs.pop("bonds")
        table = loss.prepare_neighbours(target, mask) if "neighbours" in loss.requires else None
    inputs = {"prediction": prediction, "target": target} | inputs
    if table is not None:
        index, inputs["neighbours"] = table.index, table.weight.double()

    def total(prediction, target, neighbours=None, **others):
        if neighbours is not None:
            neighbours = Neighbours(index, neighbours)
        return loss(prediction, target, mask, bonds=bonds, neighbours=neighbours, **others).sum()

    if loss.adaptive is not None:  # learn springs that are not all equal
        total(**inputs | {"prediction": prediction.clone().requires_grad_()})
        loss.adaptive.finish_step()
    return inputs, total


def reverse_mode(function, place):
    place = place.clone().requires_grad_()
    result = function(place)
    if not result.requires_grad:
        return torch.zeros_like(place)
    return torch.autograd.grad(result, place, create_graph=True, materialize_grads=True)[0]


def forward_mode(function, place):
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(place, UNIT))).tangent
    return torch.zeros_like(place) if tangent is None else tangent


def reverse_transform(function, place):
    return torch.func.grad(function)(place)


def forward_transform(function, place):
    return torch.func.jvp(function, (place,), (UNIT,))[1]


def differences(function, place, step=1e-5):
    return (function(place + step) - function(place - step)) / (2 * step)


REFUSED = "gets no gradient: detach it|has no second derivative|forward AD .* does not support it"


def unless_refused(derivative, function):
    """A derivative at 0; None where the loss, or PyTorch, refuses it and says so."""
    try:
        return float(derivative(function, 0 * UNIT).detach())
    except (ValueError, RuntimeError) as error:
        assert re.search(REFUSED, str(error)), error
        return None


UNIT = torch.ones((), dtype=torch.float64)
MODES = (reverse_mode, forward_mode)
TRANSFORMS = (reverse_transform, forward_transform)
TWICE = [  # outer, inner; PyTorch refuses to nest the forward mode
    *(both for both in product(MODES, repeat=2) if both != (forward_mode, forward_mode)),
    *product(TRANSFORMS, repeat=2),
]


@over(EVERY_TERM | spin_losses())
def test_derivatives_are_right_or_refused(pair, loss):
    """With respect to every input, first and second, however they are asked for."""
    inputs, total = differentiable_inputs(loss, pair)
    generator = torch.Generator().manual_seed(7)
    steps = {k: torch.randn(x.shape, generator=generator).double() for k, x in inputs.items()}

    def moved_along(name, t, values=inputs):
        return values | {name: values[name] + t * steps[name]}

    effective = []
    for name in inputs:

        def first(t, name=name):
            return total(**moved_along(name, t))

        found = [unless_refused(way, first) for way in MODES + TRANSFORMS]
        if found[0] is None:
            assert name != "prediction"
            assert set(found) == {None}
            continue
        stopped = name == "prediction" and loss in [*STOPPED.values(), *PROJECTED.values()]
        expected = found[0] if stopped else float(differences(first, 0 * UNIT))
        assert found == pytest.approx([expected] * len(found), rel=1e-6, abs=1e-8)
        if name in ("prediction", "target") or name in loss.requires:
            effective.append(name)
    assert effective[0] == "prediction"

    for one, other in combinations_with_replacement(effective, 2):

        def second(t, u, one=one, other=other):
            return total(**moved_along(one, t, moved_along(other, u)))

        expected = differences(
            lambda u, f=second: reverse_mode(lambda t: f(t, u), 0 * UNIT).detach(), 0 * UNIT
        )
        for outer, inner in TWICE:
            found = unless_refused(
                outer, lambda u, f=second, way=inner: way(lambda t: f(t, u), 0 * UNIT)
            )
            assert found is None or found == pytest.approx(float(expected), rel=1e-5, abs=1e-7)


@over(EVERY_TERM)
def test_gradient_is_finite_everywhere(loss):
    """Coincident atoms, one atom, two atoms, none, planar and linear, and NaN at padding."""
    nan = [torch.nan] * 3
    target = torch.tensor(
        [
            [[0.0, 0, 0], [1, 0, 0], [2, 0, 0]],
            [[1, 2, 3], nan, nan],
            [[0, 0, 0], [0, 0, 1.1], nan],
            [[0, 0, 0], [0, 1, 0], [1, 0, 0]],
            [nan, nan, nan],
        ]
    )
    mask = ~target.isnan().any(-1)
    for prediction in (torch.zeros_like(target), target, torch.flip(target, [1]).nan_to_num(2.0)):
        prediction = torch.where(mask[..., None], prediction, torch.nan).requires_grad_()
        loss_ = value(loss, prediction, target, mask)
        assert torch.isfinite(loss_).all()
        loss_.sum().backward()
        assert torch.isfinite(prediction.grad).all()
        assert (prediction.grad[~mask] == 0).all()


# Symmetries of coincident atoms are not searched for, and 1/d³ is infinite.
@over({k: v for k, v in EVERY_TERM.items() if "symmetrized" not in k and "callable" not in k})
def test_gradient_is_finite_where_atoms_of_the_data_coincide(loss):
    target = torch.zeros(1, 9, 3)
    prediction = torch.randn(1, 9, 3, requires_grad=True)
    mask = torch.ones(1, 9, dtype=torch.bool)
    value(loss, prediction, target, mask).sum().backward()
    assert torch.isfinite(prediction.grad).all()


@over(ALL_LOSSES)
@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_any_dimension(loss, dimension):
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(2, 8, dimension, generator=generator).double()
    target = target + torch.arange(8)[:, None]
    noise = torch.randn(target.shape, generator=generator).double()
    prediction = (target + 0.1 * noise).requires_grad_()
    extras = {
        "features": torch.randn(2, 8, 3).double(),
        "bonds": torch.ones(2, 8, 8),
        "noisy": target + noise,
        "noise_level": torch.ones(2).double(),
    }
    assert (loss(target, target, **extras) < 1e-20).all()
    if loss in DIFFERENTIABLE.values():
        assert torch.autograd.gradcheck(lambda x: loss(x, target, **extras), prediction)


@over(EVERY_TERM)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_precisions(pair, loss, dtype):
    prediction, target, mask = pair
    extras = inputs_of(target, mask)
    exact = value(loss, prediction.to(dtype).double(), target.to(dtype).double(), mask, extras)
    position = prediction.to(dtype).clone().requires_grad_()
    got = value(loss, position, target.to(dtype), mask, extras)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-6)
    got.sum().backward()
    assert position.grad.dtype == dtype
    assert torch.isfinite(position.grad).all()


@over(EVERY_TERM)
def test_autocast_changes_nothing(pair, loss):
    prediction, target, mask = (x.float() if x.is_floating_point() else x for x in pair)
    expected = value(loss, prediction, target, mask)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(value(loss, prediction, target, mask), expected)


@over(EVERY_TERM)
def test_degree(pair, loss):
    """Twice a small displacement gives 2^degree times the loss."""
    prediction, target, mask = pair
    step = prediction - target
    near = value(loss, target + 1e-5 * step, target, mask)
    far = value(loss, target + 2e-5 * step, target, mask)
    torch.testing.assert_close(
        far / near, torch.full_like(near, 2.0**loss.degree), rtol=1e-3, atol=0
    )


@over(ENERGIES)
@pytest.mark.parametrize("mirror", [1, -1])
def test_energy_is_invariant_in_both_arguments(pair, loss, mirror):
    prediction, target, mask = pair
    extras = inputs_of(target, mask)
    expected = value(loss, prediction, target, mask, extras)
    torch.testing.assert_close(
        value(loss, moved(prediction, mirror), target, mask, extras), expected
    )
    torch.testing.assert_close(
        value(loss, prediction, moved(target, mirror), mask, extras), expected
    )
    assert value(loss, moved(target, mirror), target, mask, extras).max() < 1e-20


def test_kabsch_knows_a_mirror_image(pair):
    prediction, target, mask = pair
    loss = ALL_LOSSES["kabsch"]
    expected = loss(prediction, target, mask)
    torch.testing.assert_close(loss(moved(prediction), target, mask), expected)
    torch.testing.assert_close(loss(prediction, moved(target), mask), expected)
    assert loss(moved(target), target, mask).max() < 1e-20
    chiral = mask.sum(1) > 4
    assert (loss(moved(target, -1), target, mask)[chiral] > 1e-3).all()


@over(TERMS)
def test_terms_know_a_mirror_image_and_no_other_motion(pair, loss):
    """Of molecules that are not planar; the energy does not know it."""
    prediction, target, mask = pair
    extras = inputs_of(target, mask)
    expected = value(loss, prediction, target, mask, extras)
    torch.testing.assert_close(value(loss, moved(prediction), target, mask, extras), expected)
    torch.testing.assert_close(value(loss, prediction, moved(target), mask, extras), expected)
    assert value(loss, moved(target), target, mask, extras).max() < 1e-20
    assert (value(loss, moved(target, -1), target, mask, extras) > 1e-3).all()
    assert ALL_LOSSES["energy-exponential-complete"](moved(target, -1), target, mask).max() < 1e-20


@over(PROJECTED)
def test_projected_terms_know_motions_of_one_argument_only(pair, loss):
    prediction, target, mask = pair
    extras = inputs_of(target, mask)
    expected = value(loss, prediction, target, mask, extras)
    both = value(loss, moved(prediction), moved(target), mask, extras)
    torch.testing.assert_close(both, expected)
    assert (value(loss, moved(target), target, mask, extras) > 1e-3).all()
    shifted = value(loss, prediction + 7, target, mask, extras)
    torch.testing.assert_close(shifted, expected)


@over(TERMS | PROJECTED)
def test_terms_do_not_depend_on_the_order_of_atoms(pair, loss):
    prediction, target, mask = pair
    extras = inputs_of(target, mask)
    expected = value(loss, prediction, target, mask, extras)
    order = torch.randperm(mask.shape[1], generator=torch.Generator().manual_seed(5))
    bonds = extras["bonds"][:, order][:, :, order]
    got = loss(prediction[:, order], target[:, order], mask[:, order], bonds=bonds)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["mse", "mae"])
def test_errors_in_space_know_every_motion(pair, name):
    _, target, mask = pair
    assert (ALL_LOSSES[name](moved(target), target, mask) > 1e-3).all()


# Configurations whose symmetries are known: name, points, order of the group on the points.
ANGLES = 2 * np.pi * np.arange(6) / 6
RING = np.stack([np.cos(ANGLES), np.sin(ANGLES), 0 * ANGLES], axis=1)
TETRAHEDRON = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 3**0.5
CORNERS = np.stack(np.meshgrid([0.0, 1], [0.0, 1], [0.0, 1]), axis=-1).reshape(-1, 3)
SYMMETRIC = {
    "methane": (np.concatenate([np.zeros((1, 3)), 1.09 * TETRAHEDRON]), 24),
    "benzene": (np.concatenate([1.39 * RING, 2.48 * RING]), 12),
    "cube": (CORNERS, 48),
}


@cache
def group_of(name):
    return permutations_of(SYMMETRIC[name][0])


def permutations_of(points):
    """All symmetries by brute force over the images of four points, with their permutations."""
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    base = list(range(min(4, len(points))))
    found = set()
    for image in permutations(range(len(points)), len(base)):
        if np.abs(distances[np.ix_(image, image)] - distances[np.ix_(base, base)]).max() > 1e-6:
            continue
        # Each further point is where its distances to the base are; extend point by point.
        partial = [list(image)]
        for i in range(len(base), len(points)):
            partial = [
                [*p, j]
                for p in partial
                for j in range(len(points))
                if j not in p and np.abs(distances[j, p] - distances[i, :i]).max() < 1e-6
            ]
        found.update(map(tuple, partial))
    return np.array(sorted(found))


@pytest.mark.parametrize("name", SYMMETRIC)
@over({k: v for k, v in ENERGIES.items() if not re.search("sparse|features|noisy", k)})
def test_energy_is_invariant_under_symmetries_of_the_data_only(loss, name):
    """Proposition 4.2: under Aut(k) ∩ Aut(Δ); other permutations of atoms change the energy."""
    points, order = SYMMETRIC[name]
    group = group_of(name)
    assert len(group) == order
    target = torch.from_numpy(points)[None].double()
    prediction = target + 0.2 * torch.randn(
        target.shape, generator=torch.Generator().manual_seed(2)
    )
    mask = torch.ones(target.shape[:2], dtype=torch.bool)
    level = torch.full((1,), 0.5, dtype=torch.float64)
    extras = {"bonds": torch.cdist(target, target) < 1.5, "noise_level": level}
    expected = loss(prediction, target, mask, **extras)
    images = prediction[0][torch.from_numpy(group)]
    many = {"bonds": extras["bonds"].expand(order, -1, -1), "noise_level": level.expand(order)}
    got = loss(images, target.expand(order, -1, -1), mask.expand(order, -1), **many)
    torch.testing.assert_close(got, expected.expand(order))
    others = np.array(
        [
            p
            for p in np.random.default_rng(0).permuted(
                np.tile(np.arange(len(points)), (20, 1)), axis=1
            )
            if tuple(p) not in set(map(tuple, group))
        ]
    )
    images = prediction[0][torch.from_numpy(others)]
    count = len(others)
    many = {"bonds": extras["bonds"].expand(count, -1, -1), "noise_level": level.expand(count)}
    got = loss(images, target.expand(len(others), -1, -1), mask.expand(len(others), -1), **many)
    assert ((got - expected).abs() > 1e-3 * expected).all()


def test_sparse_energy_is_not_invariant_under_symmetries_but_its_average_is():
    """The reason for symmetrized edges."""
    points, order = SYMMETRIC["cube"]
    target = torch.from_numpy(points)[None].double()
    prediction = target + 0.2 * torch.randn(
        target.shape, generator=torch.Generator().manual_seed(2)
    )
    images = prediction[0][torch.from_numpy(group_of("cube"))]
    sparse = PairwiseEnergy("constant", 1.0, SparseEdges(pool=1))
    values = sparse(images, target.expand(order, -1, -1))
    assert values.std() > 0.01 * values.mean()
    average = PairwiseEnergy("constant", 1.0, SymmetrizedEdges(pool=1))
    torch.testing.assert_close(average(prediction, target)[0], values.mean())


def minimise(loss, target, start, mask, extras):
    if "neighbours" in loss.requires:
        extras = extras | {"neighbours": loss.prepare_neighbours(target, mask)}
    position = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [position], max_iter=2000, max_eval=4000, history_size=50, tolerance_grad=1e-11,
        tolerance_change=1e-14, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure():
        optimiser.zero_grad()
        energy = value(loss, position, target, mask, extras).sum()
        energy.backward()
        return energy

    optimiser.step(closure)
    return position.detach(), value(loss, position.detach(), target, mask, extras)


@pytest.mark.slow
@over(RIGID)
def test_minimisers_of_the_energy_are_images_of_the_data(pair, loss):
    """From a start nearby, descent ends where all distances agree (corollary 4.3)."""
    prediction, target, mask = (x[:2] for x in pair)
    start = torch.where(mask[..., None], prediction, 0)
    position, _ = minimise(loss, target, start, mask, inputs_of(target, mask))
    for k in range(2):
        n = int(mask[k].sum())
        torch.testing.assert_close(
            torch.pdist(position[k, :n]), torch.pdist(target[k, :n]), rtol=0, atol=2e-3
        )


@pytest.mark.slow
@pytest.mark.parametrize("edges", ["complete", "sparse", "symmetrized"])
def test_random_starts_end_at_images_of_the_data(molecules, edges):
    """Wherever the energy comes to zero, all pairs have the data's distances, joined or not."""
    target, mask = padded_batch(molecules.select(np.array([0, 900, 1500])))
    target = torch.where(mask[..., None], target, 0)
    starts = 8
    target, mask = target.repeat_interleave(starts, 0), mask.repeat_interleave(starts, 0)
    noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(4)).double()
    loss = PairwiseEnergy("constant", 1.0, EdgesConfig(kind=edges, pool=1).build(seed=0))
    found = 0
    for k in range(len(target)):  # one at a time: a line search is for one function
        one = slice(k, k + 1)
        position, energy = minimise(loss, target[one], 3 * noise[one], mask[one], {})
        if energy < 1e-10:
            found += 1
            n = int(mask[k].sum())
            torch.testing.assert_close(
                torch.pdist(position[0, :n]), torch.pdist(target[k, :n]), rtol=0, atol=1e-3
            )
    assert found >= len(target) // 4  # descent may end in a local minimum as well


def test_bonds_alone_leave_other_minima():
    """A graph that is not rigid: the energy is zero at a molecule turned about a bond."""
    target = torch.tensor([[[-1.0, 1, 0], [0, 0, 0], [1.5, 0, 0], [2.5, 1, 0]]]).double()
    turned = target.clone()
    turned[0, 3, 1] = -1
    bonds = torch.zeros(1, 4, 4)
    bonds[0, [0, 1, 2], [1, 2, 3]] = bonds[0, [1, 2, 3], [0, 1, 2]] = 1
    along = PairwiseEnergy("constant", edges="bonds")
    assert along(turned, target, bonds=bonds) < 1e-20
    assert PairwiseEnergy("constant")(turned, target) > 0.01


def test_mse_is_the_energy_of_springs_to_far_anchors(pair):
    """Springs from each atom to points far out on the axes: (d − d̂)² tends to the squared error."""
    prediction, target, mask = (x[:1] for x in pair)
    n = int(mask.sum())
    anchors = 1e7 * torch.eye(3, dtype=torch.float64)[None]
    held = torch.cat([target[:, :n], anchors], dim=1)
    predicted = torch.cat([prediction[:, :n], anchors], dim=1)
    bonds = torch.zeros(1, n + 3, n + 3)
    bonds[:, :n, n:] = 1
    bonds[:, n:, :n] = 1
    energy = PairwiseEnergy("constant", 1.0, "bonds")(predicted, held, bonds=bonds)
    squared = LOSSES["mse"](channels=1)(prediction, target, mask)
    torch.testing.assert_close(energy * (n + 3) / n, squared, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("name", "again"), CALLS)
class TestModels:
    def inputs(self, molecules, name, again, dtype=torch.float32):
        positions, mask = padded_batch(molecules.select(np.arange(0, 2000, 300)), dtype)
        torch.manual_seed(0)
        model = network(name, 32).to(dtype)
        return model, network_inputs(model, positions, mask, self_condition=again)

    def test_permuting_atoms_permutes_the_result(self, molecules, name, again):
        model, inputs = self.inputs(molecules, name, again)
        order = torch.randperm(inputs.mask.shape[1])

        def permuted(state):
            atoms = {domain: values[:, order] for domain, values in state.tensors.items()}
            values = {d: v[:, :, order] if d == "pair" else v for d, v in atoms.items()}
            return State(state.layout, state.mask[:, order], values)

        moved = inputs.map(permuted)._replace(mask=inputs.mask[:, order])
        for ours, expected in alike(model(*moved), permuted(model(*inputs))):
            torch.testing.assert_close(ours, expected)

    def test_padding_has_no_effect(self, molecules, name, again):
        model, inputs = self.inputs(molecules, name, again)
        together = model(*inputs)
        assert_zero_outside(together)
        for k, n in enumerate(inputs.mask.sum(dim=1).tolist()):
            alone = inputs.select(slice(k, k + 1), n)
            part = inputs._replace(state=together).select(slice(k, k + 1), n).state
            for ours, expected in alike(part, model(*alone)):
                torch.testing.assert_close(ours, expected)

    def test_positions_have_zero_mean(self, molecules, name, again):
        model, inputs = self.inputs(molecules, name, again)
        sums = model(*inputs)["positions"].sum(dim=1)
        torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-5)

    def test_pairs_are_symmetric(self, molecules, name, again):
        model, inputs = self.inputs(molecules, name, again)
        result = model(*inputs)
        for field in model.layout.fields.values():
            if field.projection == "symmetric":
                assert torch.equal(result[field.name], result[field.name].transpose(1, 2))

    def test_gradient_is_finite(self, molecules, name, again):
        model, inputs = self.inputs(molecules, name, again)
        sum(values.square().sum() for values in model(*inputs).tensors.values()).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.isfinite(grad).all() for grad in grads)

    def test_gradient_is_finite_at_coincident_atoms(self, molecules, name, again):
        model, inputs = self.inputs(molecules, name, again)
        for state in (inputs.state, inputs.self_condition):
            if state is not None:
                state.atoms[:, 1, :3] = state.atoms[:, 0, :3]
        atoms = torch.nan_to_num(inputs.state.atoms).requires_grad_()
        result = model(*inputs._replace(state=inputs.state.with_atoms(atoms)))
        sum(values.square().sum() for values in result.tensors.values()).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert all(torch.isfinite(grad).all() for grad in [*grads, atoms.grad])

    def test_low_precision_is_the_same_function(self, molecules, name, again):
        model, inputs = self.inputs(molecules, name, again)
        exact = model(*inputs)
        model.low_precision = True
        for rough, expected in alike(model(*inputs), exact):
            assert rough.dtype == torch.float32
            assert (rough - expected).norm() / expected.norm() < 0.02

    @pytest.mark.parametrize("mirror", [1, -1])
    def test_equivariant_or_not(self, molecules, name, again, mirror):
        """In float64 at random weights, large ones too: a motion of the input is one of the output.

        A model that does not claim it must not have it either.
        """
        model, inputs = self.inputs(molecules, name, again, torch.float64)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        rotation = mirror * torch.from_numpy(Rotation.random(random_state=3).as_matrix())

        def turned(state):
            return state.replace(positions=state["positions"] @ rotation.T)

        def moved(state):
            shift = torch.tensor([1.0, -2.0, 3.0])
            return turned(state).replace(positions=turned(state)["positions"] + shift)

        result, expected = model(*inputs.map(moved)), turned(model(*inputs))
        errors = [
            (ours - others).norm() / others.norm() for ours, others in alike(result, expected)
        ]
        error = float(max(errors).detach())
        assert error < 1e-11 if model.equivariant else error > 1e-3

    @pytest.mark.parametrize("atoms", [1, 2])
    def test_few_atoms(self, name, again, atoms):
        torch.manual_seed(0)
        model, mask = network(name, 32), torch.ones(1, atoms, dtype=torch.bool)
        positions = torch.randn(1, atoms, 3)
        result = model(*network_inputs(model, positions, mask, self_condition=again))
        assert all(torch.isfinite(values).all() for values in result.tensors.values())


def assert_zero_outside(state: State):
    for domain, values in state.tensors.items():
        inside = {"atom": state.mask, "pair": pairs_inside(state.mask)}[domain]
        assert (values[~inside] == 0).all()


class BestNoise:
    """The best network for known data, when it predicts noise."""

    def __init__(self, process):
        self.process = process
        self.last = 0.006 if process.continuous else float(process.schedule.sigma2[0].sqrt())
        # The noise that is left in a sample.

    def level(self, time):
        step = time if self.process.continuous else (time * self.process.steps).round().long()
        return self.process.alpha(step)[:, None, None], self.process.sigma(step)[:, None, None]

    def of_point(self, noisy, time, clean):
        alpha, sigma = self.level(time)
        return (noisy - alpha * clean) / sigma

    def of_spread(self, noisy, time, spread):
        alpha, sigma = self.level(time)
        return sigma / (alpha**2 * spread**2 + sigma**2) * noisy


class BestVelocity:
    """The same when it predicts the velocity ε − x of a flow."""

    last = 1e-5

    def __init__(self, process):
        pass

    def of_point(self, noisy, time, clean):
        return (noisy - clean) / time[:, None, None]

    def of_spread(self, noisy, time, spread):
        t = time[:, None, None]
        return (t - (1 - t) * spread**2) / ((1 - t) ** 2 * spread**2 + t**2) * noisy


BEST = {"diffusion": BestNoise, "flow_matching": BestVelocity, "cosine": BestNoise}
PREDICTED = {"diffusion": "noise", "flow_matching": "velocity", "cosine": "noise"}


class Interacting:
    """A network of forces between atoms: equivariant, not linear, and NaN at padding."""

    def __call__(self, state, time, mask, condition, self_condition):
        positions, features = state["positions"], state["features"]
        arrows = positions[:, :, None] - positions[:, None]
        pairs = (mask[:, :, None] & mask[:, None])[..., None]
        alike = (features[:, :, None] * features[:, None]).sum(-1, keepdim=True).tanh()
        strength = (alike - arrows.square().sum(-1, keepdim=True)).exp().clamp(max=3)
        forces = torch.where(pairs, strength * arrows, 0).sum(2) + 0.5 * positions
        inputs = torch.where(pairs, strength * features[:, None], 0).sum(2) + 0.5 * features
        output = torch.cat([forces, inputs], dim=-1) * (1 - 0.5 * time[:, None, None])
        centre = torch.where(mask[..., None], output, 0)[..., :3].sum(1, keepdim=True)
        output[..., :3] -= centre / mask.sum(1)[:, None, None]
        return state.with_atoms(torch.where(mask[..., None], output, torch.nan))


class MovedNoise(RandomNumbers):
    """The noise of atoms that were given other numbers, in space that was turned; in float64."""

    def __init__(self, numbers, order=None, rotation=None):
        super().__init__(7, numbers)
        self.order, self.rotation = order, rotation

    def _normal(self, *arguments):
        noise = super()._normal(*arguments).double()
        if self.order is not None:
            noise = noise[:, self.order]
        if self.rotation is not None:
            noise = torch.cat([noise[..., :3] @ self.rotation.T, noise[..., 3:]], dim=-1)
        return noise


SERVED = [(process, name) for name, kind in SAMPLERS.items() for process in kind.processes]


@pytest.mark.parametrize(("process", "name"), SERVED)
@pytest.mark.parametrize("steps", [None, 12])
class TestSamplers:
    def test_the_exact_network_gives_the_data(self, molecules, process, name, steps):
        """For data of a single point the best prediction is known; it leads to the point."""
        positions, mask = padded_batch(molecules.select(np.array([3, 700])), torch.float32)
        clean = torch.where(mask[..., None], torch.cat([positions, positions * 0.1], dim=-1), 0)
        centre = clean[..., :3].sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        clean[..., :3] = torch.where(mask[..., None], clean[..., :3] - centre, 0)
        trained_with = PROCESSES[process](100, prediction=PREDICTED[process])
        best = BEST[process](trained_with)
        drawn = build_sampler(trained_with, name, steps).sample(
            lambda x, time, *rest: x.with_atoms(best.of_point(x.atoms, time, clean)),
            RandomNumbers(0, torch.arange(2)), layout_of(3), mask,
        ).atoms  # fmt: skip
        assert (drawn - clean).abs().max() < 6 * best.last
        assert (drawn != clean).any()  # it is drawn, not copied

    def test_gaussian_data_keep_their_spread(self, process, name, steps):
        """For normal data of spread s the best prediction is linear; samples have spread s."""
        spread, trained_with = 0.5, PROCESSES[process](200, prediction=PREDICTED[process])
        mask = torch.ones(400, 10, dtype=torch.bool)
        best = BEST[process](trained_with)
        drawn = build_sampler(trained_with, name, steps).sample(
            lambda x, time, *rest: x.with_atoms(best.of_spread(x.atoms, time, spread)),
            RandomNumbers(1, torch.arange(400)), layout_of(2), mask,
        ).atoms  # fmt: skip
        # positions live on the zero-mean subspace: 9 of 10 atoms are free
        free = (drawn[..., :3].square().sum(1) / 9).mean().sqrt()
        near = 0.03 if steps is None else 0.4  # twelve steps are rough
        assert float(free) == pytest.approx(spread, rel=near)
        assert float(drawn[..., 3:].std()) == pytest.approx(spread, rel=near)

    def drawn(self, process, name, steps, mask, random):
        sampler = build_sampler(PROCESSES[process](30), name, steps)
        return sampler.sample(Interacting(), random, layout_of(3), mask).atoms

    def mask(self):
        return torch.arange(7)[None] < torch.tensor([7, 4, 1])[:, None]

    def test_permuted_atoms_are_drawn_permuted(self, process, name, steps):
        mask, numbers = torch.ones(3, 7, dtype=torch.bool), torch.arange(3)
        order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
        straight = self.drawn(process, name, steps, mask, MovedNoise(numbers))
        permuted = self.drawn(process, name, steps, mask, MovedNoise(numbers, order))
        torch.testing.assert_close(permuted, straight[:, order])

    def test_turned_noise_gives_turned_molecules(self, process, name, steps):
        rotation = -torch.from_numpy(Rotation.random(random_state=1).as_matrix())
        numbers = torch.arange(3)
        straight = self.drawn(process, name, steps, self.mask(), MovedNoise(numbers))
        turned = MovedNoise(numbers, rotation=rotation)
        turned = self.drawn(process, name, steps, self.mask(), turned)
        torch.testing.assert_close(turned[..., :3], straight[..., :3] @ rotation.T)
        torch.testing.assert_close(turned[..., 3:], straight[..., 3:])

    def test_padding_has_no_effect(self, process, name, steps):
        mask = self.mask()
        together = self.drawn(process, name, steps, mask, MovedNoise(torch.arange(3)))
        assert (together[~mask] == 0).all()
        for k, size in enumerate((7, 4, 1)):
            alone = self.drawn(
                process, name, steps, mask[k : k + 1, :size], MovedNoise(torch.tensor([k]))
            )
            torch.testing.assert_close(together[k : k + 1, :size], alone)

    def test_positions_have_zero_mean(self, process, name, steps):
        mask = self.mask()
        drawn = self.drawn(process, name, steps, mask, MovedNoise(torch.arange(3)))
        assert drawn[..., :3].abs().max() > 0.01
        assert drawn[..., :3].sum(1).abs().max() < 1e-9


@pytest.mark.parametrize("name", SPIN_MODELS)
def test_networks_on_a_torus_follow_translations(name):
    """A periodic lattice that is shifted gets the shifted output; an open one has a place."""
    torch.manual_seed(0)
    couplings = torch.rand(3, 2, 8, 8, dtype=torch.float64) * 2 - 1
    moved = couplings.roll((3, -2), (2, 3))
    section = SPIN_MODELS[name].Config(layers=3, width=8)
    torus = section.build(2, periodic=True).double()
    torch.testing.assert_close(torus(moved), torus(couplings).roll((3, -2), (1, 2)))
    flat = section.build(2, periodic=False).double()
    assert not torch.allclose(flat(moved), flat(couplings).roll((3, -2), (1, 2)))


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        *(
            (m.Config(layers=3, width=8).build(2, False), (6, 2, 8, 8))
            for m in SPIN_MODELS.values()
        ),
        *((m.Config().build(1, 5, 2), (6, 1)) for m in SHAPE_MODELS.values()),
    ],
    ids=[*SPIN_MODELS, *SHAPE_MODELS],
)
def test_networks_know_nothing_of_the_rest_of_a_batch(model, shape):
    model = model.double()
    inputs = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in range(len(inputs)):
        torch.testing.assert_close(model(inputs)[k], model(inputs[k : k + 1])[0])
    for parameter in model.parameters():
        parameter.grad = None
    model(inputs).square().sum().backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in model.parameters())
