"""Time and memory of training by the size of molecules, at one number of pairs in a batch.

    python benchmarks/sizes.py --data ccd.h5                       # CPU, minutes
    python benchmarks/sizes.py --data ccd.h5 --device cuda --pairs 1000000 --models gdm:9x256

First the energy on complete, sparse and symmetrized edges; then the gradients of a training step of
each network. Each row takes the molecules of the data whose size is nearest below n, as many as
`training.pairs_per_batch` allows, and the last row as many of the largest as a batch of the median
size holds: what batches of a number of molecules would take. Times are medians of processor time on
the CPU, in turns, and memory is the peak of tensors beyond those there before.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from losses import Step, peak_memory, step, times
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from molgen_energy.data.batches import BatchIndex, DeviceMolecules
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.losses import MeanSquaredError, PairwiseEnergy
from molgen_energy.losses.edges import EDGES
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.systems.registry import load_config

_SIZES = (18, 44, 100, 181)
_KINDS = ("complete", "sparse", "symmetrized")


def chosen(sizes: NDArray[np.int64], n: int, count: int) -> NDArray[np.int64]:
    """The molecules (count,) of at most n atoms that are nearest to it."""
    below = np.flatnonzero(sizes <= n)
    return np.sort(below[np.argsort(sizes[below], kind="stable")[-count:]])


def rows(sizes: NDArray[np.int64], pairs: int) -> dict[str, NDArray[np.int64]]:
    """The molecules of each row, by its name."""
    found = {str(n): chosen(sizes, n, max(1, pairs // n**2)) for n in _SIZES}
    middle, largest = int(np.median(sizes)), int(sizes.max())
    count = max(1, pairs // middle**2)
    return found | {f"{largest}, {count} molecules": chosen(sizes, largest, count)}


def measure_losses(data: Path, options: argparse.Namespace, console: Console) -> None:
    with MoleculeFile(data) as file:
        train = file.split_indices("train")
        sizes = file.sizes(train)
        batches = {
            name: DeviceMolecules(file.read(train[which]), options.device).batch(
                np.arange(len(which))
            )
            for name, which in rows(sizes, options.pairs).items()
        }
    table = Table(title=f"energy, batches of {options.pairs:,} pairs, forward and backward")
    for column in ("n", "B", *(f"{kind}, {unit}" for unit in ("ms", "MB") for kind in _KINDS)):
        table.add_column(column, justify="right")
    for column in ("mse, ms", "edges of a molecule, ms"):
        table.add_column(column, justify="right")
    for name, batch in batches.items():
        target = batch.data["positions"]
        generator = torch.Generator(options.device).manual_seed(0)
        prediction = target + 0.3 * torch.randn(
            target.shape, generator=generator, device=options.device
        )
        given: dict[str, dict[str, Any]] = {kind: {} for kind in _KINDS}
        began = time.process_time()
        given["symmetrized"] = {
            "neighbours": EDGES["symmetrized"]().prepare_neighbours(target, batch.mask)
        }
        searched = 1e3 * (time.process_time() - began) / len(target)
        steps: dict[str, Step] = {
            kind: step(PairwiseEnergy(edges=kind), prediction, target, batch.mask, **given[kind])
            for kind in _KINDS
        }
        steps["mse"] = step(MeanSquaredError(), prediction, target, batch.mask)
        took = times(steps, options.seconds, 100, clock_of(options.device))
        held = [f"{peak_memory(steps[kind], options.device):.2f}" for kind in _KINDS]
        spent = [f"{took[kind]:.2f}" for kind in (*_KINDS, "mse")]
        table.add_row(name, str(len(target)), *spent[:3], *held, spent[3], f"{searched:.2f}")
    console.print(table)


def measure_networks(data: Path, options: argparse.Namespace, console: Console) -> None:
    table = Table(title=f"gradients of a training step, batches of {options.pairs:,} pairs")
    models = options.models.split(",")
    for column in ("n", "B", *(f"{model}, {unit}" for model in models for unit in ("ms", "MB"))):
        table.add_column(column, justify="right")
    cells: dict[str, list[str]] = {}
    for model in models:
        name, _, shape = model.partition(":")
        layers, width = map(int, shape.split("x"))
        changes = {
            "data.path": str(data), "data.in_memory": True, "model.name": name,
            "model.layers": layers, "model.width": width, "training.pairs_per_batch": options.pairs,
            "training.validation_molecules": 1, "training.low_precision": options.low_precision,
            "training.lr": 1e-3, "objective.position_weight": 1.0, "loss.springs.scale": 1.0,
        }  # fmt: skip
        config = load_config("qm9_gdm").replaced(changes)
        assert isinstance(config, MoleculeConfig)
        task = MoleculeTask(config, options.device)
        epoch = task.epoch(0)
        sizes = np.concatenate([batch.sizes for batch in epoch])
        every = np.empty(len(sizes), np.int64)
        every[np.concatenate([batch.which for batch in epoch])] = sizes
        for row, which in rows(every, options.pairs).items():
            batch = BatchIndex(0, which, every[which])

            def gradients(task: MoleculeTask = task, batch: BatchIndex = batch) -> Tensor:
                task.model.zero_grad()
                task.loss(task.model, batch, 0)["loss"].mean().backward()  # type: ignore[no-untyped-call]
                if options.device.type == "cuda":
                    torch.cuda.synchronize()
                return next(task.model.parameters())

            held = peak_memory(gradients, options.device)
            took = times({model: gradients}, options.seconds, 3, clock_of(options.device))
            cells.setdefault(row, [str(len(which))]).extend([f"{took[model]:.0f}", f"{held:.0f}"])
    for row, values in cells.items():
        table.add_row(row, *values)
    console.print(table)


def clock_of(device: torch.device) -> Callable[[], float]:
    """Processor time on the CPU, where other work may run; a GPU's time is that of the clock."""
    return time.process_time if device.type == "cpu" else time.perf_counter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="as `preprocess ccd` writes it")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--pairs", type=int, default=124_000, help="of a batch")
    parser.add_argument("--models", default="gdm:4x96,gdm_pairs:4x96,edm:4x96")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    parser.add_argument("--low-precision", action="store_true", help="bfloat16 for pairs")
    parser.add_argument("--only", choices=("losses", "networks"))
    options = parser.parse_args()
    console = Console(width=120)
    where = torch.cuda.get_device_name() if options.device.type == "cuda" else "CPU"
    console.print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if options.only != "networks":
        measure_losses(options.data, options, console)
    if options.only != "losses":
        measure_networks(options.data, options, console)


if __name__ == "__main__":
    main()
