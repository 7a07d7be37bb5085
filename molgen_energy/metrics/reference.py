"""What samples are compared with: real data, and the molecules that training saw."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

from rdkit import rdBase

from molgen_energy.chemistry.molfiles import MoleculeReader
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecules
from molgen_energy.errors import InputError
from molgen_energy.metrics.evaluation import training_smiles
from molgen_energy.resources import asset, bundled_sample

PIECE = 1000
_BUNDLED_SMILES = "qm9_train_smiles.txt.gz"


class MoleculeSource:
    """Molecules of any file that `evaluate` takes: SDF, XYZ (also gzip) or HDF5.

    Parameters
    ----------
    path
        The file.
    split
        Of an HDF5 file that has it, only these molecules (`train`, `test`); None takes all.
    skip_bad
        Leave out broken records and remember how many.

    Raises
    ------
    InputError
        There is no such file.
    """

    def __init__(self, path: Path, split: str | None = None, skip_bad: bool = False) -> None:
        if not path.is_file():
            raise InputError(f"{path} {'is a folder' if path.exists() else 'does not exist'}")
        self.path, self.split, self.skip_bad = path, split, skip_bad
        self.skipped = 0
        self.note = ""

    def pieces(self) -> Iterator[Molecules]:
        """The molecules, a thousand at a time."""
        if self.path.suffix.lower() in (".h5", ".hdf5"):
            with MoleculeFile(self.path) as file:
                split = self.split if len(file.members(self.split)) else None
                if split != self.split:
                    self.note = f"it has no {self.split} split; all its molecules are taken"
                yield from file.chunks(PIECE, split)
            return
        reader = MoleculeReader(self.path, self.skip_bad)
        yield from reader.chunks(PIECE)
        self.skipped = reader.skipped_count


def qm9_training_smiles() -> set[str] | None:
    """SMILES of QM9's 100,000 training molecules by our perception, as they ship.

    Canonical SMILES are RDKit's own and can change between its versions: where the version is not
    the one that wrote the list, molecules of the bundled sample are named again, and None is
    returned unless the list holds them.
    """
    with gzip.open(asset(_BUNDLED_SMILES), "rt", encoding="utf-8") as file:
        version, *names = file.read().splitlines()
    known = set(names)
    if version != f"# RDKit {rdBase.rdkitVersion}":
        train = MoleculeSource(bundled_sample(), split="train")
        if not training_smiles(train.pieces()) <= known:
            return None
    return known
