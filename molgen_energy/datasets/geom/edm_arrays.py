"""The arrays that EDM makes of GEOM-Drugs (Hoogeboom et al., ICML 2022, `data/geom`).

`geom_drugs_30.npy` holds a row [conformer, Z, x, y, z] for each atom, with the 30 conformers of
lowest energy of each molecule in ascending order of energy, `geom_drugs_n_30.npy` the atoms of each
conformer. Neither says which conformers are of one molecule: those that stand one after another
with the same elements are taken for it. `geom_permutation.npy` of EDM's repository gives its split,
which puts conformers of one molecule into training and test. There are no bonds and charges. The
file is read in blocks.
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
    Layout,
    RawMolecule,
    arrays_to_molecule,
    joined,
    single_file,
)
from molgen_energy.errors import InputError
from molgen_energy.formats.npy import MARK, map_npy

_ROWS = 1 << 18  # in memory at once
_START, _SIZES = "geom_drugs_", "geom_drugs_n_"
_PERMUTATION = "geom_permutation.npy"
_SHARE = 0.1  # of the conformers, for validation and for test


class EDMArrays(Layout):
    """`geom_drugs_*.npy`."""

    name = "EDM's arrays"
    file_names = "geom_drugs_30.npy"
    has_bonds = False

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def in_folder(cls, folder: Path) -> EDMArrays | None:
        """The one array of conformers in a folder."""
        paths = [p for p in sorted(folder.glob(f"{_START}*.npy")) if not p.name.startswith(_SIZES)]
        path = single_file(folder, paths)
        return None if path is None else cls(path)

    @classmethod
    def of_file(cls, path: Path, start: bytes) -> EDMArrays | None:
        """Any file of NumPy."""
        return cls(path) if start.startswith(MARK) else None

    def check_split(self) -> None:
        """The permutation must be there."""
        path = self._path.with_name(_PERMUTATION)
        if not path.exists():
            raise InputError(
                f"{path} does not exist, which has EDM's split; copy it from data/geom of EDM's "
                "repository, or pass --split-by random"
            )

    def entries(self, own_split: bool) -> Iterator[Entry]:
        """All molecules, in the order of the file."""
        rows = map_npy(self._path, (None, 5))
        count = self._check_sizes(len(rows))
        labels = self._labels(count) if own_split else None
        yield from joined(self._conformers(rows, labels))

    @staticmethod
    def decode(conformer: Any) -> Molecule:
        """Positions and elements."""
        return arrays_to_molecule(*conformer)

    def _conformers(
        self, rows: NDArray[Any], labels: NDArray[np.uint8] | None
    ) -> Iterator[tuple[str, RawMolecule, tuple[int, ...]]]:
        """Place, arrays and split of each conformer."""
        number = start = 0
        while start < len(rows):
            block = np.array(rows[start : start + _ROWS])
            ends = np.flatnonzero(block[1:, 0] != block[:-1, 0]) + 1
            if start + len(block) == len(rows):
                ends = np.append(ends, len(block))
            if not len(ends):
                raise InputError(
                    f"{self._path}: conformer {number + 1} has more than {_ROWS:,} atoms; expected "
                    "rows of conformer, Z, x, y, z"
                )
            for first, end in zip(np.append(0, ends[:-1]), ends, strict=True):
                if labels is not None and number >= len(labels):
                    raise self._other_permutation(labels)
                split = () if labels is None else (int(labels[number]),)
                number += 1
                part = block[first:end]
                yield f"conformer {number}", (part[:, 2:], part[:, 1]), split
            start += int(ends[-1])
        if labels is not None and number != len(labels):
            raise self._other_permutation(labels)

    def _check_sizes(self, rows: int) -> int | None:
        """The number of conformers, where the array of their sizes is there."""
        path = self._path.with_name(self._path.name.replace(_START, _SIZES, 1))
        if path == self._path or not path.exists():
            return None
        sizes = map_npy(path, (None,))
        if sizes.dtype.kind not in "iu":
            raise InputError(f"{path} holds no whole numbers; remove it, or fetch it again")
        if int(sizes.sum()) != rows:
            raise InputError(
                f"{path} is not of the same set as {self._path.name}: it counts {sizes.sum():,} "
                f"atoms, and there are {rows:,}; remove it, or fetch both again"
            )
        return len(sizes)

    def _labels(self, count: int | None) -> NDArray[np.uint8]:
        """The split of each conformer, from the permutation."""
        path = self._path.with_name(_PERMUTATION)
        order = map_npy(path, (None,))
        if order.dtype.kind not in "iu" or not np.array_equal(
            np.sort(order), np.arange(len(order))
        ):
            raise InputError(f"{path} is no permutation; fetch it again")
        labels = np.zeros(len(order), np.uint8)
        share = int(_SHARE * len(order))
        labels[order[:share]] = 1
        labels[order[share : 2 * share]] = 2
        if count is not None and count != len(order):
            raise self._other_permutation(labels)
        return labels

    def _other_permutation(self, labels: NDArray[np.uint8]) -> InputError:
        return InputError(
            f"{self._path.with_name(_PERMUTATION)} is a permutation of {len(labels):,} conformers, "
            f"and {self._path.name} holds another number; pass --split-by random"
        )
