"""Throughput of training and of the network alone, against plain lists of pairs.

    python benchmarks/train.py --data qm9.h5                     # CPU, about ten minutes
    python benchmarks/train.py --data qm9.h5 --device cuda       # a GPU, with its share of the peak
    python benchmarks/train.py --data qm9.h5 --models gdm:4x64   # one of the rows
    python benchmarks/train.py --data qm9.h5 --memory            # and the most memory, batch 512

The same networks are written below as they are published: a list of pairs, [h_i, h_j] joined for
each, PyTorch's own gradients. `padded` lists the pairs of batches drawn at random and padded to
their largest molecule, with a mask, as EDM's code does; `real` lists only those that are there. All
take the same training step: objective with the energy loss, gradients, clipping, AdamW, moving
average. They take turns, so that a noisy machine slows all alike; quote the ratios.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from molgen_energy.data.batches import BatchIndex, padding
from molgen_energy.diffusion.geometry import centred
from molgen_energy.diffusion.state import State
from molgen_energy.models import EDM, GDM
from molgen_energy.models.pair_network import PairNetwork
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.systems.registry import load_config
from molgen_energy.training.clipping import GradientClipper
from molgen_energy.training.ema import ExponentialMovingAverage

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16 without sparsity, FLOP/s


class PairMLP(nn.Module):
    """φ(h_i, h_j, e_ij) of two layers, and the number read from it, on a list of pairs."""

    def __init__(self, ours: PairNetwork) -> None:
        super().__init__()
        parts = [ours.receiver.weight, ours.sender.weight]
        if ours.feature is not None:
            parts.append(ours.feature.weight)
        joint = torch.cat(parts, dim=1)
        first = nn.Linear(joint.shape[1], joint.shape[0])
        with torch.no_grad():
            first.weight.copy_(joint)
            first.bias.copy_(ours.receiver.bias)
        self.layers = nn.Sequential(first, nn.SiLU(), ours.linear, nn.SiLU())
        self.read = ours.read

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        message = self.layers(torch.cat(inputs, dim=1))
        return message, self.read(message)


class PairList(nn.Module):
    """GDM or EDM on a list of pairs, with the weights of one of ours."""

    def __init__(self, ours: GDM | EDM, padded: bool) -> None:
        super().__init__()
        self.padded = padded
        self.ours = ours
        messages = [m.message if isinstance(ours, EDM) else m for m in ours.layers]
        self.messages = nn.ModuleList(PairMLP(layer.pairs) for layer in messages)
        self.updates = nn.ModuleList(
            nn.Sequential(layer.update_in, nn.SiLU(), layer.update_out) for layer in messages
        )
        shifts = [m.shift for m in ours.layers] if isinstance(ours, EDM) else []
        self.shifts = nn.ModuleList(PairMLP(network) for network in shifts)

    def forward(
        self,
        state: State,
        time: Tensor,
        mask: Tensor,
        condition: Tensor | None = None,
        self_condition: State | None = None,
    ) -> State:
        noisy = state.atoms
        batch, atoms = mask.shape
        distinct = ~torch.eye(atoms, dtype=torch.bool, device=mask.device)
        real = mask[:, :, None] & mask[:, None, :] & distinct
        listed = torch.ones_like(real) if self.padded else real
        molecule, i, j = torch.nonzero(listed, as_tuple=True)
        row, col = molecule * atoms + i, molecule * atoms + j
        weight = real[molecule, i, j].to(noisy.dtype)[:, None]
        t = time[:, None, None].expand(batch, atoms, 1)
        flat = noisy.flatten(0, 1)
        if not self.shifts:
            h = self.ours.embed(torch.cat([noisy, t], dim=-1)).flatten(0, 1)
            for message, update in zip(self.messages, self.updates, strict=True):
                h = self._message(message, update, h, row, col, weight)
            out = self.ours.readout(h).view(batch, atoms, -1)
            shift, features = out[..., :3], out[..., 3:]
        else:
            h = self.ours.embed(torch.cat([noisy[..., 3:], t], dim=-1)).flatten(0, 1)
            x = flat[:, :3]
            start = (x[row] - x[col]).square().sum(dim=1, keepdim=True)
            networks = zip(self.messages, self.updates, self.shifts, strict=True)
            for message, update, push in networks:
                difference = x[row] - x[col]
                square = difference.square().sum(dim=1, keepdim=True)
                h = self._message(message, update, h, row, col, weight, square, start)
                _, number = push(h[row], h[col], square, start)
                step = difference / ((square + 1e-8).sqrt() + 1) * torch.tanh(number) * 15 * weight
                x = x.index_add(0, row, step)
            shift = (x - flat[:, :3]).view(batch, atoms, 3)
            features = self.ours.readout(h).view(batch, atoms, -1)
        shift, features = (torch.where(mask[..., None], v, 0) for v in (shift, features))
        return state.with_atoms(torch.cat([centred(shift, mask), features], dim=-1))

    @staticmethod
    def _message(
        message: nn.Module,
        update: nn.Module,
        h: Tensor,
        row: Tensor,
        col: Tensor,
        weight: Tensor,
        *features: Tensor,
    ) -> Tensor:
        values, number = message(h[row], h[col], *features)
        values = values * torch.sigmoid(number) * weight
        gathered = torch.zeros_like(h).index_add(0, row, values)
        return h + update(torch.cat([h, gathered], dim=1))


class TrainingStep:
    """Everything that a step of training does, with a given network."""

    def __init__(self, task: MoleculeTask, network: nn.Module) -> None:
        self.task, self.network = task, network
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=1e-6, weight_decay=1e-12, amsgrad=True, fused=True
        )
        self.clipper = GradientClipper()
        self.ema = ExponentialMovingAverage(network, 0.9999)
        self.count = 0

    def __call__(self, batch: BatchIndex) -> None:
        losses = self.task.loss(self.network, batch, seed=self.count)
        self.count += 1
        losses["loss"].mean().backward()  # type: ignore[no-untyped-call]
        self.clipper.clip(list(self.network.parameters()))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        weight = torch.full((), self.ema.weight(self.count), device=self.task.device)
        self.ema.update(self.network, weight)


class Evaluation:
    """The network alone, as sampling calls it."""

    def __init__(self, task: MoleculeTask, network: nn.Module) -> None:
        self.task, self.network = task, network

    @torch.no_grad()
    def __call__(self, batch: BatchIndex) -> None:
        state = self.task.encode(self.task.molecules(batch))
        self.network(state, torch.rand(len(batch), device=state.mask.device), state.mask)


def sizes_spread(batches: list[BatchIndex], count: int) -> list[BatchIndex]:
    """So many batches whose molecules are small to large as in all of them."""
    ordered = sorted(batches, key=lambda batch: float(batch.sizes.mean()))
    places = (np.arange(count) + 0.5) / count * len(ordered)
    return [ordered[int(place)] for place in places]


def rates(
    steps: dict[str, Callable[[BatchIndex], None]],
    batches: dict[str, list[BatchIndex]],
    device: torch.device,
    seconds: float,
) -> dict[str, float]:
    """Molecules a second, each taking its batches in turn until the time is over.

    Whoever is fast takes more of its batches in a turn, so that all have about as much time.
    """

    def timed(name: str, batch: BatchIndex) -> float:
        began = time.perf_counter()
        steps[name](batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    first = {
        name: timed(name, batches[name][0]) and timed(name, batches[name][1]) for name in steps
    }
    turns = {name: max(1, round(max(first.values()) / took)) for name, took in first.items()}
    done = dict.fromkeys(steps, 0)
    spent, molecules = dict.fromkeys(steps, 0.0), dict.fromkeys(steps, 0)
    until = time.perf_counter() + seconds
    # Whole rounds of our batches, for their sizes differ.
    while time.perf_counter() < until or done["ours"] % len(batches["ours"]):
        for name, turn in turns.items():
            for _ in range(turn if name != "ours" else len(batches["ours"])):
                batch = batches[name][done[name] % len(batches[name])]
                spent[name] += timed(name, batch)
                molecules[name] += len(batch)
                done[name] += 1
    return {name: molecules[name] / spent[name] for name in steps}


def work(name: str, layers: int, width: int, sizes: np.ndarray) -> float:
    """Floating-point operations of forward and backward for a molecule, products only."""
    pairs, atoms = float((sizes**2).mean()), float(sizes.mean())
    networks = 2 if name == "edm" else 1
    each = networks * (pairs + 2 * atoms) + 3 * atoms
    return 3 * 2 * layers * width**2 * each


def task_of(
    name: str, layers: int, width: int, options: argparse.Namespace, batch_size: int
) -> MoleculeTask:
    config = load_config("qm9_gdm").replaced(
        {
            "data.path": str(options.data),
            "model.name": name,
            "model.layers": layers,
            "model.width": width,
            "training.batch_size": batch_size,
            "training.validation_molecules": 1,
            "training.low_precision": options.low_precision,
        }
    )
    return MoleculeTask(config, options.device)


def compare(
    name: str, layers: int, width: int, options: argparse.Namespace, console: Console
) -> None:
    task = task_of(name, layers, width, options, options.batch_size)
    epoch = list(task.epoch(0))
    sizes = np.concatenate([batch.sizes for batch in epoch])
    numbers = np.random.default_rng(0).permutation(len(sizes))[: options.batch_size * 50]
    every = np.empty(len(sizes), np.int64)
    every[np.concatenate([batch.which for batch in epoch])] = sizes
    random = [BatchIndex(0, which, every[which]) for which in np.split(numbers, 50)]
    networks = {
        "padded": PairList(task.model, padded=True).to(options.device),
        "real": PairList(task.model, padded=False).to(options.device),
        "ours": task.model,
    }
    batches = {"padded": random, "real": random, "ours": sizes_spread(epoch, 12)}
    state = task.encode(task.molecules(random[0]))
    times = torch.rand(len(state), device=options.device)
    with torch.no_grad():
        exact = networks["padded"](state, times, state.mask).atoms
        ours = networks["ours"](state, times, state.mask).atoms
        error = float((ours - exact).norm() / exact.norm())
    table = Table(
        title=f"{name} {layers}×{width}, batches of {options.batch_size}: molecules/s "
        f"(results differ by {error:.0e})"
    )
    for column in ("", "list, padded", "list, real", "ours", "ours/padded", "ours/real"):
        table.add_column(column, justify="right")
    for label, kind in (("training step", TrainingStep), ("network alone", Evaluation)):
        steps = {key: kind(task, network) for key, network in networks.items()}
        got = rates(steps, batches, options.device, options.seconds)
        ratios = (got["ours"] / got[key] for key in ("padded", "real"))
        table.add_row(label, *(f"{v:,.1f}" for v in got.values()), *(f"{r:.1f}" for r in ratios))
        if label == "training step":
            trained = got["ours"]
    console.print(table)
    share = padding(epoch)
    console.print(
        f"padding {100 * share.atoms:.1f} % of atoms, {100 * share.pairs:.1f} % of pairs; "
        f"{work(name, layers, width, sizes) * trained / 1e12:.3f} TFLOP/s in products"
    )
    if options.device.type == "cuda":
        card = torch.cuda.get_device_name()
        peak = next((value for key, value in PEAK.items() if key in card), None)
        console.print(f"100,000 molecules take {1e5 / trained:.2f} s")
        if peak:
            used = work(name, layers, width, sizes) * trained / peak
            console.print(f"{100 * used:.1f} % of the bf16 peak of {card}")


_MEMORY = """
import resource, sys
sys.path.insert(0, {folder!r})
from train import *
options = argparse.Namespace(data={data!r}, low_precision=False, device=torch.device({device!r}))
task = task_of({name!r}, {layers}, {width}, options, 512)
batches = sorted(task.epoch(0), key=lambda batch: -batch.sizes.mean())
step = TrainingStep(task, task.model)
step(batches[0]); step(batches[len(batches) // 2])
if options.device.type == "cuda":
    print(torch.cuda.max_memory_allocated() / 1e9)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)
"""


def memory(
    name: str, layers: int, width: int, options: argparse.Namespace, console: Console
) -> None:
    """Of a training step on the largest 512 molecules that meet in a batch, in a new process."""
    code = _MEMORY.format(
        folder=str(Path(__file__).parent),
        data=str(options.data),
        device=str(options.device),
        name=name,
        layers=layers,
        width=width,
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    where = "on the device" if options.device.type == "cuda" else "of the process"
    console.print(
        f"{name} {layers}×{width}, batch 512: {float(done.stdout):.2f} GB {where} at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="QM9 as `preprocess qm9` writes it"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--models", default="gdm:9x256,gdm:4x64,edm:9x256")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each row")
    parser.add_argument(
        "--low-precision", action="store_true", help="bfloat16 for pairs, ours only"
    )
    parser.add_argument("--memory", action="store_true", help="the most memory at batch 512 too")
    options = parser.parse_args()
    console = Console()
    where = torch.cuda.get_device_name() if options.device.type == "cuda" else "CPU"
    console.print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for text in options.models.split(","):
        name, _, shape = text.partition(":")
        layers, width = map(int, shape.split("x"))
        compare(name, layers, width, options, console)
        if options.memory:
            memory(name, layers, width, options, console)


if __name__ == "__main__":
    main()
