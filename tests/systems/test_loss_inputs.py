"""What losses on molecules are called with: bonds, features, symmetrized edges."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import dense_orders

from molgen_energy.data.molecules import Bonds, Molecules, offsets_from_sizes
from molgen_energy.errors import InputError
from molgen_energy.losses import KabschError, PairwiseEnergy, SymmetrizedEdges
from molgen_energy.systems.molecules.loss_inputs import LossInputs

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def few(molecules) -> Molecules:
    return molecules.select(np.arange(0, 2000, 40))


def test_only_what_is_asked_for(few):
    features = torch.zeros(3, 29, 6)
    which = np.array([0, 1, 2])
    for loss in (KabschError(), PairwiseEnergy(), PairwiseEnergy(edges="sparse")):
        assert LossInputs(loss, few, CPU).of(which, features) == {}
    loss = PairwiseEnergy(distance="features")
    assert LossInputs(loss, few, CPU).of(which, features)["features"] is features


@pytest.mark.parametrize("loss", [PairwiseEnergy("lennard_jones"), PairwiseEnergy(edges="bonds")])
def test_bonds_are_perceived_where_none_are_given(few, loss):
    inputs = LossInputs(loss, few, CPU)
    which = np.array([7, 3, 12])
    chosen = few.select(which)
    positions, numbers = chosen.padded()
    found = inputs.of(which, torch.zeros(*numbers.shape, 6))["bonds"]
    assert torch.equal(found, torch.from_numpy(dense_orders(positions, numbers) > 0))
    assert found.any()


def test_given_bonds_are_taken(few):
    """One bond in each molecule, from its first atom to its last."""
    last = (few.sizes - 1).astype(np.uint16)
    index = np.stack([np.zeros_like(last), last], axis=1)
    bonds = Bonds(index, np.ones(len(few), np.uint8), offsets_from_sizes(np.ones(len(few))))
    inputs = LossInputs(PairwiseEnergy("lennard_jones"), replace(few, bonds=bonds), CPU)
    which = np.array([5, 0])
    atoms = int(few.sizes[which].max())
    found = inputs.of(which, torch.zeros(2, atoms, 6))["bonds"]
    expected = torch.zeros(2, atoms, atoms, dtype=torch.bool)
    for k, m in enumerate(which):
        expected[k, 0, few.sizes[m] - 1] = expected[k, few.sizes[m] - 1, 0] = True
    assert torch.equal(found, expected)


def test_symmetrized_edges_of_a_batch_are_those_of_the_molecules(few):
    edges = SymmetrizedEdges(pool=7, seed=2)
    loss = PairwiseEnergy("exponential", 1.0, edges)
    seen = []
    inputs = LossInputs(loss, few, CPU, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(few), len(few))
    which = np.array([30, 2, 41, 9])
    positions, numbers = few.select(which).padded()
    target, mask = torch.from_numpy(positions).double(), torch.from_numpy(numbers > 0)
    prediction = target + 0.2 * torch.randn_like(target)
    table = inputs.of(which, torch.zeros(*numbers.shape, 6))["neighbours"]
    expected = loss(
        prediction, target, mask, neighbours=edges.prepare_neighbours(target, mask, numbers=which)
    )
    torch.testing.assert_close(loss(prediction, target, mask, neighbours=table), expected)


def test_coincident_atoms_are_named():
    positions = np.array([[0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1e-3], [1, 0, 0]], np.float32)
    pair = Molecules(positions, np.full(5, 6, np.uint8), np.array([0, 2, 5]))
    loss = PairwiseEnergy(edges="symmetrized")
    with pytest.raises(InputError, match=r"mine\.h5: molecule 2: two atoms are closer than"):
        LossInputs(loss, pair, CPU, "mine.h5")


@pytest.mark.parametrize("edges", ["complete", "sparse", "symmetrized", "bonds"])
def test_single_atoms(edges):
    lonely = Molecules(np.zeros((2, 3), np.float32), np.full(2, 2, np.uint8), np.array([0, 1, 2]))
    loss = PairwiseEnergy("lennard_jones", 1.0, edges)
    inputs = LossInputs(loss, lonely, CPU)
    given = inputs.of(np.array([1, 0]), torch.zeros(2, 1, 6))
    value = loss(torch.ones(2, 1, 3), torch.zeros(2, 1, 3), **given)
    assert (value == 0).all()
