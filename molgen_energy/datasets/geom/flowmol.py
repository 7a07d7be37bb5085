"""FlowMol's `train_data_processed.pt` and so on (Dunn and Koes, 2024): arrays of all molecules.

Tensors of all atoms, `positions` (Å), `atom_types` (one-hot), `atom_charges`, and of all bonds,
`bond_idxs` and `bond_types`; `node_idx_array` and `edge_idx_array` say where each conformer begins
and ends. Conformers of a molecule stand one after another; the list `smiles` has one text a
molecule, also of those that were left out, and is not used. In MiDi's split of molecules. Arrays
are read from the file when they are used; the SMILES are in memory once, some 100 bytes each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.molecules import Molecule
from molgen_energy.datasets.geom.layout import (
    Entry,
    RawMolecule,
    SplitLayout,
    arrays_to_molecule,
    joined,
)
from molgen_energy.errors import InputError
from molgen_energy.formats.torch_files import MARK, TorchFile

_ELEMENTS = np.array([6, 1, 7, 8, 9, 15, 16, 17, 35, 53])
"""Atomic numbers by column of `atom_types`: C H N O F P S Cl Br I, FlowMol's `atom_map`."""
_OF_ATOMS = ("positions", "atom_types", "atom_charges")
_OF_BONDS = ("bond_idxs", "bond_types")
_ENDS = ("node_idx_array", "edge_idx_array")


class FlowMol(SplitLayout):
    """`train_data_processed.pt`, `val_data_processed.pt`, `test_data_processed.pt`."""

    name = "FlowMol's files"
    file_names = "train_data_processed.pt, val_data_processed.pt, test_data_processed.pt"
    file_pattern = "{}_data_processed.pt"

    @classmethod
    def first_item(cls, path: Path, start: bytes) -> Any:
        """The first object of a file of PyTorch."""
        return next(TorchFile(path).items(), None) if start.startswith(MARK) else None

    @staticmethod
    def is_item(found: Any) -> bool:
        """A mapping of arrays."""
        return isinstance(found, dict)

    def entries(self, own_split: bool) -> Iterator[Entry]:
        """All molecules, file by file."""
        for path, label in self._files.each(own_split):
            yield from joined(
                (f"{path.name}: conformer {number}", arrays, label)
                for number, arrays in enumerate(_conformers(path), start=1)
            )

    @staticmethod
    def decode(conformer: Any) -> Molecule:
        """The rows of a conformer."""
        positions, types, *others = conformer
        if types.shape[1] != len(_ELEMENTS) or not (types.astype(bool).sum(axis=1) == 1).all():
            raise ValueError(
                f"atom_types are not one-hot of the {len(_ELEMENTS)} elements of FlowMol"
            )
        return arrays_to_molecule(positions, _ELEMENTS[types.argmax(axis=1)], *others)


def _conformers(path: Path) -> Iterator[RawMolecule]:
    """The rows of each conformer, in the order of `arrays_to_molecule`."""
    found = TorchFile(path).load()
    names = (*_OF_ATOMS, *_OF_BONDS, *_ENDS)
    stored = found if isinstance(found, dict) else {}
    arrays = {name: stored[name] for name in names if isinstance(stored.get(name), np.ndarray)}
    if missing := [name for name in names if name not in arrays]:
        raise InputError(f"{path} lacks {', '.join(missing)}; fetch it again")
    axes = {"positions": 2, "atom_types": 2, "bond_idxs": 2, "node_idx_array": 2}
    for name, array in arrays.items():
        if array.ndim != axes.get(name, 2 if name in _ENDS else 1):
            raise InputError(f"{path}: {name} has the shape {array.shape}; fetch it again")
    atoms = _ends(path, arrays, _ENDS[0], _OF_ATOMS)
    bonds = _ends(path, arrays, _ENDS[1], _OF_BONDS)
    if len(atoms) != len(bonds):
        raise InputError(
            f"{path}: {len(atoms):,} conformers have atoms and {len(bonds):,} bonds; fetch it again"
        )
    for of_atoms, of_bonds in zip(atoms.tolist(), bonds.tolist(), strict=True):
        yield (
            *(np.array(arrays[name][slice(*of_atoms)]) for name in _OF_ATOMS),
            *(np.array(arrays[name][slice(*of_bonds)]) for name in _OF_BONDS),
        )


def _ends(
    path: Path, arrays: dict[str, NDArray[Any]], name: str, rows: tuple[str, ...]
) -> NDArray[Any]:
    """Where each conformer begins and ends in the arrays that are named `rows`, (M, 2)."""
    found = arrays[name]
    fits = found.shape[1] == 2 and found.dtype.kind in "iu"
    if fits and len(found):
        least = min(len(arrays[row]) for row in rows)
        fits = (
            found.min() >= 0 and found.max() <= least and bool((found[:, 0] <= found[:, 1]).all())
        )
    if not fits:
        raise InputError(f"{path}: {name} is not where conformers begin and end; fetch it again")
    return found
