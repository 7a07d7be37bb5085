"""JODO's list of PyTorch Geometric's `Data` (Huang et al., 2023, `build_geom_dataset.py`).

`data_geom_drug_1.pt` has the conformer of lowest energy of each molecule, others more of them one
after another; `split_dict_geom_drug_1.pt` the numbers of items for training, validation and test.
Where there are several conformers of a molecule, that split does not keep them together. In memory
are at most 1,000 items of a list.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import Molecule
from molgen_energy.datasets.geom.layout import (
    Entry,
    Layout,
    RawMolecule,
    arrays_to_molecule,
    joined,
    single_file,
)
from molgen_energy.errors import InputError
from molgen_energy.formats.pickles import Record
from molgen_energy.formats.torch_files import MARK, TorchFile

_ELEMENTS = np.array([1, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 33, 35, 53, 80, 83])
"""Atomic numbers by the number of the type: H B C N O F Al Si P S Cl As Br I Hg Bi."""
_NAME = re.compile(r"data_(geom_drug_\d+)\.pt")
_SPLIT = ("train", "valid", "test")
_MOST_SPLIT = 100_000_000  # items


class JODO(Layout):
    """`data_geom_drug_1.pt`."""

    name = "JODO's file"
    file_names = "data_geom_drug_1.pt with split_dict_geom_drug_1.pt"

    def __init__(self, path: Path) -> None:
        self._path = path
        match = _NAME.fullmatch(path.name)
        self._split = path.with_name(f"split_dict_{match[1]}.pt") if match else None
        self.splits_molecules = match is not None and match[1] == "geom_drug_1"

    @classmethod
    def in_folder(cls, folder: Path) -> JODO | None:
        """The one file of such a name in a folder."""
        paths = [path for path in sorted(folder.glob("data_*.pt")) if _NAME.fullmatch(path.name)]
        path = single_file(folder, paths)
        return None if path is None else cls(path)

    @classmethod
    def of_file(cls, path: Path, start: bytes) -> JODO | None:
        """A file of PyTorch whose first item is a record."""
        if not start.startswith(MARK):
            return None
        first = next(TorchFile(path).items(), None)
        return cls(path) if isinstance(first, Record) else None

    def check_split(self) -> None:
        """The file of the split must be there."""
        if self._split is None or not self._split.exists():
            raise InputError(
                f"{self._split} does not exist, which has JODO's split; fetch it, or pass "
                "--split-by random"
            )

    def entries(self, own_split: bool) -> Iterator[Entry]:
        """All molecules, in the order of the file."""
        yield from joined(self._conformers(self._labels() if own_split else None))

    @staticmethod
    def decode(conformer: Any) -> Molecule:
        """The attributes of an item, with each bond once."""
        positions, kinds, charges, ends, codes = conformer
        if not all(isinstance(array, np.ndarray) for array in conformer):
            raise ValueError("an item lacks pos, atom_type, fc, edge_index or edge_type")
        if kinds.dtype.kind not in "iu" or not ((kinds >= 0) & (kinds < len(_ELEMENTS))).all():
            raise ValueError(f"an atom_type is not from 0 to {len(_ELEMENTS) - 1}")
        if ends.ndim != 2 or len(ends) != 2 or codes.shape != ends.shape[1:]:
            raise ValueError(f"edge_index of shape {ends.shape}, edge_type of {codes.shape}")
        once = ends[0] < ends[1]
        if 2 * once.sum() != len(once):
            raise ValueError("edge_index does not hold each bond in both directions")
        return arrays_to_molecule(
            positions, _ELEMENTS[kinds], charges, ends[:, once].T, codes[once]
        )

    def _conformers(
        self, labels: NDArray[np.uint8] | None
    ) -> Iterator[tuple[str, RawMolecule, tuple[int, ...]]]:
        number = 0
        for number, found in enumerate(TorchFile(self._path).items(), start=1):
            state = _attributes(found)
            if state is None:
                raise InputError(
                    f"{self._path}: item {number} is no Data of PyTorch Geometric; fetch it again"
                )
            names = ("pos", "atom_type", "fc", "edge_index", "edge_type")
            arrays = tuple(
                np.array(value) if isinstance(value, np.ndarray) else None
                for value in map(state.get, names)
            )
            if labels is not None and number > len(labels):
                raise self._other_split()
            yield f"item {number}", arrays, () if labels is None else (int(labels[number - 1]),)
        if labels is not None and number != len(labels):
            raise self._other_split()

    def _labels(self) -> NDArray[np.uint8]:
        """The split of each item."""
        assert self._split is not None
        found = TorchFile(self._split).load()
        parts = [found.get(name) if isinstance(found, dict) else None for name in _SPLIT]
        numbers = [part for part in parts if isinstance(part, np.ndarray) and part.ndim == 1]
        if len(numbers) != len(_SPLIT) or any(part.dtype.kind not in "iu" for part in numbers):
            raise InputError(f"{self._split} lacks the lists {', '.join(_SPLIT)}; fetch it again")
        joint = np.concatenate(numbers)
        if len(joint) > _MOST_SPLIT or not np.array_equal(np.sort(joint), np.arange(len(joint))):
            raise InputError(f"{self._split} does not name each item once; fetch it again")
        labels = np.zeros(len(joint), np.uint8)
        for label, part in enumerate(numbers):
            labels[part] = label
        return labels

    def _other_split(self) -> InputError:
        return InputError(
            f"{self._split} is of another number of items than {self._path.name}; pass --split-by "
            "random"
        )


def _attributes(found: Any) -> dict[str, Any] | None:
    """The attributes of a `Data`, which newer versions keep in a storage."""
    if not isinstance(found, Record):
        return None
    store = found.state.get("_store")
    state = store.state.get("_mapping") if isinstance(store, Record) else found.state
    return state if isinstance(state, dict) else None
