"""Files of spin glasses: couplings, ground states, and predictions of a network.

HDF5 of `molgen_energy.data.arrays` with attributes `boundary` (open or periodic) and `size`, and
these columns, with `right`, `down` and `spins` as in `molgen_energy.systems.spins.lattices`:

==========  =========  =======  ==================================================================
right       (M, L, L)  float32  couplings
down        (M, L, L)  float32  couplings
spins       (M, L, L)  int8     ground states; optional
energy      (M,)       float64  energies of the ground states; optional
prediction  (M, L, L)  int8     predicted configurations; optional
record      (M,)       int64    number of the record, from 1, in the file of the couplings; optional
==========  =========  =======  ==================================================================

Couplings alone are also read from an `.npz` of NumPy with `right` and `down`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.arrays import ArrayFile, Column
from molgen_energy.errors import InputError
from molgen_energy.output import check_file
from molgen_energy.systems.spins.lattices import BOUNDARIES, Lattices

_SITES = ("L", "L")
_COLUMNS = {"right": Column(_SITES), "down": Column(_SITES)}
_OPTIONAL = {
    "spins": Column(_SITES, "i"),
    "energy": Column(()),
    "prediction": Column(_SITES, "i"),
    "record": Column((), "i"),
}


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
        It is missing, damaged, of another system, or a record is not a spin glass.
    """
    file = ArrayFile(path, "spins", _COLUMNS, _OPTIONAL, remedy)
    boundary = file.attributes.get("boundary")
    if not isinstance(boundary, str) or boundary not in BOUNDARIES:
        raise InputError(f"{path}: its boundary is {boundary}, not open or periodic; make it again")
    found = file.columns
    lattices = Lattices.checked(
        found["right"], found["down"], boundary == "periodic", found.get("spins"), str(path)
    )
    if "energy" in found and "spins" in found:
        off = np.abs(lattices.energies() - found["energy"])
        wrong = off > 1e-6 * lattices.bonds * lattices.strongest
        if wrong.any():
            raise InputError(
                f"{path}: record {wrong.argmax() + 1}: its energy is not that of its spins; make "
                "it again"
            )
    prediction = found.get("prediction")
    if prediction is not None:
        lattices.with_spins(prediction).check(f"{path}, predictions")
    return SpinFile(file, lattices)


def read_couplings(path: Path, periodic: bool) -> Lattices:
    """Couplings of an `.npz` with arrays `right` and `down`, (M, L, L) each.

    Raises
    ------
    InputError
        It is missing, not an `.npz`, or a record is not a lattice of couplings.
    """
    check_file(path)
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with np.load(path) as stored:
            for name in ("right", "down"):
                if name not in stored:
                    raise InputError(f"{path} lacks the array '{name}', (M, L, L); save both")
                arrays[name] = stored[name]
    except InputError:
        raise
    except Exception as error:  # damaged archives raise errors of many types
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path} is not an .npz of NumPy ({why}); save `right` and `down`"
        ) from None
    for name, array in arrays.items():
        if array.dtype.kind not in "iuf":
            raise InputError(f"{path}: '{name}' holds {array.dtype}, not numbers")
        if not array.size:
            raise InputError(f"{path}: '{name}' is empty; give at least one lattice")
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
