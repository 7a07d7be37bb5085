"""Which layout of GEOM-Drugs a folder or file holds."""

from __future__ import annotations

from pathlib import Path

from molgen_energy.datasets.geom.crude import Crude
from molgen_energy.datasets.geom.edm_arrays import EDMArrays
from molgen_energy.datasets.geom.flowmol import FlowMol
from molgen_energy.datasets.geom.jodo import JODO
from molgen_energy.datasets.geom.layout import Layout
from molgen_energy.datasets.geom.rdkit_folder import RDKitFolder
from molgen_energy.datasets.geom.rdkit_pickles import RDKitPickles
from molgen_energy.datasets.geom.semlaflow import SemlaFlow
from molgen_energy.errors import InputError
from molgen_energy.output import check_file

LAYOUTS: tuple[type[Layout], ...] = (
    Crude, RDKitFolder, EDMArrays, RDKitPickles, JODO, SemlaFlow, FlowMol
)  # fmt: skip
_START = 16  # bytes
_PACKED = (".gz", ".tgz", ".tar", ".zip", ".bz2", ".xz")


def recognise(source: Path) -> Layout:
    """The layout of a folder or file, by the names in it or its content.

    Raises
    ------
    InputError
        There is none, or there are several; or a file cannot be read.
    """
    if source.is_dir():
        found = [layout for kind in LAYOUTS if (layout := kind.in_folder(source)) is not None]
        if len(found) > 1:
            names = " and ".join(layout.name for layout in found)
            raise InputError(f"{source} holds {names}; name one of the files, or move the others")
    else:
        check_file(source)
        if source.suffix.lower() in _PACKED:
            raise InputError(f"{source} is packed; unpack it and name what it holds")
        with source.open("rb") as file:
            start = file.read(_START)
        found = [layout for kind in LAYOUTS if (layout := kind.of_file(source, start)) is not None]
    if not found:
        known = "; ".join(kind.file_names for kind in LAYOUTS)
        raise InputError(
            f"{source} is not GEOM-Drugs in a form that can be read, by its names and first bytes; "
            f"the forms: {known}"
        )
    return found[0]
