"""Files of polygons: the nominal `radius` (M,) float32, and `positions` (M, N, 2) float32."""

from __future__ import annotations

from pathlib import Path

from molgen_energy.data.arrays import ArrayFile, Column
from molgen_energy.errors import InputError

_COLUMNS = {"radius": Column(()), "positions": Column(("N", 2))}


def read_polygons(path: Path, remedy: str) -> ArrayFile:
    """Read a file of polygons.

    Raises
    ------
    InputError
        It is missing, damaged, of another system, or a record is not a polygon.
    """
    file = ArrayFile(path, "shapes", _COLUMNS, remedy=remedy)
    vertices = file.columns["positions"].shape[1]
    if vertices < 3:
        raise InputError(f"{path}: polygons of {vertices} vertices; expected 3 or more")
    low = file.columns["radius"] <= 0
    if low.any():
        raise InputError(f"{path}: record {low.argmax() + 1}: its radius is not above 0")
    return file
