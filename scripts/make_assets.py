"""Make the files of `assets/` that are derived from QM9.

Needs the extras qm9, fcd, posebusters and xtb.

python scripts/make_assets.py
"""

from __future__ import annotations

import gzip
import importlib.util
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from rdkit import rdBase

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.geometry import QM9_TYPES
from molgen_energy.chemistry.rdkit import sanitize
from molgen_energy.data.hdf5 import MoleculeWriter
from molgen_energy.data.molecules import Molecules
from molgen_energy.datasets import qm9
from molgen_energy.distributed import default_workers
from molgen_energy.metrics.distances.real_ranges import StoredRanges
from molgen_energy.metrics.molecule_evaluation import evaluate_source
from molgen_energy.metrics.options import (
    METRIC_GROUPS,
    EvaluationOptions,
    is_missing,
    with_types,
)
from molgen_energy.metrics.reference import (
    bundled_training_hashes,
    evaluate_reference,
    resampled_ranges,
)
from molgen_energy.metrics.sources import FileSource
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
    write_uncharacterised()
    molecules = qm9.read_qm9(None)
    split = qm9.split_of_edm()
    write_sample(molecules, split)
    write_training_smiles(molecules.select(np.flatnonzero(split == 0)))
    write_test_statistics()


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


def write_test_statistics() -> None:
    """Statistics of QM9's test split, the default reference."""
    options = EvaluationOptions(metrics=frozenset(METRIC_GROUPS))
    missing = [name for name in METRIC_GROUPS if is_missing(name)]
    assert not missing, f"install the extras {missing} first"
    with (
        tempfile.TemporaryDirectory() as folder,
        WorkerPool(default_workers(), timeout=120) as workers,
    ):
        path = Path(folder) / "qm9.h5"
        qm9.QM9().make(path)
        training = bundled_training_hashes()
        reference = evaluate_reference(path, "QM9 test", options, QM9_TYPES, training, workers)
        fast = EvaluationOptions(frozenset({"rates", "geometry", "composition", "fcd"}))
        fast = replace(with_types(fast, QM9_TYPES), kept=TRAINING)
        source = FileSource(path, "train", limit=TRAINING)
        other = evaluate_source("training molecules", source, fast, None, workers)
        real = resampled_ranges([reference.evaluation, other], QM9_TYPES)
        reference.ranges = StoredRanges.of(real, RANGES, DRAWS, FCD_DRAWS)
        reference.save(asset("qm9_test_statistics.h5"), "QM9 (qm9pack), test split of EDM")


if __name__ == "__main__":
    main()
