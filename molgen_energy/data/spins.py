"""Files of spin glasses: couplings, their ground states, and what a network predicts.

HDF5 of `molgen_energy.data.arrays` with attributes `boundary` (open or periodic) and `size`, and
columns `right`, `down` (M, L, L) float32 and `spins` (M, L, L) int8, the ground states, as in
`molgen_energy.data.lattices`; `energy` (M,) float64, theirs; `prediction` (M, L, L) int8. Couplings
alone may also come as an `.npz` of NumPy with `right` and `down`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from molgen_energy.data.arrays import ArrayFile
from molgen_energy.data.lattices import BOUNDARIES, Lattices
from molgen_energy.errors import InputError
from molgen_energy.output import check_file


class SpinFile(NamedTuple):
    """Lattices, with their ground states where the file has them."""

    file: ArrayFile
    lattices: Lattices

    @property
    def prediction(self) -> NDArray[np.int8] | None:
        """What a network predicts, (M, L, L), where the file has it."""
        return self.file.columns.get("prediction")


def read_spins(path: Path, remedy: str = "`molgen-energy preprocess spins -o {path}`") -> SpinFile:
    """Read a file of spin glasses.

    Raises
    ------
    InputError
        It is missing, broken, of another system, or holds what is no spin glass.
    """
    columns, optional = ("right", "down"), ("spins", "energy", "prediction")
    file = ArrayFile(path, "spins", columns, optional, remedy)
    boundary = file.attributes.get("boundary")
    if boundary not in BOUNDARIES:
        raise InputError(f"{path}: its boundary is {boundary}, not open or periodic; make it again")
    found = file.columns
    lattices = Lattices.checked(
        found["right"], found["down"], boundary == "periodic", found.get("spins"), str(path)
    )
    prediction = found.get("prediction")
    if prediction is not None:
        # The same check as of ground states.
        Lattices.checked(found["right"], found["down"], lattices.periodic, prediction, str(path))
    return SpinFile(file, lattices)


def read_couplings(path: Path, periodic: bool) -> Lattices:
    """Couplings of an `.npz` with arrays `right` and `down`, (M, L, L) each.

    Raises
    ------
    InputError
        It is missing, no such file, or holds what are no couplings.
    """
    check_file(path)
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with np.load(path) as stored:
            for name in ("right", "down"):
                if name not in stored:
                    raise InputError(f"{path} lacks the array '{name}', (M, L, L); save both")
                arrays[name] = stored[name]
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no .npz of NumPy ({error}); save `right` and `down`") from None
    for name, array in arrays.items():
        if array.dtype.kind not in "iuf":
            raise InputError(f"{path}: '{name}' holds {array.dtype}, not numbers")
        if not len(array):
            raise InputError(f"{path}: '{name}' is empty; give at least one lattice")
    return Lattices.checked(arrays["right"], arrays["down"], periodic, origin=str(path))
