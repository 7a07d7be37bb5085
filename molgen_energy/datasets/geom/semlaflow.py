"""SemlaFlow's `train.smol`, `val.smol` and `test.smol` (Irwin et al., AISTATS 2025).

Each is a pickled list of bytes, a pickle for each molecule: a mapping with tensors `coords` (Å),
`atomics`, `charges`, and `bond_indices` with `bond_types`, or in older files both as `bonds`, and
`id`, a SMILES. The first conformer of each molecule, in MiDi's split of molecules. In memory are at
most 1,000 molecules of a list.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from molgen_energy.data.molecules import Molecule
from molgen_energy.datasets.geom.layout import Entry, PickledListLayout, arrays_to_molecule
from molgen_energy.formats.pickles import PickleError, read_pickle


class SemlaFlow(PickledListLayout):
    """`train.smol`, `val.smol`, `test.smol`."""

    name = "SemlaFlow's files"
    file_names = "train.smol, val.smol, test.smol"
    file_pattern = "{}.smol"

    @staticmethod
    def is_item(found: Any) -> bool:
        """Bytes."""
        return isinstance(found, bytes)

    @staticmethod
    def entry(item: Any) -> Entry:
        """A pickled molecule."""
        if not isinstance(item, bytes):
            raise ValueError("no pickled molecule")
        return Entry("", [item])

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
