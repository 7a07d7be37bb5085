"""How often the 95 % intervals of distances cover, and ranges of real molecules hold.

Training molecules of QM9, as they are and with noise, are cut into files. The table shows how many
per cent of the files have the value of all molecules together in their interval, and how many lie
within the range of as many real molecules. The whole set is evaluated like a file.

python benchmarks/coverage.py --data qm9.h5                     # 100,000 molecules, without FCD
python benchmarks/coverage.py --data qm9.h5 --molecules 30000 --fcd
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from molgen_energy.chemistry.geometry import QM9_TYPES
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import MoleculeChunk, Molecules
from molgen_energy.distributed import default_workers
from molgen_energy.metrics.accumulator import JACKKNIFE_GROUPS, EvaluationAccumulator
from molgen_energy.metrics.bundled import BUNDLED
from molgen_energy.metrics.checks.chunk import ChunkChecks, smiles_hash
from molgen_energy.metrics.distances.comparison import Comparison, Distributions, compare
from molgen_energy.metrics.distances.fcd import FEATURES, Moments, activations
from molgen_energy.metrics.distances.real_ranges import add_ranges
from molgen_energy.metrics.molecule_evaluation import check_chunks
from molgen_energy.metrics.options import EvaluationOptions, with_types
from molgen_energy.metrics.reference import Reference
from molgen_energy.metrics.statistics import Estimate
from molgen_energy.workers import WorkerPool

_BATCH_SIZE = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="QM9 as HDF5, with its splits")
    parser.add_argument("--molecules", type=int, default=100_000, help="of the whole set")
    parser.add_argument("--sizes", type=int, nargs="+", default=[300, 1000], help="of the files")
    parser.add_argument("--files", type=int, default=100, help="at most so many of each size")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.05], help="in Å")
    parser.add_argument("--fcd", action="store_true", help="with FCD, 4 ms a molecule")
    parser.add_argument("--workers", type=int, default=default_workers())
    arguments = parser.parse_args()
    with MoleculeFile(arguments.data) as file:
        some = file.load("train")
    rng = np.random.default_rng(0)
    some = some.select(rng.permutation(len(some))[: arguments.molecules])
    reference = BUNDLED["qm9"].load()
    shown = Table(title=f"% of files, cut from {len(some):,} molecules")
    shown.add_column("distance", no_wrap=True)
    columns: list[dict[str, str]] = []
    with WorkerPool(arguments.workers) as workers:
        for noise in arguments.noise:
            shift = noise * rng.standard_normal(some.positions.shape)
            noisy = replace(some, positions=(some.positions + shift).astype(np.float32))
            net = Activations() if arguments.fcd else None
            for size in arguments.sizes:
                whole, files = evaluated(noisy, size, arguments.files, reference, workers, net)
                name = f"{noise:g} Å, files of {size:,}"
                shown.add_column(f"{name}:\nvalue", justify="right")
                shown.add_column("mean of\nfiles", justify="right")
                shown.add_column("in the\ninterval", justify="right")
                shown.add_column("like\nreal", justify="right")
                columns += counted(whole, files)
    for key in columns[0]:
        shown.add_row(key, *(column.get(key, "") for column in columns))
    Console(width=200).print(shown)


class Activations:
    """ChemNet's activations of every distinct SMILES, computed once."""

    def __init__(self) -> None:
        from fcd.fcd import load_ref_model

        self._model = load_ref_model()
        self._row: dict[int, int] = {}
        self._stored = np.zeros((0, FEATURES), np.float32)

    def moments(self, smiles: list[str]) -> Moments:
        """Moments of the distinct SMILES by jackknife group, as `evaluate` has them."""
        by_hash = {smiles_hash(text): text for text in smiles}
        new = [key for key in by_hash if key not in self._row]
        found = [self._stored]
        for start in range(0, len(new), _BATCH_SIZE):
            batch = [by_hash[key] for key in new[start : start + _BATCH_SIZE]]
            found.append(activations(self._model, batch).astype(np.float32))
        first = len(self._row)
        self._row |= {key: first + k for k, key in enumerate(new)}
        self._stored = np.concatenate(found)
        moments = Moments()
        rows = self._stored[[self._row[key] for key in by_hash]].astype(np.float64)
        moments.add(rows, np.array([key % JACKKNIFE_GROUPS for key in by_hash]))
        return moments


def evaluated(
    molecules: Molecules,
    size: int,
    limit: int,
    reference: Reference,
    workers: WorkerPool,
    net: Activations | None,
) -> tuple[Comparison, list[Comparison]]:
    """Distances of all molecules, and of the files of `size` that they are cut into."""
    metrics = {"rates", "geometry", "composition"} | ({"fcd"} if net is not None else set())
    checks_settings = with_types(EvaluationOptions(frozenset(metrics)), QM9_TYPES).checks
    whole, smiles, files = EvaluationAccumulator(0), [], []
    for _, checks in check_chunks(cut(molecules, size), checks_settings, workers):
        whole.add(checks)
        names = [text for text in checks.whole_smiles if text is not None]
        smiles += names
        if len(files) < limit and len(checks.chunk) == size:
            files.append(compared(of_one(checks), reference, net, names))
    return compared(whole, reference, net, smiles), files


def cut(molecules: Molecules, size: int) -> Iterator[MoleculeChunk]:
    for start in range(0, len(molecules), size):
        chosen = np.arange(start, min(start + size, len(molecules)))
        yield MoleculeChunk(chosen + 1, molecules.select(chosen))


def of_one(checks: ChunkChecks) -> EvaluationAccumulator:
    accumulator = EvaluationAccumulator(0)
    accumulator.add(checks)
    return accumulator


def compared(
    accumulator: EvaluationAccumulator,
    reference: Reference,
    net: Activations | None,
    smiles: list[str],
) -> Comparison:
    moments = None if net is None else net.moments(smiles)
    found = compare(
        Distributions.of(accumulator, moments), reference.distributions, reference.types
    )
    if reference.ranges is not None:
        add_ranges(found, reference.ranges)
    return found


def counted(whole: Comparison, files: list[Comparison]) -> list[dict[str, str]]:
    """Columns by distance: value of all, mean of files, shares of files in interval and range."""
    value, mean, covered, real = columns = [dict[str, str]() for _ in range(4)]
    for key, estimate in whole.estimates.items():
        each = [file.estimates[key] for file in files]
        values = [e.value for e in each if e.value is not None]
        if estimate.value is None or not values:
            continue
        value[key], mean[key] = f"{estimate.value:.3g}", f"{np.mean(values):.3g}"
        covered[key] = share([is_in(estimate.value, e.interval) for e in each])
        real[key] = share([is_like_real(e) for e in each])
    return columns


def is_in(value: float, interval: tuple[float, float] | None) -> bool:
    return interval is not None and interval[0] <= value <= interval[1]


def is_like_real(estimate: Estimate) -> bool:
    known = estimate.real is not None and estimate.value is not None
    return known and estimate.real.place(estimate.value) == "like"


def share(hits: list[bool]) -> str:
    return f"{100 * np.mean(hits):.0f}"


if __name__ == "__main__":
    main()
