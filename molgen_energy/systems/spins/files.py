"""Files of spin glasses: couplings, ground states, and predictions of a network.

`SPINS` declares the HDF5 files, with `right`, `down` and `spins` as in
`molgen_energy.systems.spins.lattices`. Couplings alone are also read from an `.npz` of NumPy,
declared by `COUPLINGS`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.arrays import ArrayFile
from molgen_energy.errors import InputError
from molgen_energy.formats.declaration import (
    FILE_ATTRIBUTES,
    SPLIT,
    AttributeSpec,
    DatasetSpec,
    HDF5Format,
    Relation,
    Size,
)
from molgen_energy.formats.npz import NpzFormat, read_npz
from molgen_energy.systems.spins.lattices import BOUNDARIES, Lattices

_SITES = ("M", "L", "L")
_SIZES = {"M": Size("lattices"), "L": Size("sites along a side", low=2)}
_RIGHT = DatasetSpec("right", _SITES, "float", "coupling of site (r, c) to (r, c+1)", dtype="f4")
_DOWN = DatasetSpec("down", _SITES, "float", "coupling of site (r, c) to (r+1, c)", dtype="f4")

SPINS = HDF5Format(
    "spins",
    "Spin glasses",
    "Couplings on square lattices, their ground states, and predictions. `preprocess spins` writes "
    "ground states and `sample` predictions; `train`, `sample --data` and `evaluate` read them.",
    sizes=_SIZES,
    records="lattices",
    attributes=(
        *FILE_ATTRIBUTES,
        AttributeSpec("boundary", "text", "boundary of the lattices", choices=BOUNDARIES),
        AttributeSpec("size", "integer", "L", required=False, low=2),
        AttributeSpec("count", "integer", "M", required=False, low=1),
        AttributeSpec("couplings", "text", "kind of the couplings", required=False),
        AttributeSpec("seed", "integer", "seed of couplings and split", required=False),
    ),
    datasets=(
        _RIGHT,
        _DOWN,
        DatasetSpec(
            "spins", _SITES, "integer", "ground states", required=False, choices=(-1, 1),
            dtype="i1",
        ),
        DatasetSpec(
            "energy", ("M",), "float", "energies of the ground states",
            unit="unit of the couplings", required=False,
        ),
        DatasetSpec(
            "prediction", _SITES, "integer", "predicted configurations", required=False,
            choices=(-1, 1), dtype="i1",
        ),
        DatasetSpec(
            "record", ("M",), "integer", "number of the record, from 1, in the file of the "
            "couplings", required=False, low=1,
        ),
        SPLIT,
    ),
    relations=(
        Relation(
            "couplings that are not all zero",
            ("right", "down"),
            lambda right, down: ((right == 0) & (down == 0)).all(axis=(1, 2)),
        ),
    ),
)  # fmt: skip
"""The declaration of files of spin glasses. `read_spins` checks energies too."""

COUPLINGS = NpzFormat(
    "Couplings",
    "Couplings of one's own, for `preprocess spins --couplings` and `sample --data`; beyond an "
    "open boundary they are zero.",
    sizes=_SIZES,
    arrays=(_RIGHT, _DOWN),
    remedy="save `right` and `down`, (M, L, L) each, with numpy.savez",
)
"""The declaration of archives of couplings."""


class SpinFile(NamedTuple):
    """The lattices of a file, with their ground states if the file has them."""

    file: ArrayFile
    lattices: Lattices

    @property
    def prediction(self) -> NDArray[np.int8] | None:
        """Predicted configurations, (M, L, L), if the file has them."""
        return self.file.columns.get("prediction")


def read_spins(path: Path, remedy: str = "`molgen-energy preprocess spins -o {path}`") -> SpinFile:
    """Read a file of spin glasses.

    Raises
    ------
    InputError
        It is missing, damaged, of another system, not as declared, or a record is not a spin glass.
    """
    file = ArrayFile(path, SPINS, remedy)
    found = file.columns
    lattices = Lattices.checked(
        found["right"],
        found["down"],
        file.attributes["boundary"] == "periodic",
        found.get("spins"),
        str(path),
    )
    if "energy" in found and "spins" in found:
        off = np.abs(lattices.energies() - found["energy"])
        wrong = off > 1e-6 * lattices.bonds * lattices.strongest
        if wrong.any():
            raise InputError(
                f"{path}: record {wrong.argmax() + 1}: its energy is not that of its spins; make "
                "it again"
            )
    return SpinFile(file, lattices)


def read_couplings(path: Path, periodic: bool) -> Lattices:
    """Couplings of an `.npz` with arrays `right` and `down`, (M, L, L) each.

    Raises
    ------
    InputError
        It is missing, not an `.npz`, not as declared, or a record is not a lattice of couplings.
    """
    arrays = read_npz(path, COUPLINGS)
    lattices = Lattices.checked(arrays["right"], arrays["down"], periodic, origin=str(path))
    if not periodic:
        beyond = (arrays["right"][:, :, -1] != 0) | (arrays["down"][:, -1, :] != 0)
        if beyond.any():
            raise InputError(
                f"{path}: record {beyond.any(axis=1).argmax() + 1} has couplings beyond the open "
                "boundary, in the last column of 'right' or the last row of 'down'; set them to "
                "zero, or use a periodic boundary"
            )
    return lattices
