"""JODO's network as it is published (Huang et al., 2023), one molecule without padding.

All pairs of atoms are in dense tensors (N, N, …) of receivers and senders, in one direction and in
the other, and layers on several inputs are in one piece.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from molgen_energy.diffusion.state import State
from molgen_energy.models import JODO


def norm(y, shift, scale):
    centred = y - y.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred / (variance + 1e-6).sqrt() * (1 + scale) + shift


def squared_distances(x):
    return (x[:, None] - x[None]).square().sum(dim=-1)


def gaussians(basis, squares, c):
    scale, shift = basis.modulation(c)
    z = (squares * (1 + scale) + shift)[..., None]
    width = basis.widths.abs() + 1e-5
    density = torch.exp(-((z - basis.means) ** 2) / (2 * width**2)) / (
        width * math.sqrt(2 * math.pi)
    )
    return torch.cat([z, density], dim=-1)


def joined(h, *of_pairs):
    """[h_i, h_j, …] of all pairs."""
    n = len(h)
    return torch.cat([h[:, None].expand(n, n, -1), h[None].expand(n, n, -1), *of_pairs], dim=-1)


def attention(layer, h, e, adjacency):
    n, heads = len(h), layer.heads
    query, key = (f(h).view(n, heads - 2, -1) for f in (layer.query, layer.key))
    gate = torch.tanh(layer.edge_query(e)).view(n, n, heads - 2, -1)
    value = layer.value(h).view(n, heads, -1)
    learned = torch.einsum("ihc,jhc,ijhc->ijh", query, key, gate) / math.sqrt(value.shape[-1])
    fixed = torch.where(adjacency > 0, 1.0, -1e10).to(learned)
    logits = torch.cat([fixed, learned], dim=-1)
    itself = torch.eye(n, dtype=torch.bool)[..., None]
    if n == 1:
        weights = torch.zeros_like(logits)
    else:
        weights = logits.masked_fill(itself, -math.inf).softmax(dim=1)
    gate = torch.tanh(layer.edge_value(e)).view(n, n, heads, -1)
    return torch.einsum("ijh,jhc,ijhc->ihc", weights, value, gate).flatten(1)


def moved(update, x, h, e, basis, adjacency, c):
    shift, scale = update.modulation(c).chunk(2)
    u = norm(update.input(joined(h, e, basis)), shift, scale)
    three = torch.tanh(update.output(F.silu(update.hidden(u))))
    factor = (three * torch.cat([torch.ones_like(e[..., :1]), adjacency], dim=-1)).mean(dim=-1)
    difference = x[:, None] - x[None]
    # Of an atom and itself the difference is zero, and the length anything else.
    itself = torch.eye(len(x)).to(x)[..., None]
    length = (difference + itself).norm(dim=-1, keepdim=True).clamp(min=1e-8)
    x = x + (factor[..., None] * update.step * difference / length).sum(dim=1)
    return x - x.mean(dim=0)


def one_molecule(
    model: JODO, atoms: Tensor, bonds: Tensor, log_snr: Tensor, before: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Fields of atoms (N, 3 + F) and of pairs (N, N, K) from those of a noisy molecule."""
    n = len(atoms)
    angles = 2 * math.pi * log_snr * model.frequencies
    c = torch.cat([log_snr[None], angles.sin(), angles.cos()])
    c = F.silu(model.time_out(F.gelu(model.time_hidden(c))))
    x, features = atoms[:, :3], atoms[:, 3:]
    if before is None:
        features_before, bonds_before = torch.zeros_like(features), torch.zeros_like(bonds)
        basis = torch.zeros(n, n, model.embed_distances.in_features).to(x)
        adjacency = torch.ones(n, n, 2).to(x)
    else:
        features_before, bonds_before = before[0][:, 3:], before[1]
        squares = squared_distances(before[0][:, :3])
        basis = gaussians(model.basis, squares, c)
        bonded = bonds_before[..., 0] >= model.layout.fields["bonds"].midpoint
        angstrom = squares * model.layout.fields["positions"].scale ** 2
        near = {
            "squared_distance": angstrom <= model.cutoff,
            "distance": angstrom.sqrt() <= model.cutoff,
            "none": torch.ones_like(bonded),
        }[model.spatial_adjacency]
        adjacency = torch.stack([bonded, near], dim=-1).to(x)
    h = model.embed_nodes(torch.cat([features, features_before], dim=-1))
    first_layer = torch.cat([model.embed_edges.weight, model.embed_distances.weight], dim=1)
    inputs = torch.cat([bonds, bonds_before, basis], dim=-1)
    e = F.linear(inputs, first_layer, model.embed_edges.bias)
    of_atoms, of_pairs = [h], [e]
    readouts = zip(model.node_readouts, model.edge_readouts, strict=True)
    for layer, (node_readout, edge_readout) in zip(model.layers, readouts, strict=True):
        basis = gaussians(layer.basis, squared_distances(x), c)
        node = layer.node_modulation(c).chunk(6)
        edge = layer.edge_modulation(c).chunk(6)
        inside = norm(layer.combine(torch.cat([basis, e], dim=-1)), *edge[:2])
        message = attention(layer, norm(h, *node[:2]), inside, adjacency)
        edge_message = layer.edge_message(message[:, None] + message[None])
        h = norm(h + node[2] * message, *node[3:5])
        h = h + node[5] * layer.node_feedforward(h)
        e = norm(e + edge[2] * edge_message, *edge[3:5])
        e = e + edge[5] * layer.edge_feedforward(e)
        x = moved(layer.coordinates, x, h, e, basis, adjacency, c)
        of_atoms.append(node_readout(h))
        of_pairs.append(edge_readout(e))
    features = model.node_head(torch.cat(of_atoms, dim=-1))
    read = torch.cat(of_pairs, dim=-1)
    bonds = torch.cat([model.existence_head(read), model.kind_head(read)], dim=-1)
    bonds = (bonds + bonds.transpose(0, 1)) / 2
    bonds = torch.where(torch.eye(n, dtype=torch.bool)[..., None], 0, bonds)
    return torch.cat([x - x.mean(dim=0), features], dim=-1), bonds


def predicted(model: JODO, state: State, log_snr: Tensor, before: State | None) -> State:
    """The prediction for every molecule of a batch, each by itself."""
    tensors = {domain: torch.zeros_like(values) for domain, values in state.tensors.items()}
    for k, n in enumerate(state.mask.sum(dim=1).tolist()):

        def molecule(state, k=k, n=n):
            bonds = torch.nan_to_num(state.tensors["pair"][k, :n, :n])  # zero of an atom and itself
            return state.atoms[k, :n], bonds

        earlier = None if before is None else molecule(before)
        atoms, bonds = one_molecule(model, *molecule(state), log_snr[k], earlier)
        tensors["atom"][k, :n], tensors["pair"][k, :n, :n] = atoms, bonds
    return State(model.layout, state.mask, tensors)
