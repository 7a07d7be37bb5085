"""The networks against their textbook formulas, and PyTorch's own gradients of them."""

from __future__ import annotations

import gc

import pytest
import textbook_jodo
import torch
from conftest import padded_batch
from states import CALLS, Inputs, inputs_of, layout_of, network, on_atoms
from torch import nn
from torch.nn import functional as F

from molgen_energy.diffusion.state import State
from molgen_energy.models import EDM, GDM, JODO, MODELS, GDMPairs, Transformer, jodo, pair_network
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


def embedded(model: nn.Module, time):
    """Features (W,) of a time."""
    angles = torch.log(time / (1 - time)) * torch.arange(1, 17) / 4
    return F.silu(model.time.linear(torch.cat([angles.sin(), angles.cos(), time[None]])))


def with_distances(model: GDMPairs, noisy, time, row, col):
    """What `GDMPairs` makes of a molecule, before the mean is taken off."""
    time = embedded(model, time)
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


def with_attention(model: Transformer, noisy, time):
    """What `Transformer` makes of a molecule, before the mean is taken off; head by head."""
    time, p, atoms = embedded(model, time), noisy[:, :3], len(noisy)
    d = torch.sqrt(((p[:, None] - p) ** 2).sum(dim=-1) + 1e-8)
    centres = torch.linspace(0.5, 5, 16)  # in float32, as those of the network
    gaussians = [torch.exp(-((d - c) ** 2) / (2 * 0.3**2)) for c in centres.tolist()]
    features = torch.stack([*gaussians, 1 / (1 + d), d / 5, 0 * d], dim=-1)
    bias = model.bias.weight[:, -1].expand(1 + atoms, 1 + atoms, -1).clone()
    bias[1:, 1:] = features @ model.bias.weight.T
    h = torch.cat([model.register[None], model.embed(noisy)]) + model.embed_time(time)
    for k, layer in enumerate(model.layers):
        x, heads = timed(layer.attention_norm, h, time), []
        for head in range(model.heads):

            def part(linear, x=x, head=head):
                return linear(x).chunk(model.heads, dim=1)[head]

            query, key = (
                norm.weight * values / values.square().mean(dim=1, keepdim=True).sqrt()
                for norm, values in (
                    (layer.query_norm, part(layer.query)),
                    (layer.key_norm, part(layer.key)),
                )
            )
            logits = query @ key.T / query.shape[1] ** 0.5 + bias[:, :, k * model.heads + head]
            weight = torch.softmax(logits, dim=1)
            to_atoms = weight[:, 1:]
            places = torch.cat([torch.zeros(1, 3), p])
            moved = (to_atoms[..., None] * (p - places[:, None])).sum(dim=1)
            count = to_atoms.sum(dim=1, keepdim=True)
            heads.append(torch.cat([moved, count, weight @ part(layer.value)], dim=1))
        h = h + layer.output(torch.cat(heads, dim=1))
        h = h + layer.update_out(F.silu(layer.update_in(timed(layer.update_norm, h, time))))
    return model.readout(timed(model.norm, h[1:], time))


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
    elif isinstance(model, Transformer):
        result = with_attention(model, noisy, time)
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


def textbook_state(model: nn.Module, inputs: Inputs) -> State:
    """What a network is to predict for every molecule of a batch."""
    if isinstance(model, JODO):
        return textbook_jodo.predicted(model, inputs.state, inputs.time, inputs.self_condition)
    result = torch.zeros_like(inputs.state.atoms)
    for k, n in enumerate(inputs.mask.sum(dim=1).tolist()):
        result[k, :n] = textbook(model, inputs.state.atoms[k, :n], inputs.time[k])
    return inputs.state.with_atoms(result)


WIDTH = 32


def small(name, seed=0, **options):
    torch.manual_seed(seed)
    model = network(name, WIDTH, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():  # so that EDM's shifts are not near zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture
def batch(molecules):
    return padded_batch(molecules.select(torch.arange(0, 2000, 400).numpy()))


# Blocks of all molecules, of several, of one, and of a part of one; with and without the memory
# that saves a product. Numbers in a block, and bytes that may be kept.
CUTS = [
    (1 << 18, 1 << 28),
    (WIDTH * 29 * 29 * 2, 1 << 28),
    (WIDTH * 29 * 8, 1 << 28),
    (WIDTH * 29 * 8, 0),
]


def cut_into(monkeypatch, numbers, kept):
    """Limit blocks to so many numbers, and what layers keep to so many bytes."""
    monkeypatch.setattr(pair_network, "_BLOCK_PER_THREAD", numbers)
    monkeypatch.setattr(jodo, "_BLOCK_CPU", numbers)
    for module in (pair_network, jodo):
        monkeypatch.setattr(module, "_KEPT_CPU", kept)


def weighted(state: State, weights: State) -> torch.Tensor:
    """Σ w·x over the values of all fields."""
    return sum((state.tensors[d] * weights.tensors[d]).sum() for d in state.tensors)


def variants():
    """Networks, what they get, and divisors of sums over neighbours where they have one."""
    divided = [n for n in MODELS if "normalization" in MODELS[n].Config.model_fields]
    plain = [(name, again, {}) for name, again in CALLS]
    return plain + [(name, False, {"normalization": 7.0}) for name in divided]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("name", "again", "options"), variants())
def test_value_and_gradient_are_the_textbooks(monkeypatch, batch, name, again, options, cut):
    cut_into(monkeypatch, *cut)
    model = small(name, **options)
    inputs = inputs_of(model, *batch, self_condition=again)
    parameters = dict(model.named_parameters())
    ours, theirs = model(*inputs), textbook_state(model, inputs)
    weights = ours.map(torch.randn_like)
    gradients, expected = (
        torch.autograd.grad(
            weighted(state, weights), list(parameters.values()), materialize_grads=True
        )
        for state in (ours, theirs)
    )
    for domain, values in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[domain], values, rtol=1e-10, atol=1e-10)
    for label, gradient, exact in zip(parameters, gradients, expected, strict=True):
        assert (gradient - exact).norm() <= 1e-10 * exact.norm(), label


@pytest.mark.parametrize(("name", "again"), CALLS)
def test_gradient_of_the_input(batch, name, again):
    positions, mask = batch
    model = small(name)
    inputs = inputs_of(model, positions[:2], mask[:2], self_condition=again)
    domains = list(inputs.state.tensors)
    values = [torch.nan_to_num(v).requires_grad_() for v in inputs.state.tensors.values()]

    def function(*values):
        state = State(model.layout, inputs.mask, dict(zip(domains, values, strict=True)))
        return tuple(model(*inputs._replace(state=state)).tensors.values())

    assert torch.autograd.gradcheck(function, values, fast_mode=True)


def test_cuts_are_what_they_are_meant_to_be(monkeypatch):
    """Of the cuts above, on 29 atoms with one thread."""
    counts = []
    for numbers, _ in CUTS:
        monkeypatch.setattr(pair_network, "_BLOCK_PER_THREAD", numbers // torch.get_num_threads())
        blocks = list(pair_network._blocks(5, 29, WIDTH, torch.device("cpu")))
        covered = torch.zeros(5, 29)
        for block in blocks:
            covered[block] += 1
        assert (covered == 1).all()
        counts.append(len(blocks))
    assert counts == [1, 3, 20, 20]


def test_no_graph_is_no_memory():
    """Without a gradient nothing of the size of all pairs is made."""
    network = PairNetwork(64)
    h, on = torch.randn(256, 40, 64), torch.ones(256, 40, 40)
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        network.gated_sum(h, on)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < 256 * 40 * 40 * 64 * 4 / 10


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


@pytest.mark.parametrize("cut", [CUTS[0], CUTS[-1]])
@pytest.mark.parametrize(("name", "again"), CALLS)
def test_low_precision_gradient_points_the_same_way(monkeypatch, batch, name, again, cut):
    cut_into(monkeypatch, *cut)
    model = small(name)
    inputs = inputs_of(model, *batch, self_condition=again)
    parameters = list(model.parameters())

    def gradient(inputs):
        values = sum(v.square().sum() for v in model(*inputs).tensors.values())
        parts = torch.autograd.grad(values, parameters, materialize_grads=True)
        return torch.cat([part.double().flatten() for part in parts])

    exact = gradient(inputs)
    model.float().low_precision = True
    rough = gradient(inputs.to(torch.float32))
    assert F.cosine_similarity(exact, rough, dim=0) > 0.999


def test_sizes_are_the_papers():
    def count(model):
        return sum(p.numel() for p in model(layout_of(6)).parameters())

    assert count(GDM) == 3_555_602
    assert count(GDMPairs) == 5_047_130  # not the paper's
    assert count(Transformer) == 12_640_713  # not of a paper
    assert count(EDM) == 5_339_663  # the readout lacks EDM's unused channel of time


def test_edm_does_not_move_a_lone_atom():
    model = EDM(layout_of(2), layers=2, width=8)
    mask = torch.ones(1, 1, dtype=torch.bool)
    result = on_atoms(model, torch.randn(1, 1, 5), torch.rand(1), mask)
    assert (result[..., :3] == 0).all()
