"""Time and memory of the losses, forward and backward.

    python benchmarks/losses.py                    # CPU, a minute; --device cuda for a GPU
    python benchmarks/losses.py --whole            # and the complete energy of 30,000 atoms

First the complete energy and the same formula on a tensor (B, N, N, 3) with PyTorch's automatic
gradients; then the terms of torsions and chirality on molecules of QM9, with the enumeration of
their coordinates from bonds; then each loss on one cloud of n points (Table 11 of Kaba et al.,
NeurIPS 2025). Times are medians, with the losses of a row in turns, so that other load slows all of
them equally.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.losses import (
    ChiralityError,
    KabschError,
    Loss,
    MeanSquaredError,
    PairwiseEnergy,
    SparseEdges,
    TorsionError,
)
from molgen_energy.resources import bundled_sample

Step = Callable[[], Tensor]


def naive_energy(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The equation with exponential springs, without blocks."""
    pairs = mask[:, :, None] & mask[:, None, :]
    pairs = pairs & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    now = (prediction[:, :, None] - prediction[:, None, :]).norm(dim=-1)
    rest = (target[:, :, None] - target[:, None, :]).norm(dim=-1)
    terms = 0.5 * torch.exp(-rest) * (rest - now) ** 2
    return torch.where(pairs, terms, 0).sum(dim=(1, 2)) / mask.sum(dim=1)


def step(loss: Callable[..., Tensor], prediction: Tensor, *data: Tensor, **inputs: Tensor) -> Step:
    """One evaluation with its gradient, as a function that returns the gradient."""

    def run() -> Tensor:
        value = prediction.detach().requires_grad_()
        loss(value, *data, **inputs).mean().backward()  # type: ignore[no-untyped-call]
        if value.is_cuda:
            torch.cuda.synchronize()
        assert value.grad is not None
        return value.grad

    return run


def times(
    steps: dict[str, Step],
    seconds: float,
    at_most: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median milliseconds of each step, by a clock, in turns for so many seconds."""
    for run in steps.values():
        run()
        run()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until and len(next(iter(taken.values()))) < at_most:
        for name, run in steps.items():
            began = clock()
            run()
            taken[name].append(1e3 * (clock() - began))
    return {name: median(values) for name, values in taken.items()}


def peak_memory(run: Step, device: torch.device) -> float:
    """Peak memory of a step in megabytes, beyond that before it."""
    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak / 1e6


def compare_with_naive(device: torch.device, console: Console, seconds: float) -> None:
    generator = torch.Generator().manual_seed(0)
    target = 2 * torch.randn(512, 25, 3, generator=generator)
    prediction = target + 0.3 * torch.randn(target.shape, generator=generator)
    sizes = torch.randint(20, 26, (512,), generator=generator)
    mask = torch.arange(25)[None] < sizes[:, None]
    data = [values.to(device) for values in (prediction, target, mask)]
    steps = {"naive": step(naive_energy, *data), "energy": step(PairwiseEnergy(), *data)}
    # The gradient of the naive root is NaN at distance 0: use the variant without zeros.
    exact = step(naive_energy_safe, *(x.double() if x.is_floating_point() else x for x in data))()
    error = float((steps["energy"]() - exact).norm() / exact.norm())
    took = times(steps, seconds, 1000)
    held = {name: peak_memory(run, device) for name, run in steps.items()}
    table = Table(title="complete energy, B = 512, n = 25, forward and backward")
    for column in ("", "ms", "peak MB"):
        table.add_column(column, justify="right")
    for name in steps:
        table.add_row(name, f"{took[name]:.2f}", f"{held[name]:.1f}")
    ratios = (v["energy"] / v["naive"] for v in (took, held))
    table.add_row("energy/naive", *(f"{ratio:.2f}" for ratio in ratios))
    console.print(table)
    console.print(f"gradient against float64: relative error {error:.1e}")


def naive_energy_safe(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """`naive_energy` with a gradient that is finite on the diagonal."""
    shift = torch.eye(mask.shape[1], device=mask.device, dtype=prediction.dtype)[None, :, :, None]
    pairs = mask[:, :, None] & mask[:, None, :]
    pairs = pairs & ~torch.eye(mask.shape[1], dtype=torch.bool, device=mask.device)
    now = (prediction[:, :, None] - prediction[:, None, :] + shift).norm(dim=-1)
    rest = (target[:, :, None] - target[:, None, :]).norm(dim=-1)
    terms = 0.5 * torch.exp(-rest) * (rest - now) ** 2
    return torch.where(pairs, terms, 0).sum(dim=(1, 2)) / mask.sum(dim=1)


def measure_terms(device: torch.device, console: Console, seconds: float) -> None:
    losses: dict[str, Loss] = {
        "mse": MeanSquaredError(),
        "energy": PairwiseEnergy(),
        "torsion": TorsionError(),
        "torsion, projected": TorsionError("projected"),
        "chirality": ChiralityError(),
        "chirality, projected": ChiralityError("projected"),
    }
    with MoleculeFile(bundled_sample()) as file:
        sample = perceive(file.load("train"))
    table = Table(title="molecules of QM9, ms, forward and backward")
    for column in ("B", *losses, "torsion/energy"):
        table.add_column(column, justify="right")
    for count in (64, 512):
        molecules = sample.select(np.arange(count))
        positions, numbers = molecules.padded()
        assert molecules.bonds is not None
        owner = np.repeat(np.arange(count), np.diff(molecules.bonds.offsets))
        bonds = np.stack([owner, *molecules.bonds.index.T.astype(np.int64)])
        target = torch.from_numpy(positions)
        prediction = target + 0.3 * torch.randn(
            target.shape, generator=torch.Generator().manual_seed(0)
        )
        mask = torch.from_numpy(numbers > 0)
        data = [values.to(device) for values in (prediction, target, mask)]
        given = {"bonds": torch.from_numpy(bonds).to(device)}
        steps = {
            name: step(loss, *data, **(given if "bonds" in loss.requires else {}))
            for name, loss in losses.items()
        }
        took = times(steps, seconds, 1000)
        ratio = took["torsion"] / took["energy"]
        table.add_row(str(count), *(f"{took[name]:.2f}" for name in losses), f"{ratio:.2f}")
    console.print(table)


def measure_by_size(device: torch.device, console: Console, seconds: float, whole: bool) -> None:
    losses: dict[str, Loss] = {
        "mse": MeanSquaredError(),
        "energy": PairwiseEnergy(),
        "energy, sparse": PairwiseEnergy(edges=SparseEdges(pool=4)),
        "kabsch": KabschError(),
    }
    table = Table(title="one cloud of n points, ms, forward and backward")
    for column in ("n", *losses, "sparse/kabsch"):
        table.add_column(column, justify="right")
    for n in (30, 300, 3000, 30_000, 300_000):
        generator = torch.Generator().manual_seed(n)
        target = torch.randn(1, n, 3, generator=generator) * n ** (1 / 3)
        prediction = target + 0.1 * torch.randn(target.shape, generator=generator)
        data = [values.to(device) for values in (prediction, target)]
        steps = {
            name: step(loss, *data)
            for name, loss in losses.items()
            if name != "energy" or n <= 3000
        }
        took = times(steps, seconds, 1000)
        if n == 30_000 and whole:  # once: 900 million pairs
            began = time.perf_counter()
            step(losses["energy"], *data)()
            took["energy"] = 1e3 * (time.perf_counter() - began)
        ratio = took["energy, sparse"] / took["kabsch"]
        cells = [f"{took[name]:.3f}" if name in took else "–" for name in losses]
        table.add_row(f"{n:,}", *cells, f"{ratio:.2f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    parser.add_argument("--whole", action="store_true", help="30,000 points on complete edges too")
    options = parser.parse_args()
    console = Console()
    where = torch.cuda.get_device_name() if options.device.type == "cuda" else "CPU"
    console.print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    compare_with_naive(options.device, console, options.seconds)
    measure_terms(options.device, console, options.seconds)
    measure_by_size(options.device, console, options.seconds, options.whole)


if __name__ == "__main__":
    main()
