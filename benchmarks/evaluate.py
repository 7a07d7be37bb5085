"""Time and memory of evaluation, against the plain way of writing it.

python benchmarks/evaluate.py                      # the bundled sample, repeated
python benchmarks/evaluate.py --data qm9.h5        # ten thousand different molecules
python benchmarks/evaluate.py --data qm9.h5 --million
python benchmarks/evaluate.py --drugs ccd.h5       # a thousand molecules of 40 to 50 atoms
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rdkit import Chem, RDLogger
from rich.console import Console
from rich.table import Table

from molgen_energy.chemistry.bonds import DOUBLE, MARGINS, SINGLE, TRIPLE
from molgen_energy.chemistry.molfiles import MoleculeTextWriter
from molgen_energy.chemistry.valence import EDM_VALENCES
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import Molecules
from molgen_energy.distributed import default_workers
from molgen_energy.elements import symbol
from molgen_energy.metrics.distances.mmd import mmd
from molgen_energy.resources import bundled_sample

_KINDS = (None, Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE)

# Run in a process of its own, which says what it took: seconds, seconds of all processors, its own
# peak and that of its largest worker, in MB.
_CHILD = """
import json, resource, sys, time
from molgen_energy.cli import main
sys.argv = ["molgen-energy", "evaluate", *sys.argv[1:]]
start = time.perf_counter()
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
seconds = time.perf_counter() - start
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
busy = sum(each.ru_utime + each.ru_stime for each in used)
print(json.dumps([seconds, busy, *(each.ru_maxrss / 1024 for each in used)]), file=sys.stderr)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=None, help="HDF5 with a test split")
    parser.add_argument("--molecules", type=int, default=10_000)
    parser.add_argument("--naive", type=int, default=1_000, help="molecules for the plain way")
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--million", action="store_true", help="files of up to 1,000,000 molecules")
    parser.add_argument("--drugs", type=Path, help="only the table of this file, such as ccd.h5")
    arguments = parser.parse_args()
    if arguments.drugs is not None:
        with tempfile.TemporaryDirectory() as folder:
            drugs(arguments.drugs, arguments.workers, Path(folder))
        return
    molecules = load(arguments.data, arguments.molecules)
    with tempfile.TemporaryDirectory() as folder:
        rates(molecules, arguments.naive, arguments.workers, Path(folder))
        discrepancy()
        if arguments.million:
            growth(molecules, arguments.workers, Path(folder))


def load(path: Path | None, count: int) -> Molecules:
    with MoleculeFile(path or bundled_sample()) as file:
        some = file.load("test")
    chosen = np.random.default_rng(0).permutation(len(some))
    return some.select(np.resize(chosen, count))


def naive(molecules: Molecules) -> tuple[int, int]:
    """Stable and valid molecules by a loop over pairs of atoms."""
    stable = valid = 0
    for molecule in molecules:
        names = [symbol(int(z)) for z in molecule.atomic_numbers]
        built = Chem.RWMol()
        for name in names:
            built.AddAtom(Chem.Atom(name))
        sums = np.zeros(len(names), int)
        for i in range(len(names)):
            for j in range(i):
                distance = 100 * np.sqrt(
                    np.sum((molecule.positions[i] - molecule.positions[j]) ** 2)
                )
                order = 0
                for k, table in enumerate((SINGLE, DOUBLE, TRIPLE)):
                    a, b = names[i], names[j]
                    length = table.get(a, {}).get(b) or table.get(b, {}).get(a)
                    if length is not None and distance < length + MARGINS[k]:
                        order = k + 1
                sums[i] += order
                sums[j] += order
                if order:
                    built.AddBond(i, j, _KINDS[order])
        stable += all(s in EDM_VALENCES[name] for s, name in zip(sums, names, strict=True))
        valid += Chem.SanitizeMol(built, catchErrors=True) == 0
    return stable, valid


class Measured(NamedTuple):
    """What a command took."""

    seconds: float
    busy: float  # seconds of all processors, which other programs on a machine hardly change
    peak: float  # MB
    worker: float  # MB of the largest worker


def evaluated(*arguments: object) -> Measured:
    """What `evaluate` takes in a process of its own."""
    import json

    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *map(str, arguments), "--json", "-"],
        capture_output=True,
        text=True,
        check=True,
    )
    return Measured(*json.loads(done.stderr.splitlines()[-1]))


def rates(molecules: Molecules, few: int, workers: int, folder: Path) -> None:
    RDLogger.DisableLog("rdApp.*")
    count = len(molecules)
    paths = [folder / "a.h5", folder / "a.sdf"]
    with MoleculeWriter(paths[0], source="benchmark") as writer:
        writer.append(molecules)
    with MoleculeTextWriter(paths[1], {}) as text:
        text.append(molecules)
    start = time.perf_counter()
    naive(molecules.select(np.arange(few)))
    plain = (time.perf_counter() - start) * count / few
    shown = Table(title=f"{count:,} molecules, {workers} workers, whole command")
    for title in ("", "s", "molecules/s", "of the plain way's time", "MB", "MB a worker"):
        shown.add_column(title, justify="right")
    shown.add_row("plain loops, one process", f"{plain:.1f}", f"{count / plain:,.0f}", "1", "", "")
    for path in paths:
        for metrics in ("rates", "rates,geometry,composition", "rates,geometry,composition,strain"):
            seconds, _, peak, each = evaluated(path, "--metrics", metrics, "--workers", workers)
            shown.add_row(
                f"{path.suffix[1:]}: {metrics}",
                f"{seconds:.1f}",
                f"{count / seconds:,.0f}",
                f"{seconds / plain:.2f}",
                f"{peak:.0f}",
                f"{each:.0f}",
            )
    Console(width=120).print(shown)


def drugs(path: Path, workers: int, folder: Path) -> None:
    """Whole commands on molecules of the size of drugs, of the test split of a file with bonds."""
    with MoleculeFile(path) as file:
        test = file.load("test")
    fitting = np.flatnonzero((test.sizes >= 40) & (test.sizes <= 50))
    chosen = np.sort(np.random.default_rng(0).permutation(fitting)[:1000])
    sdf = folder / "drugs.sdf"
    with MoleculeTextWriter(sdf, {}) as text:
        text.append(test.select(chosen))
    shown = Table(title=f"{len(chosen):,} molecules of 40 to 50 atoms, SDF, {workers} workers")
    for title in ("", "s", "s of processors", "MB", "MB a worker"):
        shown.add_column(title, justify="right")
    cases: dict[str, tuple[object, ...]] = {
        "rates": ("--metrics", "rates"),
        "defaults": (),
        "defaults, posebusters": ("--metrics", "default,posebusters"),
        f"defaults, --reference {path.name}": ("--reference", path),
    }
    for name, options in cases.items():
        took = evaluated(sdf, "--workers", workers, *options)
        shown.add_row(
            name,
            f"{took.seconds:.1f}",
            f"{took.busy:.1f}",
            f"{took.peak:.0f}",
            f"{took.worker:.0f}",
        )
    Console(width=120).print(shown)


def pairs(source: np.ndarray, target: np.ndarray, size: int = 1000) -> float:
    """MMD by the double sum, a thousand rows at a time."""
    both = np.concatenate([source, target])
    width = 2 * both.var() * len(both) / (len(both) - 1) / 4
    total = 0.0
    weight = np.repeat([1 / len(source), -1 / len(target)], [len(source), len(target)])
    for start in range(0, len(both), size):
        squared = (both[start : start + size, None] - both[None]) ** 2
        for k in range(5):
            rows = np.exp(-squared / (width * 2**k)) @ weight
            total += float(weight[start : start + size] @ rows)
    return total


def discrepancy() -> None:
    rng = np.random.default_rng(0)
    source, target = rng.normal(1.5, 0.02, 20_000), rng.normal(1.502, 0.03, 20_000)
    shown = Table(title="MMD of 20,000 against 20,000 values")
    for title in ("", "s", "MB", "value"):
        shown.add_column(title, justify="right")
    mmd(source[:9], target[:9])  # imports
    for name, function in (("double sum, in chunks", pairs), ("convolution", mmd)):
        start = time.perf_counter()
        value = function(source, target)
        seconds = time.perf_counter() - start
        tracemalloc.start()
        if function is mmd:
            function(source, target)
        else:
            function(source[:2000], target)  # the peak is that of one chunk
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        shown.add_row(name, f"{seconds:.4f}", f"{peak:.0f}", f"{value:.9f}")
    Console(width=120).print(shown)


def growth(molecules: Molecules, workers: int, folder: Path) -> None:
    shown = Table(title="one file, all default metrics")
    for title in ("molecules", "s", "molecules/s", "MB", "MB a worker"):
        shown.add_column(title, justify="right")
    for count in (10_000, 100_000, 1_000_000):
        path = folder / f"{count}.h5"
        with MoleculeWriter(path, source="benchmark") as writer:
            for _ in range(count // len(molecules)):
                writer.append(molecules)
        seconds, _, peak, each = evaluated(path, "--workers", workers)
        shown.add_row(
            f"{count:,}", f"{seconds:.0f}", f"{count / seconds:,.0f}", f"{peak:.0f}", f"{each:.0f}"
        )
        path.unlink()
    Console(width=120).print(shown)


if __name__ == "__main__":
    main()
