"""Training from a file larger than memory need be, against training from memory.

python benchmarks/streaming.py --data qm9.h5 --molecules 5000000 --output big.h5

Makes the file by repeating the data's molecules (1.3 GB for five million of QM9; one that is there
is taken as it is), then trains the same small model from it and from the data themselves. With
--noise each copy has other positions, as conformers have. Drug-like molecules:

    python benchmarks/streaming.py --data ccd.h5 --molecules 1000000 --output big.h5 \\
        --noise 0.1 --pairs-per-batch 124000

Linux.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter

# Each training runs in a process of its own, which says what it took.
_CHILD = """
import json, re, sys, time
import torch
from pathlib import Path
from molgen_energy.systems.registry import load_config
from molgen_energy.data.batches import padding
from molgen_energy.systems.molecules.task import MoleculeTask
from molgen_energy.training.loop import train

def peak():  # MB; what getrusage says may be the parent's
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) / 1024

changes, run, window, windows = json.loads(sys.argv[1])
torch.set_num_threads(1)
imported, start = peak(), time.perf_counter()
task = MoleculeTask(load_config("quick").replaced(changes), torch.device("cpu"))
started, prepared = time.perf_counter() - start, peak()
molecules = task.state["data"]["training_samples"]
per_window = round(window * task.starts[1] / molecules)  # steps
changes["training.steps"] = changes["training.validate_every"] = per_window * windows
task.config = task.config.replaced(changes)
rows = []

class Windows:
    def __call__(self, step, steps, loss, samples_per_second):
        if step % per_window == 1:
            # The first step of a window is the one that waits for it.
            self.began = self.now
        self.now = spent()
        if step % per_window == 0:
            rows.append([now - began for now, began in zip(self.now, self.began)])

def spent():  # of both threads; where others use the machine, wall time says little
    return time.perf_counter(), task.seconds_waited, time.process_time()

callback = Windows()
callback.now = spent()
train(task, Path(run), callback)
batches = task.epoch(0)[: per_window * windows]
print(json.dumps({
    "rows": rows, "imported": imported, "prepared": prepared, "peak": peak(), "start": started,
    "padding": padding(batches), "windows": len({batch.window for batch in batches}),
    "molecules": molecules,
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="HDF5 of `preprocess`")
    parser.add_argument("--molecules", type=int, default=5_000_000)
    parser.add_argument("--output", type=Path, required=True, help="the large file")
    parser.add_argument("--window", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=6, help="how many to train on")
    parser.add_argument("--noise", type=float, default=0.0, help="Å, of the copies' positions")
    parser.add_argument("--pairs-per-batch", type=int, help="instead of 64 molecules")
    arguments = parser.parse_args()
    if not arguments.output.exists():
        start = time.perf_counter()
        repeat(arguments.data, arguments.molecules, arguments.output, arguments.noise)
        print(f"{arguments.molecules:,} molecules written in {time.perf_counter() - start:.0f} s")
    reading(arguments.output)
    results = {
        "streamed": trained(arguments.output, False, arguments),
        "resident": trained(arguments.data, True, arguments),
    }
    show(results, arguments)


def repeat(source: Path, count: int, target: Path, noise: float) -> None:
    """Write a file of so many molecules with the source's molecules and split, over and over."""
    random = np.random.default_rng(0)
    with MoleculeFile(source) as file, MoleculeWriter(target, source="benchmark") as writer:
        while writer.count < count:
            for start in range(0, len(file), 20_000):
                stop = min(start + 20_000, len(file), start + count - writer.count)
                if stop > start:
                    molecules = file.read(np.arange(start, stop))
                    shape = molecules.positions.shape
                    moved = noise * random.standard_normal(shape, np.float32)
                    writer.append(replace(molecules, positions=molecules.positions + moved))
        writer.set_split(np.resize(file.split, count))


def reading(path: Path) -> None:
    """How fast a window of the default size is read, with nothing else to do."""
    from molgen_energy.data.batches import StreamedData
    from molgen_energy.systems.molecules.config import MoleculeDataConfig

    window = MoleculeDataConfig().window
    data = StreamedData(
        MoleculeFile(path),
        lambda molecules, numbers, ranks, check_cancelled: molecules.positions.nbytes,
        molecules=window,
        batch_size=64,
        seed=0,
    )
    start = time.perf_counter()
    size = data.sample(window)
    seconds = time.perf_counter() - start
    data.close()
    print(
        f"a window of {window:,} molecules ({size / 1e6:.0f} MB of positions) is read in "
        f"{seconds:.2f} s: {window / seconds:,.0f} molecules/s"
    )


def trained(path: Path, in_memory: bool, arguments: argparse.Namespace) -> dict:
    """What a process says that trains on so many windows."""
    pairs = arguments.pairs_per_batch
    changes = {
        "data.path": str(path),
        "data.in_memory": in_memory,
        "data.window": arguments.window,
        "model.layers": 2,
        "model.width": 32,
        "training.checkpoint_every": 10**9,
        "training.lr": 1e-3,
    } | ({} if pairs is None else {"training.pairs_per_batch": pairs})
    with tempfile.TemporaryDirectory() as folder:
        given = json.dumps([changes, f"{folder}/run", arguments.window, arguments.windows])
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, given], stdout=subprocess.PIPE, text=True, check=True
        )
    return json.loads(done.stdout.splitlines()[-1])


def rates(molecules: int, seconds: float, waited: float, busy: float) -> list[str]:
    return [f"{molecules / seconds:,.0f}", f"{molecules / busy:,.0f}", f"{waited / seconds:.1%}"]


def show(results: dict[str, dict], arguments: argparse.Namespace) -> None:
    """Print throughput by window, and memory."""
    window, pairs = arguments.window, arguments.pairs_per_batch
    batch = "64" if pairs is None else f"{pairs:,} pairs"
    title = f"windows of {window:,} molecules, GDM 2×32, batches of {batch}, one thread"
    shown = Table(title=title)
    shown.add_column("window")
    for name in results:
        shown.add_column(f"{name}, molecules/s", justify="right")
        shown.add_column("a CPU s", justify="right")
        shown.add_column("waited", justify="right")
    for number, rows in enumerate(zip(*(r["rows"] for r in results.values()), strict=True)):
        cells = []
        for row in rows:
            cells += rates(window, *row)
        shown.add_row(str(number + 1), *cells)
    shown.add_section()
    totals = []
    for result in results.values():
        totals += rates(window * len(result["rows"]), *np.sum(result["rows"], axis=0))
    shown.add_row("all", *totals)
    lines = {
        "training molecules": lambda r: f"{r['molecules']:,}",
        "windows met": lambda r: str(r["windows"]),
        "start, s": lambda r: f"{r['start']:.1f}",
        "peak MB: imports": lambda r: f"{r['imported']:.0f}",
        "peak MB: start": lambda r: f"{r['prepared']:.0f}",
        "peak MB: in all": lambda r: f"{r['peak']:.0f}",
        "padding: atoms": lambda r: f"{r['padding'][0]:.1%}",
        "padding: pairs": lambda r: f"{r['padding'][1]:.1%}",
    }
    for name, line in lines.items():
        shown.add_row(name, *(cell for r in results.values() for cell in (line(r), "", "")))
    Console(width=100).print(shown)


if __name__ == "__main__":
    main()
