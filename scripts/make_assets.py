"""Make the files of `assets/` that are derived from QM9 and from CCD.

Needs the extras qm9, ccd, fcd, posebusters and xtb.

    python scripts/make_assets.py
    python scripts/make_assets.py --only ccd --ccd ccd.h5
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rdkit import rdBase

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.geometry import QM9_TYPES, GeometryTypes
from molgen_energy.chemistry.rdkit import sanitize
from molgen_energy.chemistry.valence import VALENCE_MODELS
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import Molecules
from molgen_energy.datasets import qm9
from molgen_energy.datasets.ccd import ChemicalComponents
from molgen_energy.distributed import default_workers
from molgen_energy.metrics.bundled import BUNDLED, choose_probes
from molgen_energy.metrics.distances.real_ranges import StoredRanges
from molgen_energy.metrics.molecule_evaluation import MoleculeEvaluation, evaluate_source
from molgen_energy.metrics.options import (
    METRIC_GROUPS,
    EvaluationOptions,
    is_missing,
    of_both,
    with_bonds,
    with_types,
)
from molgen_energy.metrics.reference import (
    Reference,
    evaluate_reference,
    frequent_types,
    resampled_ranges,
)
from molgen_energy.metrics.sources import FileSource
from molgen_energy.metrics.statistics import Rate
from molgen_energy.resources import asset
from molgen_energy.workers import WorkerPool

SAMPLE = {0: 1000, 1: 200, 2: 800}
"""How many molecules of each of EDM's splits the bundled sample holds."""

RANGES = (20, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 20_000, 30_000)
"""Numbers of molecules of the stored ranges of real molecules."""
TRAINING = 32_000
"""Training molecules that these are drawn from, with the test split: 30,000 distinct valid ones
for FCD."""
DRAWS, FCD_DRAWS = 1000, 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("qm9", "ccd"), help="make the files of one data set")
    parser.add_argument("--ccd", type=Path, help="CCD as `preprocess ccd` makes it by default")
    arguments = parser.parse_args()
    missing = [name for name in METRIC_GROUPS if is_missing(name)]
    assert not missing, f"install the extras {missing} first"
    if arguments.only != "ccd":
        write_uncharacterised()
        molecules = qm9.read_qm9(None)
        split = qm9.split_of_edm()
        write_sample(molecules, split)
        write_training_smiles(molecules.select(np.flatnonzero(split == 0)))
        write_qm9_statistics()
    if arguments.only != "qm9":
        with tempfile.TemporaryDirectory() as folder:
            path = arguments.ccd
            if path is None:
                path = Path(folder) / "ccd.h5"
                ChemicalComponents().make(path)
            write_ccd_statistics(path)


def write_uncharacterised() -> None:
    """The numbers that qm9pack lacks among 1 to 133,885."""
    spec = importlib.util.find_spec("qm9pack")
    assert spec is not None and spec.submodule_search_locations
    present: set[int] = set()
    for part in Path(spec.submodule_search_locations[0], "data").glob("qm9_part*.csv"):
        present.update(map(int, re.findall(r'^"dsgdb9nsd_(\d+)', part.read_text(), re.M)))
    absent = sorted(set(range(1, qm9.MOLECULES_WITH_UNCHARACTERISED + 1)) - present)
    asset("qm9_uncharacterized.txt").write_text("\n".join(map(str, absent)) + "\n")


def write_sample(molecules: Molecules, split: np.ndarray) -> None:
    """A random sample that keeps EDM's split, so that nothing trained on it saw a test molecule."""
    rng = np.random.default_rng(0)
    chosen = np.sort(
        np.concatenate(
            [rng.choice(np.flatnonzero(split == k), count, False) for k, count in SAMPLE.items()]
        )
    )
    source = "2,000 molecules of QM9 (Ramakrishnan et al. 2014, CC BY 4.0; from qm9pack, MIT)"
    with MoleculeWriter(asset("qm9_sample.h5"), source=source, compress=True) as writer:
        writer.append(molecules.select(chosen))
        writer.set_split(split[chosen])


def write_training_smiles(molecules: Molecules) -> None:
    """Distinct SMILES of the training molecules, with perceived bonds like those of samples."""
    smiles = {sanitize(molecule).smiles for molecule in perceive(molecules)} - {None}
    text = "\n".join([f"# RDKit {rdBase.rdkitVersion}", *sorted(filter(None, smiles))]) + "\n"
    with (
        asset("qm9_train_smiles.txt.gz").open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as file,
    ):
        file.write(text.encode())


def write_qm9_statistics() -> None:
    """Statistics of QM9's test split, the default reference, with perceived bonds."""
    options = EvaluationOptions(metrics=frozenset(METRIC_GROUPS))
    training = BUNDLED["qm9"].training_hashes()
    with tempfile.TemporaryDirectory() as folder, _pool() as workers:
        path = Path(folder) / "qm9.h5"
        qm9.QM9().make(path)
        reference = evaluate_reference(path, "QM9 test", options, QM9_TYPES, training, workers)
        other = _training_molecules(path, options, QM9_TYPES, TRAINING, workers)
        _add_ranges(reference, other)
        rates = {"perceived": _rates(path, "perceived", training, workers)}
    source = "QM9 (qm9pack), test split of EDM"
    reference.save(asset("qm9_test_statistics.h5"), source, rates=rates)


def write_ccd_statistics(path: Path) -> None:
    """Statistics of CCD's test split, with given and with perceived bonds, and their agreement.

    Rates are there for every table of valences, also with single bonds.
    """
    references: list[Reference] = []
    rates: dict[str, dict[str, dict[str, Rate | None]]] = {}
    test = FileSource(path, "test")
    with _pool() as workers:
        for bonds in ("given", "perceived"):
            options = EvaluationOptions(metrics=frozenset(METRIC_GROUPS), bonds=bonds)
            options = with_bonds(of_both(options, bonds), bonds)
            types = frequent_types(test, options, workers)
            other = _training_molecules(path, options, types, None, workers)
            training = other.accumulator.smiles.hashes
            reference = evaluate_reference(path, "CCD test", options, types, training, workers)
            _add_ranges(reference, other)
            reference.training, reference.probes = training, _probes(path, bonds)
            references.append(reference)
            rates[bonds] = _rates(path, bonds, training, workers)
        rates["single"] = _rates(path, "single", None, workers)
    with MoleculeFile(path) as file:
        source = f"{file.source}, test split by scaffold"
    references[0].save(asset("ccd_test_statistics.h5"), source, references[1:], rates, compact=True)


def _pool() -> WorkerPool:
    return WorkerPool(default_workers(), timeout=300)


def _training_molecules(
    path: Path,
    options: EvaluationOptions,
    types: GeometryTypes,
    limit: int | None,
    workers: WorkerPool,
) -> MoleculeEvaluation:
    """The fast metrics of training molecules, with what sets of real molecules are drawn from."""
    fast = replace(options, metrics=options.metrics - {"strain", "xtb", "posebusters"})
    source = FileSource(path, "train", limit=limit)
    fast = replace(with_types(fast, types), kept=source.size() or 0)
    return evaluate_source("training molecules", source, fast, None, workers)


def _add_ranges(reference: Reference, other: MoleculeEvaluation) -> None:
    real = resampled_ranges([reference.evaluation, other], reference.types)
    reference.ranges = StoredRanges.of(real, RANGES, DRAWS, FCD_DRAWS)


def _rates(
    path: Path, bonds: str, training: NDArray[np.uint64] | None, workers: WorkerPool
) -> dict[str, dict[str, Rate | None]]:
    """Rates of the test split by each table of valences."""
    found: dict[str, dict[str, Rate | None]] = {}
    for valence in VALENCE_MODELS:
        options = EvaluationOptions(frozenset({"rates"}), bonds=bonds, valence=valence)
        options = with_types(with_bonds(options, bonds), None)
        source = FileSource(path, "test")
        evaluation = evaluate_source(valence, source, options, training, workers)
        rates = evaluation.accumulator.counts.rates()
        found[valence] = {key: rate for key, rate in rates.items() if rate is not None}
    return found


def _probes(path: Path, bonds: str) -> list[str]:
    """SMILES of some training molecules, as `evaluate` names them."""
    with MoleculeFile(path) as file:
        some = file.read(file.split_indices("train")[:2000:4], ["bonds", "formal_charges"])
    if bonds == "perceived":
        some = perceive(some)
    names = {sanitize(molecule).smiles for molecule in some}
    return choose_probes(name for name in names if name is not None)


if __name__ == "__main__":
    main()
