"""Speed and memory of JODO's network, against its formula written out for all ordered pairs.

    python benchmarks/jodo.py                           # CPU, about ten minutes
    python benchmarks/jodo.py --device cuda             # a GPU
    python benchmarks/jodo.py --models 8x256 --sizes 44:8

`formula` is the network as it is published: a list of ordered pairs of real atoms, inputs joined
for each, PyTorch's own gradients. `published` also computes the modulation by the noise level for
each pair, as JODO's code does, rather than for each molecule. A training step is forward, backward
and optimiser; an evaluation is what sampling calls, with one noise level for all molecules. All get
a previous prediction. They take turns, so that a noisy machine slows all alike; quote the ratios.
Seconds on the CPU are those that the process computed, of all its threads together.
Memory is the growth of a new process in its first training step.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.diffusion.geometry import centred
from molgen_energy.diffusion.state import State, pairs_inside
from molgen_energy.models.jodo import JODO, ConditionalGaussianBasis, JODOConfig, JODOLayer
from molgen_energy.resources import bundled_sample
from molgen_energy.systems.molecules.fields import MoleculeStatistics, ScalesConfig, build_layout


class Formula(nn.Module):
    """JODO with the weights of one of ours, on a list of the ordered pairs of real atoms."""

    def __init__(self, ours: JODO, published: bool) -> None:
        super().__init__()
        self.ours, self.published = ours, published
        parts = [ours.embed_edges.weight, ours.embed_distances.weight]
        self.embed_edges = nn.Linear(sum(p.shape[1] for p in parts), len(parts[0]))
        with torch.no_grad():
            self.embed_edges.weight.copy_(torch.cat(parts, dim=1))
            self.embed_edges.bias.copy_(ours.embed_edges.bias)

    def forward(
        self,
        state: State,
        time: Tensor,
        mask: Tensor,
        condition: Tensor | None = None,
        self_condition: State | None = None,
    ) -> State:
        assert self_condition is not None
        ours, (batch, atoms) = self.ours, mask.shape
        molecule, i, j = torch.nonzero(pairs_inside(mask), as_tuple=True)
        row, col = molecule * atoms + i, molecule * atoms + j
        angles = 2 * math.pi * time[:, None] * ours.frequencies
        c = torch.cat([time[:, None], angles.sin(), angles.cos()], dim=1)
        c = F.silu(ours.time_out(F.gelu(ours.time_hidden(c))))
        x, before = state.atoms[..., :3].flatten(0, 1), self_condition.atoms[..., :3].flatten(0, 1)
        features = torch.cat([state.atoms[..., 3:], self_condition.atoms[..., 3:]], dim=-1)
        h = ours.embed_nodes(features.flatten(0, 1))
        bonds, bonds_before = (s.tensors["pair"][molecule, i, j] for s in (state, self_condition))
        squares = (before[row] - before[col]).square().sum(dim=1, keepdim=True)
        basis = self._gaussians(ours.basis, squares, c, molecule)
        edges = self.embed_edges(torch.cat([bonds, bonds_before, basis], dim=1))
        near = squares <= ours.cutoff
        adjacency = torch.cat([bonds_before[:, :1] >= 0, near], dim=1).to(x.dtype)
        of_atoms, of_pairs = [h], [edges]
        for k, layer in enumerate(ours.layers):
            x, h, edges = self._layer(layer, x, h, edges, adjacency, c, row, col, molecule, mask)
            of_atoms.append(ours.node_readouts[k](h))
            of_pairs.append(ours.edge_readouts[k](edges))
        read = torch.cat(of_pairs, dim=1)
        values = torch.cat([ours.existence_head(read), ours.kind_head(read)], dim=1)
        dense = values.new_zeros(batch, atoms, atoms, values.shape[1])
        dense[molecule, i, j] = values
        features = ours.node_head(torch.cat(of_atoms, dim=1))
        result = torch.cat([x, features], dim=1).view(batch, atoms, -1)
        pairs = (dense + dense.transpose(1, 2)) / 2
        return State(ours.layout, mask, {"atom": result, "pair": pairs}).projected()

    def _of_pairs(self, linear: nn.Linear, c: Tensor, molecule: Tensor) -> Tensor:
        values: Tensor = linear(c[molecule]) if self.published else linear(c)[molecule]
        return values

    def _gaussians(
        self, basis: ConditionalGaussianBasis, squares: Tensor, c: Tensor, molecule: Tensor
    ) -> Tensor:
        scale, shift = self._of_pairs(basis.modulation, c, molecule).chunk(2, dim=1)
        z = squares * (1 + scale) + shift
        width = basis.widths.abs() + 1e-5
        density = torch.exp(-0.5 * ((z - basis.means) / width) ** 2)
        return torch.cat([z, density / (math.sqrt(2 * math.pi) * width)], dim=1)

    def _layer(
        self,
        layer: JODOLayer,
        x: Tensor,
        h: Tensor,
        edges: Tensor,
        adjacency: Tensor,
        c: Tensor,
        row: Tensor,
        col: Tensor,
        molecule: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        atoms, heads = mask.shape[1], layer.heads
        squares = (x[row] - x[col]).square().sum(dim=1, keepdim=True)
        basis = self._gaussians(layer.basis, squares, c, molecule)
        node = [v.repeat_interleave(atoms, dim=0) for v in layer.node_modulation(c).chunk(6, dim=1)]
        edge = self._of_pairs(layer.edge_modulation, c, molecule).chunk(6, dim=1)
        inside = modulated(layer.combine(torch.cat([basis, edges], dim=1)), *edge[:2])
        states = modulated(h, *node[:2])
        query, key = (f(states).view(len(h), heads - 2, -1) for f in (layer.query, layer.key))
        value = layer.value(states).view(len(h), heads, -1)
        gate = torch.tanh(layer.edge_query(inside)).view(len(row), heads - 2, -1)
        logits = (query[row] * key[col] * gate).sum(dim=-1) / math.sqrt(value.shape[-1])
        logits = torch.cat([torch.where(adjacency > 0, 1.0, -1e10), logits], dim=1)
        receiver = row[:, None].expand_as(logits)
        highest = logits.new_full((len(h), heads), -math.inf)
        highest = highest.scatter_reduce(0, receiver, logits.detach(), "amax")
        weights = (logits - highest[row]).exp()
        weights = weights / torch.zeros_like(highest).index_add(0, row, weights)[row]
        gate = torch.tanh(layer.edge_value(inside)).view(len(row), heads, -1)
        sent = (weights[..., None] * value[col] * gate).flatten(1)
        message = torch.zeros_like(h).index_add(0, row, sent)
        edge_message = layer.edge_message(message[row] + message[col])
        h = modulated(h + node[2] * message, *node[3:5])
        h = h + node[5] * layer.node_feedforward(h)
        edges = modulated(edges + edge[2] * edge_message, *edge[3:5])
        edges = edges + edge[5] * layer.edge_feedforward(edges)
        update = layer.coordinates
        shift, scale = self._of_pairs(update.modulation, c, molecule).chunk(2, dim=1)
        hidden = update.input(torch.cat([h[row], h[col], edges, basis], dim=1))
        hidden = update.hidden(modulated(hidden, shift, scale))
        three = torch.tanh(update.output(F.silu(hidden)))
        three = three * torch.cat([torch.ones_like(squares), adjacency], dim=1)
        difference = x[row] - x[col]
        length = difference.norm(dim=1, keepdim=True).clamp(min=1e-8)
        step = three.mean(dim=1, keepdim=True) * update.step * difference / length
        x = x.index_add(0, row, step)
        return centred(x.view(*mask.shape, 3), mask).flatten(0, 1), h, edges


def modulated(values: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(values, values.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Batch(NamedTuple):
    """A noisy state, the log signal-to-noise ratios, the mask and a previous prediction."""

    state: State
    log_snr: Tensor
    mask: Tensor
    previous: State

    def call(self, network: nn.Module, log_snr: Tensor) -> State:
        result: State = network(self.state, log_snr, self.mask, None, self.previous)
        return result


def batch_of(ours: JODO, sizes: np.ndarray, device: torch.device) -> Batch:
    """A random batch of molecules of these sizes."""
    number = torch.arange(int(sizes.max()))
    mask = (number < torch.from_numpy(sizes)[:, None]).to(device)

    def state() -> State:
        tensors = {
            domain: torch.randn(ours.layout.shape(domain, mask), device=device)
            for domain in ours.layout.channels
        }
        return State(ours.layout, mask, tensors).projected()

    return Batch(state(), 12 * torch.rand(len(mask), device=device) - 6, mask, state())


class TrainingStep:
    """Forward, backward and optimiser."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=1e-6, weight_decay=1e-12, amsgrad=True, fused=True
        )

    def __call__(self, batch: Batch) -> None:
        self.network.train()
        result = batch.call(self.network, batch.log_snr)
        loss = torch.stack([values.square().sum() for values in result.tensors.values()]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Evaluation:
    """The network alone, at one noise level."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    @torch.no_grad()
    def __call__(self, batch: Batch) -> None:
        self.network.eval()
        batch.call(self.network, batch.log_snr[:1].expand_as(batch.log_snr))


def times(
    steps: dict[str, Callable[[Batch], None]],
    batches: list[Batch],
    device: torch.device,
    rounds: int,
) -> dict[str, float]:
    """Median seconds a batch, taking turns on each batch."""

    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def timed(name: str, batch: Batch) -> float:
        began = clock()
        steps[name](batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - began

    for name in steps:
        timed(name, batches[0])
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds):
        for name in steps:
            spent[name].append(timed(name, batches[turn % len(batches)]))
    return {name: median(values) for name, values in spent.items()}


def network_of(layers: int, width: int, device: torch.device) -> JODO:
    torch.manual_seed(0)
    statistics = MoleculeStatistics((1, 6, 7, 8, 9), (-1, 1))
    layout = build_layout(JODOConfig.fields, ScalesConfig(signed=True), statistics)
    return JODOConfig(layers=layers, width=width).build(layout, 0, False).to(device)


def sizes_of(text: str, count: int) -> list[np.ndarray]:
    """Sizes of the molecules of three batches: of QM9, or all of one size."""
    if text != "qm9":
        return [np.full(count, int(text))]
    with MoleculeFile(bundled_sample()) as file:
        sizes = np.diff(file.offsets)
    return list(np.random.default_rng(0).choice(sizes, (3, count)))


def kinds(ours: JODO, device: torch.device) -> dict[str, nn.Module]:
    return {
        "published": Formula(ours, published=True).to(device),
        "formula": Formula(ours, published=False).to(device),
        "ours": ours,
    }


# Linux: the peak of the process is reset to its memory before the step that counts.
_MEMORY = """
import sys
sys.path.insert(0, {folder!r})
from jodo import *
device = torch.device({device!r})
ours = network_of({layers}, {width}, device)
step = TrainingStep(kinds(ours, device)[{kind!r}])
batch_of_two = batch_of(ours, np.array([2, 2]), device)
step(batch_of_two)
def peak():
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) / 1e3
if device.type == "cuda":
    torch.cuda.reset_peak_memory_stats()
else:
    open("/proc/self/clear_refs", "w").write("5")
before = peak()
step(batch_of(ours, sizes_of({sizes!r}, {count})[0], device))
print(peak() - before)
"""


def memory(kind: str, layers: int, width: int, sizes: str, count: int, device: str) -> float:
    """MB that the first large training step of a process adds to its peak."""
    code = _MEMORY.format(
        folder=str(Path(__file__).parent),
        device=device,
        layers=layers,
        width=width,
        kind=kind,
        sizes=sizes,
        count=count,
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def difference(ours: JODO, formula: nn.Module, batch: Batch) -> float:
    """The largest relative difference of the outputs of both."""
    ours.eval()
    with torch.no_grad():
        results = [batch.call(network, batch.log_snr) for network in (ours, formula)]
    a, b = (result.tensors for result in results)
    return max(float((a[domain] - b[domain]).norm() / b[domain].norm()) for domain in a)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--models", default="8x256,6x128")
    parser.add_argument("--sizes", default="qm9:32,44:6,100:1", help="SIZE:MOLECULES, …")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-memory", action="store_true")
    options = parser.parse_args()
    console = Console(width=120)
    where = torch.cuda.get_device_name() if options.device.type == "cuda" else "CPU"
    console.print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for model in options.models.split(","):
        layers, width = map(int, model.split("x"))
        table = Table(title=f"jodo {model}")
        for column in ("", "published", "formula", "ours", "published/ours", "formula/ours"):
            table.add_column(column, justify="right")
        for text in options.sizes.split(","):
            sizes, _, number = text.partition(":")
            count = int(number)
            ours = network_of(layers, width, options.device)
            networks = kinds(ours, options.device)
            batches = [batch_of(ours, s, options.device) for s in sizes_of(sizes, count)]
            error = difference(ours, networks["formula"], batches[0])
            rows = {}
            for label, kind in (("training step, s", TrainingStep), ("evaluation, s", Evaluation)):
                steps = {name: kind(network) for name, network in networks.items()}
                rows[label] = times(steps, batches, options.device, options.rounds)
            if not options.without_memory:
                rows["training step, MB"] = {
                    name: memory(name, layers, width, sizes, count, str(options.device))
                    for name in networks
                }
            for label, got in rows.items():
                ratios = [got[name] / got["ours"] for name in ("published", "formula")]
                table.add_row(
                    f"{count} molecules of {sizes}, {label}",
                    *(f"{value:,.3g}" for value in got.values()),
                    *(f"{ratio:.1f}" for ratio in ratios),
                )
            console.print(f"{model}, {text}: results differ by {error:.0e}; {rows}")
        console.print(table)


if __name__ == "__main__":
    main()
