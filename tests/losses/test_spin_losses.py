"""Losses on spins, against all configurations of small lattices."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from molgen_energy.losses import (
    SPIN_LOSSES,
    CrossEntropy,
    LocalField,
    Margin,
    Neighbours,
    TrueEnergy,
    lattice_couplings,
)

SIZE = 3
SITES = SIZE * SIZE
ALL = {name: loss() for name, loss in SPIN_LOSSES.items()}
LABELLED = {name: loss for name, loss in ALL.items() if name != "true_energy"}


def over(losses):
    return pytest.mark.parametrize("loss", losses.values(), ids=losses)


def matrix(table, sample=0):
    """Couplings (N, N) of a table."""
    dense = torch.zeros(table.index.shape[1], table.index.shape[1], dtype=table.weight.dtype)
    rows = torch.arange(len(dense))[:, None].expand_as(table.index[sample])
    dense.index_put_((rows, table.index[sample]), table.weight[sample], accumulate=True)
    return dense


@pytest.fixture(scope="module", params=[False, True], ids=["open", "periodic"])
def glass(request):
    """Couplings of 4 lattices, their matrices, and all configurations with their energies."""
    generator = torch.Generator().manual_seed(0)
    right, down = (2 * torch.rand(2, 4, SIZE, SIZE, generator=generator) - 1).double()
    table = lattice_couplings(right, down, periodic=request.param)
    dense = torch.stack([matrix(table, k) for k in range(4)])
    configurations = torch.tensor(list(product([-1.0, 1], repeat=SITES))).double()
    energies = -0.5 * torch.einsum("ci,bij,cj->bc", configurations, dense, configurations)
    ground = configurations[energies.argmin(dim=1)]
    ground = ground * ground[:, :1]  # one gauge: the first spin is up
    return table, dense, configurations, energies, ground[..., None]


def test_lattice_couplings():
    """Against couplings written into a matrix one by one."""
    generator = torch.Generator().manual_seed(0)
    right, down = torch.rand(2, 1, 4, 4, generator=generator)
    for periodic in (False, True):
        expected = torch.zeros(16, 16)
        for r, c in product(range(4), repeat=2):
            for other, coupling in (((r, c + 1), right), ((r + 1, c), down)):
                if periodic or max(other) < 4:
                    i, j = 4 * r + c, 4 * (other[0] % 4) + other[1] % 4
                    expected[i, j] = expected[j, i] = coupling[0, r, c]
        found = matrix(lattice_couplings(right, down, periodic))
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="couples two sites twice"):
        lattice_couplings(right[:, :2, :2], down[:, :2, :2], periodic=True)


@over(ALL)
def test_gradient_against_finite_differences(glass, loss):
    table, _, _, _, ground = glass
    logits = torch.randn(ground.shape, generator=torch.Generator().manual_seed(1)).double()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, ground, neighbours=table), logits)


@over(ALL)
def test_padding_packing_and_channels(glass, loss):
    table, _, _, _, ground = glass
    logits = torch.randn(4, SITES, 2, generator=torch.Generator().manual_seed(1)).double()
    spins = ground.expand(-1, -1, 2)
    expected = loss(logits, spins, neighbours=table)
    assert expected.shape == (4,)
    single = [loss(logits[..., [k]], ground, neighbours=table) for k in (0, 1)]
    torch.testing.assert_close(single[0] + single[1], expected)
    batch = torch.arange(4).repeat_interleave(SITES)
    index = table.index + SITES * torch.arange(4)[:, None, None]
    packed = Neighbours(index.flatten(0, 1), table.weight.flatten(0, 1))
    got = loss(logits.flatten(0, 1), spins.flatten(0, 1), batch=batch, neighbours=packed)
    torch.testing.assert_close(got, expected)

    def pad(values, fill):
        return torch.cat([values, torch.full_like(values[:, :3], fill)], dim=1)

    padded = Neighbours(
        torch.cat([table.index, torch.arange(9, 12)[None, :, None].expand(4, -1, 4)], dim=1),
        pad(table.weight, torch.nan),
    )
    mask = torch.arange(12).expand(4, -1) < SITES
    value = pad(logits, torch.nan).requires_grad_()
    got = loss(value, pad(spins, torch.nan), mask, neighbours=padded)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    assert torch.isfinite(value.grad).all()


@over(ALL)
def test_extreme_logits(glass, loss):
    """Confident to the last bit, right and wrong, values and gradients are finite."""
    table, _, _, _, ground = glass
    for scale in (0, 40, -40, 1e4, -1e4):
        logits = (scale * ground.float()).requires_grad_()
        value = loss(logits, ground.float(), neighbours=table)
        assert torch.isfinite(value).all()
        value.sum().backward()
        assert torch.isfinite(logits.grad).all()


@over(LABELLED)
def test_either_gauge(glass, loss):
    table, _, _, _, ground = glass
    either = type(loss)(either_gauge=True)
    logits = torch.randn(ground.shape, generator=torch.Generator().manual_seed(1)).double()
    straight = loss(logits, ground, neighbours=table)
    flipped = loss(logits, -ground, neighbours=table)
    assert (straight != flipped).all()
    for data in (ground, -ground):
        got = either(logits, data, neighbours=table)
        torch.testing.assert_close(got, torch.minimum(straight, flipped))


@over(LABELLED)
def test_either_gauge_can_leave_zero(glass, loss):
    """At z = 0 both gauges cost the same; a network that starts there must still learn."""
    table, _, _, _, ground = glass
    logits = torch.zeros_like(ground).requires_grad_()
    type(loss)(either_gauge=True)(logits, ground, neighbours=table).sum().backward()
    assert (logits.grad != 0).any()


@over(LABELLED)
def test_spins_may_be_integers(glass, loss):
    table, _, _, _, ground = glass
    logits = torch.randn(ground.shape, generator=torch.Generator().manual_seed(1)).double()
    expected = loss(logits, ground, neighbours=table)
    for dtype in (torch.int64, torch.int8):
        torch.testing.assert_close(loss(logits, ground.to(dtype), neighbours=table), expected)


@over(ALL)
def test_sure_logits_in_single_precision(glass, loss):
    """Where the network is sure, right or wrong, float32 has the gradient of float64."""
    table, _, _, _, ground = glass
    for scale in (9.0, -9.0, 14.0, -14.0):
        gradients = []
        for dtype in (torch.float32, torch.float64):
            logits = (scale * ground.to(dtype)).requires_grad_()
            loss(logits, ground.to(dtype), neighbours=table).sum().backward()
            gradients.append(logits.grad.double())
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-30)


def test_logits_without_a_channel_are_refused():
    for loss in ALL.values():
        with pytest.raises(ValueError, match=r"one channel is \[\.\.\., None\]"):
            loss(torch.zeros(2, 4), torch.ones(2, 4))


def kullback_leibler(logits, energies_of, temperature, configurations):
    """KL(q ‖ exp(−E/T)/Z) by summing over all configurations."""
    up = torch.sigmoid(2 * logits)
    log_q = torch.where(configurations > 0, up.log(), (1 - up).log()).sum(-1)
    log_p = torch.log_softmax(-energies_of / temperature, dim=0)
    return (log_q.exp() * (log_q - log_p)).sum()


@pytest.mark.parametrize("name", ["local_field", "true_energy"])
def test_is_the_reverse_divergence_but_for_the_partition_function(glass, name):
    """J = KL(q ‖ Boltzmann) − log Z, with both sums taken over all 512 configurations."""
    table, dense, configurations, energies, ground = glass
    temperature = 0.7
    logits = torch.randn(4, SITES, generator=torch.Generator().manual_seed(2)).double()
    if name == "local_field":
        loss = LocalField(offset=0.3, temperature=temperature)
        fields = torch.einsum("bij,bj->bi", dense, ground[..., 0]) + 0.3 * ground[..., 0]
        energies = -torch.einsum("ci,bi->bc", configurations, fields)
    else:
        loss = TrueEnergy(temperature)
    got = loss(logits[..., None], ground, neighbours=table)
    for k in range(4):
        divergence = kullback_leibler(logits[k], energies[k], temperature, configurations)
        partition = torch.logsumexp(-energies[k] / temperature, dim=0)
        torch.testing.assert_close(got[k], divergence - partition)


def test_cross_entropy_and_margin_are_their_formulas(glass):
    _, _, _, _, ground = glass
    logits = torch.randn(ground.shape, generator=torch.Generator().manual_seed(1)).double()
    up = torch.sigmoid(2 * logits)
    chance = torch.where(ground > 0, up, 1 - up)
    torch.testing.assert_close(CrossEntropy()(logits, ground), -chance.log().sum((1, 2)))
    hinge = (0.5 - ground * logits).clamp(min=0).sum((1, 2))
    torch.testing.assert_close(Margin(0.5)(logits, ground), hinge)


def local_field(means, spins, dense, offset, temperature=0.1):
    """The local-field energy as a function of the means m."""
    fields = dense @ spins + offset * spins
    up, down = (1 + means) / 2, (1 - means) / 2
    entropy = -(torch.xlogy(up, up) + torch.xlogy(down, down)).sum(-1)
    return -(fields * means).sum(-1) / temperature - entropy


@pytest.mark.parametrize("state", ["any", "ground"])
def test_local_field_is_convex_with_the_data_as_unique_minimum(glass, state):
    """For h⁰ > 4 at any configuration, for h⁰ > 0 at ground states."""
    table, dense, configurations, _, ground = glass
    offset = 4.01 if state == "any" else 0.01
    generator = torch.Generator().manual_seed(3)
    if state == "any":
        spins = configurations[torch.randint(512, (4,), generator=generator)]
    else:
        spins = ground[..., 0]
    loss = LocalField(offset)
    for k in range(4):
        fields = dense[k] @ spins[k] + offset * spins[k]
        assert (fields * spins[k] > 0).all()
        best = torch.tanh(fields / 0.1)
        assert torch.equal(best.sign(), spins[k])
        # the loss is this function of m, at the minimum and elsewhere
        logits = torch.randn(1, SITES, 1, generator=generator).double()
        one = Neighbours(table.index[[k]], table.weight[[k]])
        torch.testing.assert_close(
            loss(logits, spins[k][None, :, None], neighbours=one)[0],
            local_field(torch.tanh(logits[0, :, 0]), spins[k], dense[k], offset),
        )
        lowest = local_field(best, spins[k], dense[k], offset)
        ends = 2 * torch.rand(2, 200, SITES, generator=generator).double() - 1
        values = local_field(ends, spins[k], dense[k], offset)
        middle = local_field(ends.mean(0), spins[k], dense[k], offset)
        assert (values > lowest).all()
        assert (middle <= values.mean(0) + 1e-9).all()
    # descent on the logits, which are not convex, still ends at the data
    logits = torch.zeros(4, SITES, 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.05)
    for _ in range(800):
        optimiser.zero_grad()
        loss(logits, spins[..., None], neighbours=table).sum().backward()
        optimiser.step()
    assert torch.equal(logits.detach().sign()[..., 0], spins)


def test_local_field_fails_below_the_bound():
    """The bound is real: with h⁰ < 4 there are configurations that are not the minimum."""
    table = lattice_couplings(-torch.ones(1, 4, 4), -torch.ones(1, 4, 4), periodic=True)
    spins = torch.ones(1, 16, 1)  # all alike, where neighbours want to differ
    for offset, right in ((3.9, False), (4.1, True)):
        logits = torch.zeros(1, 16, 1, requires_grad=True)
        LocalField(offset)(logits, spins, neighbours=table).sum().backward()
        assert bool((-logits.grad * spins > 0).all()) is right


def test_true_energy_is_lowest_at_ground_states(glass):
    """At m = ±1 it is the energy over T; no confident configuration is below the ground state."""
    table, _, configurations, energies, ground = glass
    for k in range(4):
        one = Neighbours(
            table.index[[k]].expand(512, -1, -1), table.weight[[k]].expand(512, -1, -1)
        )
        logits = 50 * configurations[..., None]
        values = TrueEnergy(0.1)(logits, ground[[k]].expand(512, -1, -1), neighbours=one)
        torch.testing.assert_close(values, energies[k] / 0.1)


@pytest.mark.parametrize("name", ["local_field", "true_energy"])
def test_couplings_are_asked_for(name):
    with pytest.raises(ValueError, match="give neighbours"):
        ALL[name](torch.zeros(1, 4, 1), torch.ones(1, 4, 1))


def test_spin_losses_need_no_dense_matrix():
    """A lattice of 512 × 512 sites runs; its matrix of couplings would take half a terabyte."""
    size = 512
    right, down = torch.rand(2, 1, size, size)
    table = lattice_couplings(right, down)
    logits = torch.randn(1, size * size, 1)
    value = LocalField()(logits, torch.ones_like(logits), neighbours=table)
    assert np.isfinite(float(value))
