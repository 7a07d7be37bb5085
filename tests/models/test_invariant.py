"""The invariant network: laws of physics, and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from molgen_energy.models.base import pair_mask
from molgen_energy.models.invariant import InvariantConfig, InvariantNetwork

ATOMS = (5, 9, 1, 12)


@pytest.fixture
def network() -> InvariantNetwork:
    torch.manual_seed(0)
    model = InvariantConfig(layers=2, width=16).build(4, 3).double()
    for parameter in model.parameters():  # the last layers start at zero
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Elements, positions and mask of molecules of several sizes, with NaN at padding."""
    random = torch.Generator().manual_seed(1)
    mask = torch.arange(max(ATOMS)) < torch.tensor(ATOMS)[:, None]
    elements = torch.randint(0, 4, mask.shape, generator=random)
    positions = 2 * torch.randn((*mask.shape, 3), generator=random, dtype=torch.float64)
    positions[~mask], elements[~mask] = torch.nan, -7
    return elements, positions, mask


def test_rigid_motions_and_reflections_change_nothing(network, batch):
    elements, positions, mask = batch
    found = network(elements, positions, mask)
    random = torch.Generator().manual_seed(2)
    turned, _ = torch.linalg.qr(torch.randn(3, 3, generator=random, dtype=torch.float64))
    for sign in (1, -1):
        moved = positions @ (sign * turned) + torch.tensor([3.0, -1.0, 7.0])
        torch.testing.assert_close(network(elements, moved, mask), found, rtol=1e-7, atol=1e-7)
    assert not torch.allclose(network(elements, 1.01 * positions, mask)[1], found[1])


def test_order_padding_and_batch_change_nothing(network, batch):
    elements, positions, mask = batch
    found = network(elements, positions, mask)
    for k, size in enumerate(ATOMS):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(k))
        alone = network(elements[k, order][None], positions[k, order][None], mask[k, order][None])
        torch.testing.assert_close(alone[0], found[k])


def test_a_layer_is_its_equation(network):
    """Messages, gates and vectors of each pair of atoms, by loops."""
    layer, count, width = network.layers[0], 4, 16
    random = torch.Generator().manual_seed(3)
    h = torch.randn(1, count, width, generator=random, dtype=torch.float64)
    features = torch.randn(1, count, count, 18, generator=random, dtype=torch.float64)
    units = F.normalize(
        torch.randn(1, count, count, 3, generator=random, dtype=torch.float64), dim=-1
    )
    pairs = pair_mask(torch.ones(1, count, dtype=torch.bool), torch.float64)
    found, vectors = layer(h, pairs, features, units * pairs[..., None])
    x = F.rms_norm(h, (width,))[0]
    net = layer.pairs
    for i in range(count):
        total, vector = torch.zeros(width), torch.zeros(8, 3)
        for j in range(count):
            if i == j:
                continue
            first = net.receiver(x[i]) + net.sender(x[j]) + net.feature(features[0, i, j])
            message = F.silu(net.linear(F.silu(first)))
            numbers = net.read(message)
            total = total + torch.sigmoid(numbers[0]) * message
            vector = vector + numbers[1:, None] * units[0, i, j]
        total, vector = total / 5, vector / 5
        torch.testing.assert_close(vectors[0, i], vector)
        inputs = torch.cat([x[i], total, (vector @ vector.T).flatten()])
        change = layer.update_out(F.silu(layer.update_in(inputs)))
        torch.testing.assert_close(found[0, i], h[0, i] + change)


def test_gradients_are_finite_where_atoms_coincide(network, batch):
    elements, positions, mask = batch
    positions = torch.nan_to_num(positions)
    positions[0, 1] = positions[0, 0]
    positions.requires_grad_()
    network(elements, positions, mask).sum().backward()
    assert torch.isfinite(positions.grad).all()
    assert all(bool(torch.isfinite(p.grad).all()) for p in network.parameters())
    assert all(bool(p.grad.abs().sum() > 0) for p in network.parameters())


def test_the_linear_part_is_least_squares(rng):
    """Of molecules without a missing value, also where elements go together."""
    counts = rng.integers(0, 5, (40, 3))
    counts[:, 2] = counts[:, 1]  # no unique solution
    values = counts @ rng.normal(size=(3, 2)) + rng.normal(size=(40, 2))
    values[3, 0] = np.nan
    network = InvariantNetwork(3, 2, layers=1, width=4)
    network.fit(torch.from_numpy(counts), torch.from_numpy(values))
    rows = np.c_[counts, np.ones(40)]
    for k in range(2):
        known = np.isfinite(values[:, k])
        solution = np.linalg.lstsq(rows[known], values[known, k], rcond=None)[0]
        rest = values[known, k] - rows[known] @ solution
        np.testing.assert_allclose(rows @ network.composition[:, k].numpy(), rows @ solution,
            rtol=1e-5, atol=1e-5)  # fmt: skip
        assert float(network.scale[k]) == pytest.approx(rest.std(), rel=1e-5)
