"""Time of an evaluation of the network in sampling on a CPU, for each molecule.

python benchmarks/sample_step.py
python benchmarks/sample_step.py --checkpoint ccd_energy -n 20 --rounds 5

Compares, in turns, float32 with all cores at each batch, float32 with a batch for each core, and
bfloat16 for pairs with a batch for each core. Prints the least of all rounds: seconds of the clock,
and of all processors, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from molgen_energy.cli.console import exit_on_error
from molgen_energy.models.precision import is_bfloat16_faster
from molgen_energy.systems.molecules import sampling
from molgen_energy.systems.molecules.generate import MoleculeGenerator
from molgen_energy.systems.molecules.threads import DrawingThreads
from molgen_energy.training.checkpoint import load_checkpoint
from molgen_energy.training.devices import choose_device
from molgen_energy.training.pretrained import resolve_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=Path("qm9_energy"))
    parser.add_argument("-n", "--molecules", type=int, default=100)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    with exit_on_error():
        compare(parser.parse_args())


def compare(arguments: argparse.Namespace) -> None:
    device = choose_device("cpu")
    loaded = load_checkpoint(resolve_checkpoint(arguments.checkpoint), weights=["ema"])
    exact, rough = (
        MoleculeGenerator(loaded, device, low_precision=low_precision, steps=arguments.steps)
        for low_precision in (False, True)
    )
    cores = torch.get_num_threads()
    ways: dict[str, Callable[[], None]] = {
        "float32, all cores at each batch": lambda: draw(exact, arguments.molecules, 1),
        "float32, a batch for each core": lambda: draw(exact, arguments.molecules, cores),
        "bfloat16, a batch for each core": lambda: draw(rough, arguments.molecules, cores),
    }
    for generator in (exact, rough):
        draw(generator, 4, 1)
    evaluations = arguments.molecules * exact.sampler.evaluations
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(arguments.rounds):
        for way, work in ways.items():
            clock, processors = time.perf_counter(), time.process_time()
            work()
            seconds[way].append((time.perf_counter() - clock, time.process_time() - processors))
    title = (
        f"{arguments.molecules} molecules from {exact.checkpoint.origin}, {cores} cores, ms for "
        "each molecule and evaluation"
    )
    table = Table(title=title)
    for column in ("", "clock", "processors"):
        table.add_column(column, justify="right" if column else "left")
    for way, measured in seconds.items():
        least = [1000 * min(column) / evaluations for column in zip(*measured, strict=True)]
        table.add_row(way, *(f"{value:.2f}" for value in least))
    Console(width=120).print(table)
    used = "bfloat16" if is_bfloat16_faster(device, training=False) else "float32"
    print(f"sample uses {used} here for networks that were trained in bfloat16")


def draw(generator: MoleculeGenerator, count: int, threads: int) -> None:
    """Draw molecules in the batches of `sample`."""
    numbers = torch.arange(count)
    job = sampling._job(generator, count, None)
    batches = [numbers[which] for which in sampling._by_size(generator.sizes(numbers).numpy(), job)]

    def work(batch: Tensor) -> None:
        generator.draw(batch, lambda: run.advance(0, 0))

    run = DrawingThreads(work, lambda samples, share: None)
    run.run(iter(batches), min(threads, len(batches)))


if __name__ == "__main__":
    main()
