"""Time and memory of training and sampling by the size of molecules, of batches, and by processes.

    python benchmarks/sizes.py --data ccd.h5                       # CPU, minutes
    python benchmarks/sizes.py --data ccd.h5 --only scaling --models gdm_pairs:8x256
    python benchmarks/sizes.py --data ccd.h5 --device cuda --pairs 1000000 --models gdm:9x256

First the energy on complete, sparse and symmetrized edges; then the gradients of a training step of
each network. Each row takes the molecules of the data whose size is nearest below n, as many as
`training.pairs_per_batch` allows, and the last row as many of the largest as a batch of the median
size holds: what batches of a number of molecules would take. Last, for each network, one table of
how all this scales: gradients of a step, one evaluation of the network in sampling, the energy,
memory; by the size of molecules, by the number of pairs in a batch, and by processes and threads.
Times are medians of processor time on the CPU, in turns, but those of processes are by the clock.
Memory is the peak of tensors beyond those there before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from itertools import product, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from losses import Step, peak_memory, step, times
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from molgen_energy.data.batches import BatchIndex, DeviceMolecules
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.diffusion.noise import RandomNumbers
from molgen_energy.diffusion.samplers import build_sampler
from molgen_energy.losses import MeanSquaredError, PairwiseEnergy
from molgen_energy.losses.edges import EDGES
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.systems.registry import load_config
from molgen_energy.workers import WorkerPool

_SIZES = (9, 18, 44, 100, 181)
_MIDDLE = 18  # atoms of the molecules of the rows on batches and processes
_SHARES = (0.25, 4.0)  # of `--pairs`, in the rows on batches
_EVALUATIONS = 3  # of the network in a measurement of sampling
_TURNS = 3
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
        task, every = build_task(data, model, options)
        for row, which in rows(every, options.pairs).items():
            gradients = gradient_step(task, BatchIndex(0, which, every[which]))
            held = peak_memory(gradients, options.device)
            took = times({model: gradients}, options.seconds, 3, clock_of(options.device))
            cells.setdefault(row, [str(len(which))]).extend([f"{took[model]:.0f}", f"{held:.0f}"])
    for row, values in cells.items():
        table.add_row(row, *values)
    console.print(table)


def build_task(
    data: Path, model: str, options: argparse.Namespace
) -> tuple[MoleculeTask, NDArray[np.int64]]:
    """A task with a network such as `gdm:4x96`, and the sizes of its training molecules (M,)."""
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
    return task, every


def gradient_step(task: MoleculeTask, batch: BatchIndex) -> Step:
    """The gradients of a training step, as a function that returns a parameter."""

    def run() -> Tensor:
        task.model.train()
        task.model.zero_grad()
        task.loss(task.model, batch, 0)["loss"].mean().backward()  # type: ignore[no-untyped-call]
        if task.device.type == "cuda":
            torch.cuda.synchronize()
        return next(task.model.parameters())

    return run


def sampling_step(task: MoleculeTask, sizes: NDArray[np.int64]) -> Step:
    """`_EVALUATIONS` of the network for molecules of these sizes (B,), with the sampler's work."""
    atoms = torch.from_numpy(sizes).to(task.device)
    mask = torch.arange(int(sizes.max()), device=task.device) < atoms[:, None]
    random = RandomNumbers(0, torch.arange(len(sizes), device=task.device))
    sampler = build_sampler(task.config.process.build(), steps=_EVALUATIONS - 1)
    assert sampler.evaluations == _EVALUATIONS

    def run() -> Tensor:
        task.model.eval()
        with torch.no_grad():
            found = sampler.sample(task.model, random, task.layout, mask)["positions"]
        if task.device.type == "cuda":
            torch.cuda.synchronize()
        return found

    return run


def energy_step(data: Path, which: NDArray[np.int64], device: torch.device) -> Step:
    """The energy on complete edges of some training molecules, with its gradient."""
    with MoleculeFile(data) as file:
        molecules = file.read(file.split_indices("train")[which])
    batch = DeviceMolecules(molecules, device).batch(np.arange(len(which)))
    target = batch.data["positions"]
    return step(PairwiseEnergy(), target + 0.3 * torch.randn_like(target), target, batch.mask)


def measure_scaling(data: Path, model: str, options: argparse.Namespace, console: Console) -> None:
    """One table: by the size of molecules, of batches, and by processes."""
    task, every = build_task(data, model, options)
    counts = {str(n): (n, options.pairs // n**2) for n in _SIZES}
    for share in _SHARES:
        name = f"{_MIDDLE}, {share:g} × the pairs"
        counts[name] = (_MIDDLE, int(share * options.pairs) // _MIDDLE**2)
    table = Table(title=f"{model}, batches of {options.pairs:,} pairs")
    table.add_column("n")
    for column in (
        "B", "training, ms a molecule", "µs a pair", "sampling, ms a molecule, evaluation",
        "µs a pair", "training / sampling", "energy / training, %", "training, MB", "sampling, MB",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for row, (n, count) in counts.items():
        which = chosen(every, n, max(1, count))
        sizes = every[which]
        steps = {
            "training": gradient_step(task, BatchIndex(0, which, sizes)),
            "sampling": sampling_step(task, sizes),
            "energy": energy_step(data, which, options.device),
        }
        took = times(steps, options.seconds, 9, clock_of(options.device))
        training, sampling = took["training"], took["sampling"] / _EVALUATIONS
        pairs = float((sizes**2).sum())
        table.add_row(
            row,
            str(len(which)),
            *per_molecule(training, len(which), pairs),
            *per_molecule(sampling, len(which), pairs),
            f"{training / sampling:.1f}",
            f"{100 * took['energy'] / training:.1f}",
            *(
                f"{peak_memory(steps[name], options.device):.0f}"
                for name in ("training", "sampling")
            ),
        )
    table.add_section()
    if options.device.type == "cpu":
        for row, (training, sampling, count) in measure_processes(data, model, options).items():
            pairs = count * _MIDDLE**2
            shown = (*per_molecule(training, count, pairs), *per_molecule(sampling, count, pairs))
            table.add_row(row, str(count), *shown, f"{training / sampling:.1f}", "", "", "")
    console.print(table)


def per_molecule(milliseconds: float, molecules: int, pairs: float) -> tuple[str, str]:
    """The time of one molecule in ms, and that of a pair in µs."""
    return f"{milliseconds / molecules:.2f}", f"{1e3 * milliseconds / pairs:.2f}"


class Job(NamedTuple):
    """Work of one process: so many seconds of steps on the molecules of `_MIDDLE` atoms."""

    data: Path
    model: str
    options: argparse.Namespace
    threads: int
    kind: str
    seconds: float


@cache
def _steps(data: Path, model: str, options: str, threads: int) -> tuple[dict[str, Step], int]:
    """Steps of a process, made once, and their molecules."""
    torch.set_num_threads(threads)
    settings = argparse.Namespace(**json.loads(options), device=torch.device("cpu"))
    task, every = build_task(data, model, settings)
    which = chosen(every, _MIDDLE, settings.pairs // _MIDDLE**2)
    training = gradient_step(task, BatchIndex(0, which, every[which]))
    return {"training": training, "sampling": sampling_step(task, every[which])}, len(which)


def work(job: Job) -> tuple[float, int]:
    """Milliseconds by the clock of one step of a process, and its molecules."""
    settings = {"pairs": job.options.pairs, "low_precision": job.options.low_precision}
    steps, count = _steps(job.data, job.model, json.dumps(settings), job.threads)
    run, done = steps[job.kind], 0
    run()
    began = time.perf_counter()
    while time.perf_counter() < began + job.seconds:
        run()
        done += 1
    return 1e3 * (time.perf_counter() - began) / max(1, done), count


def measure_processes(
    data: Path, model: str, options: argparse.Namespace
) -> dict[str, tuple[float, float, int]]:
    """Milliseconds of a step of training and of one evaluation, and the molecules of a step.

    All processes of a row step at the same time; their molecules count together.
    """
    whole = torch.get_num_threads()
    rows = {f"{k} × {whole // k} (processes × threads)": k for k in (1, whole) if whole > 1}
    taken: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as stack:
        pools = {row: stack.enter_context(WorkerPool(k)) for row, k in rows.items()}
        for turn in range(_TURNS + 1):  # the first is for imports and data
            for (row, k), kind in product(rows.items(), ("training", "sampling")):
                seconds = options.seconds if turn else 0.0
                job = Job(data, model, options, whole // k, kind, seconds)
                found = [answer for _, answer in pools[row].map(work, repeat(job, k))]
                if turn:
                    rate = sum(count / milliseconds for milliseconds, count in found)
                    taken.setdefault((row, kind), []).append(found[0][1] / rate)
    count = max(1, options.pairs // _MIDDLE**2)
    return {
        f"{_MIDDLE}, {row}": (
            statistics.median(taken[row, "training"]),
            statistics.median(taken[row, "sampling"]) / _EVALUATIONS,
            count,
        )
        for row in rows
    }


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
    parser.add_argument("--only", choices=("losses", "networks", "scaling"))
    options = parser.parse_args()
    console = Console(width=120)
    where = torch.cuda.get_device_name() if options.device.type == "cuda" else "CPU"
    console.print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if options.only in (None, "losses"):
        measure_losses(options.data, options, console)
    if options.only in (None, "networks"):
        measure_networks(options.data, options, console)
    if options.only in (None, "scaling"):
        for model in options.models.split(","):
            measure_scaling(options.data, model, options, console)


if __name__ == "__main__":
    main()
