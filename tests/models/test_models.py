"""The networks against their textbook formulas: a list of pairs, and PyTorch's own gradients."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import padded_batch
from states import layout_of, on_atoms
from torch import nn
from torch.nn import functional as F

from molgen_energy.models import EDM, GDM, MODELS, GDMPairs, pair_network
from molgen_energy.models.pair_network import PairNetwork


def on_pairs(network: PairNetwork, h_i, h_j, e_ij):
    """m = φ(h_i, h_j, e_ij) with the first layer in one piece, and the number read from it."""
    parts = [network.receiver.weight, network.sender.weight]
    if network.feature is not None:
        parts.append(network.feature.weight)
    joint = torch.cat(parts, dim=1)
    inputs = torch.cat([h_i, h_j, *([] if e_ij is None else [e_ij])], dim=1)
    hidden = F.silu(inputs @ joint.T + network.receiver.bias)
    message = F.silu(network.linear(hidden))
    return message, network.read(message)


def message_layer(layer, h, row, col, e_ij):
    message, number = on_pairs(layer.pairs, h[row], h[col], e_ij)
    gathered = torch.zeros_like(h).index_add(0, row, torch.sigmoid(number) * message)
    joint = torch.cat([h, gathered / layer.normalization], dim=1)
    return h + layer.update_out(F.silu(layer.update_in(joint)))


def timed(norm, h, time):
    scale, shift = norm.timed(time).chunk(2)
    return h / h.square().mean(dim=1, keepdim=True).sqrt() * (1 + scale) + shift


def with_distances(model: GDMPairs, noisy, time, row, col):
    """What `GDMPairs` makes of a molecule, before the mean is taken off."""
    log_ratio = torch.log(time / (1 - time))
    angles = log_ratio * torch.arange(1, 17) / 4
    time = F.silu(model.time.linear(torch.cat([angles.sin(), angles.cos(), time[None]])))
    relative = noisy[row, :3] - noisy[col, :3]
    d = torch.sqrt((relative**2).sum(dim=1, keepdim=True) + 1e-8)
    gaussians = [torch.exp(-((d - 0.5 - k / 2) ** 2) / (2 * 0.5**2)) for k in range(10)]
    e_ij = torch.cat([*gaussians, 1 / (1 + d), d / 5], dim=1)
    h = model.embed(noisy) + model.embed_time(time)
    for layer in model.layers:
        x = timed(layer.norm, h, time)
        message, numbers = on_pairs(layer.pairs, x[row], x[col], e_ij)
        vectors = numbers[:, 1:, None] * (relative / (1 + d))[:, None]
        sent = [torch.sigmoid(numbers[:, :1]) * message, vectors.flatten(1)]
        zeros = torch.zeros(len(h), sum(part.shape[1] for part in sent), dtype=h.dtype)
        gathered = zeros.index_add(0, row, torch.cat(sent, dim=1)) * layer.factor
        h = h + layer.update_out(F.silu(layer.update_in(torch.cat([x, gathered], dim=1))))
    return model.readout(timed(model.norm, h, time))


def textbook(model: nn.Module, noisy, time):
    """One molecule (N, 3+F) without padding, over the list of its ordered pairs."""
    atoms = len(noisy)
    row, col = torch.nonzero(~torch.eye(atoms, dtype=torch.bool), as_tuple=True)
    t = time.expand(atoms, 1)
    if isinstance(model, GDM):
        h = model.embed(torch.cat([noisy, t], dim=1))
        for layer in model.layers:
            h = message_layer(layer, h, row, col, None)
        result = model.readout(h)
        shift, features = result[:, :3], result[:, 3:]
    elif isinstance(model, GDMPairs):
        result = with_distances(model, noisy, time, row, col)
        shift, features = result[:, :3], result[:, 3:]
    else:
        x, h = noisy[:, :3], model.embed(torch.cat([noisy[:, 3:], t], dim=1))
        start = ((x[row] - x[col]) ** 2).sum(dim=1, keepdim=True)
        for layer in model.layers:
            relative = x[row] - x[col]
            square = (relative**2).sum(dim=1, keepdim=True)
            e_ij = torch.cat([square, start], dim=1)
            h = message_layer(layer.message, h, row, col, e_ij)
            _, number = on_pairs(layer.shift, h[row], h[col], e_ij)
            step = relative / (torch.sqrt(square + 1e-8) + 1) * torch.tanh(number) * 15.0
            x = x + torch.zeros_like(x).index_add(0, row, step) / layer.normalization
        shift, features = x - noisy[:, :3], model.readout(h)
    return torch.cat([shift - shift.mean(dim=0), features], dim=1)


def small(name, seed=0, **options):
    torch.manual_seed(seed)
    model = MODELS[name](layout_of(6), layers=2, width=12, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():  # so that EDM's shifts are not near zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture
def batch(molecules):
    positions, mask = padded_batch(molecules.select(torch.arange(0, 2000, 400).numpy()))
    torch.manual_seed(1)
    features = torch.randn(*mask.shape, 6).double()
    noisy = torch.cat([positions, torch.where(mask[..., None], features, torch.nan)], dim=-1)
    return noisy, torch.rand(len(mask)).double(), mask


# Blocks of all molecules, of several, of one, and of a part of one; with and without the memory
# that saves a product. Numbers in a block, and bytes that may be kept.
CUTS = [(1 << 18, 1 << 28), (12 * 29 * 29 * 2, 1 << 28), (12 * 29 * 8, 1 << 28), (12 * 29 * 8, 0)]


@pytest.mark.parametrize("normalization", [1.0, 7.0])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", MODELS)
def test_value_and_gradient_are_the_textbooks(monkeypatch, batch, name, cut, normalization):
    monkeypatch.setattr(pair_network, "_BLOCK_PER_THREAD", cut[0])
    monkeypatch.setattr(pair_network, "_KEPT_CPU", cut[1])
    noisy, time, mask = batch
    model = small(name, normalization=normalization)
    parameters = list(model.parameters())
    weight = torch.randn(noisy.shape).double()
    ours = on_atoms(model, noisy, time, mask)
    gradients = torch.autograd.grad((ours * weight).sum(), parameters)
    theirs = torch.zeros_like(ours)
    for k, n in enumerate(mask.sum(dim=1).tolist()):
        theirs[k, :n] = textbook(model, noisy[k, :n], time[k])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    expected = torch.autograd.grad((theirs * weight).sum(), parameters)
    for (label, _), gradient, exact in zip(
        model.named_parameters(), gradients, expected, strict=True
    ):
        error = (gradient - exact).norm() / exact.norm()
        assert error < 1e-10, label


@pytest.mark.parametrize("name", MODELS)
def test_gradient_of_the_input(batch, name):
    noisy, time, mask = batch
    noisy = torch.where(mask[..., None], noisy, 0)[:2].requires_grad_()
    model = small(name)
    assert torch.autograd.gradcheck(
        lambda x: on_atoms(model, x, time[:2], mask[:2]), noisy, fast_mode=True
    )


def test_cuts_are_what_they_are_meant_to_be(monkeypatch):
    """Of the cuts above, on 29 atoms and width 12 with one thread."""
    counts = []
    for numbers, _ in CUTS:
        monkeypatch.setattr(pair_network, "_BLOCK_PER_THREAD", numbers // torch.get_num_threads())
        blocks = list(pair_network._blocks(5, 29, 12, torch.device("cpu")))
        covered = torch.zeros(5, 29)
        for block in blocks:
            covered[block] += 1
        assert (covered == 1).all()
        counts.append(len(blocks))
    assert counts == [1, 3, 20, 20]


def test_no_graph_is_no_memory():
    """Without a gradient nothing of the size of all pairs is made."""
    network = PairNetwork(64)
    h, on = torch.randn(64, 40, 64), torch.ones(64, 40, 40)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        network.gated_sum(h, on)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 64 * 40 * 40 * 64 * 4 / 10


def test_what_is_kept_goes_with_the_backward_pass():
    """Also where the loss is still at hand, so that layers give memory back one by one."""
    network = PairNetwork(8)
    h = torch.randn(3, 7, 8, requires_grad=True)

    def alive():
        tensors = (o for o in gc.get_objects() if type(o) is torch.Tensor)
        return sum(tensor.shape == (3, 7, 7, 8) for tensor in tensors)

    loss = network.gated_sum(h, torch.ones(3, 7, 7)).sum()
    loss.backward()
    assert alive() == 0
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("cut", [(1 << 18, 1 << 28), (12 * 29 * 8, 0)])
@pytest.mark.parametrize("name", MODELS)
def test_low_precision_gradient_points_the_same_way(monkeypatch, batch, name, cut):
    monkeypatch.setattr(pair_network, "_BLOCK_PER_THREAD", cut[0])
    monkeypatch.setattr(pair_network, "_KEPT_CPU", cut[1])
    noisy, time, mask = batch
    model = small(name)
    loss = lambda m, *x: on_atoms(m, *x).square().sum()  # noqa: E731
    exact = torch.autograd.grad(loss(model, noisy, time, mask), list(model.parameters()))
    model.float().low_precision = True
    values = loss(model, noisy.float(), time.float(), mask)
    rough = torch.autograd.grad(values, list(model.parameters()))
    a, b = (torch.cat([g.double().flatten() for g in gs]) for gs in (exact, rough))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.999


def test_sizes_are_the_papers():
    models = {name: model(layout_of(6)) for name, model in MODELS.items()}
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert count["gdm"] == 3_555_602
    assert count["gdm_pairs"] == 5_047_130  # not the paper's
    assert count["edm"] == 5_339_663  # the readout lacks EDM's unused channel of time


def test_edm_does_not_move_a_lone_atom():
    model = EDM(layout_of(2), layers=2, width=8)
    mask = torch.ones(1, 1, dtype=torch.bool)
    result = on_atoms(model, torch.randn(1, 1, 5), torch.rand(1), mask)
    assert (result[..., :3] == 0).all()
