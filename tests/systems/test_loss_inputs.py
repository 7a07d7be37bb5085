"""Inputs of losses on molecules: bonds, features, symmetrized edges."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import dense_orders
from states import atoms_state, layout_of

from molgen_energy.data.batches import DeviceMolecules
from molgen_energy.data.molecules import Bonds, Molecules, offsets_from_sizes
from molgen_energy.errors import InputError
from molgen_energy.losses import EdgesConfig, EnergyConfig, KabschError, SpringsConfig
from molgen_energy.systems.molecules.loss_inputs import LossInputs, with_required_bonds

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def few(molecules) -> Molecules:
    return molecules.select(np.arange(0, 2000, 40))


def energy(family="exponential", edges="complete", distance="positions", **options):
    return EnergyConfig(
        springs=SpringsConfig(family=family, scale=1.0, distance=distance),
        edges=EdgesConfig(kind=edges, **options),
    )


def inputs_of(loss, molecules, which, seed=0, features=6, **options):
    """The inputs of a loss for some molecules, the batch, and its state."""
    molecules = with_required_bonds(molecules, loss.requires)
    batch = DeviceMolecules(molecules, CPU).batch(which)
    values = torch.zeros(*batch.mask.shape, 3 + features)
    state = atoms_state(layout_of(features), batch.mask, values)
    return (
        LossInputs(loss, loss.requires, seed, molecules, CPU, **options).of(which, batch, state),
        batch,
        state,
    )


def dense(bonds, batch):
    """Bonds (B, N, N) of an edge list (3, E) and its reverse."""
    found = torch.zeros(*batch.mask.shape, batch.mask.shape[1], dtype=torch.bool)
    molecule, i, j = bonds
    found[molecule, i, j] = found[molecule, j, i] = True
    return found


def test_only_required_inputs_are_made(few):
    which = np.array([0, 1, 2])
    for loss in (KabschError.Config(), energy(), energy(edges="sparse")):
        assert inputs_of(loss, few, which)[0].keys() == loss.requires - {"neighbours"} == set()
    found, _, state = inputs_of(energy(distance="features"), few, which)
    assert found.keys() == {"features"}
    assert torch.equal(found["features"], state.atoms[..., 3:])


@pytest.mark.parametrize("loss", [energy("lennard_jones"), energy(edges="bonds")])
def test_bonds_are_perceived_if_the_data_have_none(few, loss):
    which = np.array([7, 3, 12])
    positions, numbers = few.select(which).padded()
    found, batch, _ = inputs_of(loss, few, which)
    expected = torch.from_numpy(dense_orders(positions, numbers) > 0)
    assert torch.equal(dense(found["bonds"], batch), expected)
    assert expected.any()


def test_bonds_of_the_data_are_taken(few):
    """One bond in each molecule, from its first atom to its last."""
    last = (few.sizes - 1).astype(np.uint16)
    index = np.stack([np.zeros_like(last), last], axis=1)
    bonds = Bonds(index, np.ones(len(few), np.uint8), offsets_from_sizes(np.ones(len(few))))
    which = np.array([5, 0])
    found, batch, _ = inputs_of(energy("lennard_jones"), replace(few, bonds=bonds), which)
    atoms = int(few.sizes[which].max())
    expected = torch.zeros(2, atoms, atoms, dtype=torch.bool)
    for k, m in enumerate(which):
        expected[k, 0, few.sizes[m] - 1] = expected[k, few.sizes[m] - 1, 0] = True
    assert torch.equal(dense(found["bonds"], batch), expected)


def test_symmetrized_edges_of_a_batch_are_those_of_the_molecules(few):
    section = energy(edges="symmetrized", pool=7)
    loss = section.build(seed=2)
    seen = []
    which = np.array([30, 2, 41, 9])
    found, batch, _ = inputs_of(
        section, few, which, seed=2, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (len(few), len(few))
    target, mask = batch.data["positions"].double(), batch.mask
    prediction = target + 0.2 * torch.randn_like(target)
    edges = section.build_edges(2)
    expected = loss(
        prediction, target, mask, neighbours=edges.prepare_neighbours(target, mask, numbers=which)
    )
    torch.testing.assert_close(loss(prediction, target, mask, **found), expected)


def test_tables_take_the_place_that_each_molecule_needs(molecules):
    """Methane has 4 neighbours for each of 5 atoms, whatever the largest molecule needs."""
    some = molecules.select(np.r_[0:4, 1000:1040:8])
    section = energy(edges="symmetrized", pool=3)
    lists = LossInputs(section, section.requires, 1, some, CPU)._neighbours
    edges = section.build_edges(1)
    needed = 0
    for number in range(len(some)):
        positions = torch.from_numpy(some[number].positions)[None]
        table = edges.prepare_neighbours(positions, numbers=np.array([number]))
        needed += table.index[0].numel()
        found = lists.padded(np.array([number]), torch.ones(1, positions.shape[1], dtype=bool))
        assert torch.equal(found.index, table.index)
        torch.testing.assert_close(found.weight, table.weight)
    assert lists.index.numel() == lists.weight.numel() == needed
    assert needed < 0.8 * len(some) * some.sizes.max() * int(lists.widths.max())


def test_coincident_atoms_are_named():
    positions = np.array([[0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 1e-3], [1, 0, 0]], np.float32)
    pair = Molecules(positions, np.full(5, 6, np.uint8), np.array([0, 2, 5]))
    symmetrized = energy(edges="symmetrized")
    with pytest.raises(InputError, match=r"mine\.h5: molecule 2: two atoms are closer than"):
        LossInputs(symmetrized, symmetrized.requires, 0, pair, CPU, "mine.h5")


@pytest.mark.parametrize("edges", ["complete", "sparse", "symmetrized", "bonds"])
def test_single_atoms(edges):
    lonely = Molecules(np.zeros((2, 3), np.float32), np.full(2, 2, np.uint8), np.array([0, 1, 2]))
    section = energy("lennard_jones", edges)
    found, _, _ = inputs_of(section, lonely, np.array([1, 0]))
    value = section.build()(torch.ones(2, 1, 3), torch.zeros(2, 1, 3), **found)
    assert (value == 0).all()
