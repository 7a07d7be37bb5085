"""Files of polygons, declared by `SHAPES`."""

from __future__ import annotations

from pathlib import Path

from molgen_energy.data.arrays import ArrayFile
from molgen_energy.formats.declaration import (
    FILE_ATTRIBUTES,
    SPLIT,
    AttributeSpec,
    DatasetSpec,
    HDF5Format,
    Relation,
    Size,
)

SHAPES = HDF5Format(
    "shapes",
    "Polygons",
    "Polygons of equal numbers of vertices, each with its nominal radius. `preprocess shapes` "
    "writes targets, and `sample` predictions; `train` and `evaluate` read them.",
    sizes={"M": Size("polygons"), "N": Size("vertices", low=3)},
    records="polygons",
    attributes=(
        *FILE_ATTRIBUTES,
        AttributeSpec("vertices", "integer", "N", required=False, low=3),
        AttributeSpec("augment_angle", "float", "largest rotation, rad", required=False),
        AttributeSpec("smallest", "float", "least radius that is drawn", required=False),
        AttributeSpec("largest", "float", "largest radius that is drawn", required=False),
        AttributeSpec("seed", "integer", "seed of radii, angles and split", required=False),
    ),
    datasets=(
        DatasetSpec(
            "positions", ("M", "N", 2), "float", "vertices, in their order around", dtype="f4"
        ),
        DatasetSpec("radius", ("M",), "float", "nominal radius", low=0, dtype="f4"),
        SPLIT,
    ),
    relations=(Relation("a radius above 0", ("radius",), lambda radius: radius <= 0),),
)
"""The declaration of files of polygons."""


def read_polygons(path: Path, remedy: str) -> ArrayFile:
    """Read a file of polygons.

    Raises
    ------
    InputError
        It is missing, damaged, of another system, or not as declared.
    """
    return ArrayFile(path, SHAPES, remedy)
