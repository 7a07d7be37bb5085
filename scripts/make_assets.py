"""Make the files of `assets/` that are derived from QM9. Needs the package qm9pack.

python scripts/make_assets.py
"""

from __future__ import annotations

import gzip
import importlib.util
import re
from pathlib import Path

import numpy as np
from rdkit import rdBase

from molgen_energy.chemistry.bonds import bond_orders
from molgen_energy.chemistry.rdkit import build, judge
from molgen_energy.data.hdf5 import MoleculeWriter
from molgen_energy.data.molecules import Molecules
from molgen_energy.data.sources import qm9
from molgen_energy.resources import asset

SAMPLE = {0: 1000, 1: 200, 2: 800}
"""How many molecules of each of EDM's splits the bundled sample holds."""


def main() -> None:
    write_uncharacterised()
    molecules = qm9.read_qm9(None)
    split = qm9.split_of_edm()
    write_sample(molecules, split)
    write_training_smiles(molecules.select(np.flatnonzero(split == 0)))


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
    """Distinct SMILES of the training molecules, by the perception that judges samples."""
    smiles = set()
    for start in range(0, len(molecules), 1000):
        piece = molecules.select(np.arange(start, min(start + 1000, len(molecules))))
        positions, numbers = piece.padded()
        orders = bond_orders(positions, numbers)
        for z, order, size in zip(numbers, orders, piece.sizes, strict=True):
            verdict = judge(build(z[:size], order[:size, :size]))
            if verdict.smiles is not None:
                smiles.add(verdict.smiles)
    text = "\n".join([f"# RDKit {rdBase.rdkitVersion}", *sorted(smiles)]) + "\n"
    with (
        asset("qm9_train_smiles.txt.gz").open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as file,
    ):
        file.write(text.encode())


if __name__ == "__main__":
    main()
