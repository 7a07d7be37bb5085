"""SemlaFlow's `train.smol`, `val.smol` and `test.smol` (Irwin et al., AISTATS 2025).

Each is a pickled list of bytes, a pickle for each molecule: a mapping with tensors `coords` (Å),
`atomics`, `charges`, and `bond_indices` with `bond_types`, or in older files both as `bonds`, and
`id`, a SMILES. The first conformer of each molecule, in MiDi's split of molecules. In memory are at
most 1,000 molecules of a list.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from molgen_energy.data.molecules import Molecule
from molgen_energy.datasets.geom.layout import Entry, Layout, SplitFiles, arrays_to_molecule
from molgen_energy.errors import InputError
from molgen_energy.formats.pickles import PickleError, iterate_pickle, pickle_file, read_pickle


class SemlaFlow(Layout):
    """`train.smol`, `val.smol`, `test.smol`."""

    name = "SemlaFlow's files"
    marks = "train.smol, val.smol, test.smol"

    def __init__(self, files: SplitFiles) -> None:
        self._files = files
        self.splits_molecules = files.is_set

    @classmethod
    def in_folder(cls, folder: Path) -> SemlaFlow | None:
        """The files of these names."""
        files = SplitFiles.in_folder(folder, "{}.smol")
        return cls(files) if files else None

    @classmethod
    def of_file(cls, path: Path, start: bytes) -> SemlaFlow | None:
        """A pickle whose first item is bytes."""
        if not start.startswith(b"\x80"):
            return None
        with pickle_file(path) as (file, size):
            first = next(iterate_pickle(file, size), None)
        return cls(SplitFiles.of_file(path)) if isinstance(first, bytes) else None

    def check_split(self) -> None:
        """All three files must be there."""
        self._files.check()

    def entries(self, own_split: bool) -> Iterator[Entry]:
        """All molecules, file by file."""
        for path, label in self._files.each(own_split):
            with pickle_file(path) as (file, size):
                for number, found in enumerate(iterate_pickle(file, size), start=1):
                    if not isinstance(found, bytes):
                        raise InputError(
                            f"{path}: item {number} is no pickled molecule; fetch it again"
                        )
                    yield Entry(f"{path.name}: molecule {number}", [found], splits=label)

    @staticmethod
    def decode(conformer: Any) -> Molecule:
        """A pickled mapping of tensors."""
        try:
            found = read_pickle(conformer)
        except PickleError as error:
            raise ValueError(f"its pickle is not read: {error}") from None
        if not isinstance(found, dict):
            raise ValueError("it is no mapping of tensors")
        if found.get("charges") is None:  # without them its bonds would not be read either
            raise ValueError("no charges")
        ends, codes = found.get("bond_indices"), found.get("bond_types")
        bonds = found.get("bonds")
        if codes is None and isinstance(bonds, np.ndarray) and bonds.ndim == 2:
            ends, codes = bonds[:, :2], bonds[:, 2:].ravel()
        return arrays_to_molecule(
            found.get("coords"), found.get("atomics"), found.get("charges"), ends, codes
        )
