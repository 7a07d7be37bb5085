"""Every declared format of files, by name; `scripts/document_formats.py` writes their page."""

from __future__ import annotations

from molgen_energy.data.hdf5 import MOLECULES
from molgen_energy.datasets.ccd_shards import COMPONENT_MANIFEST
from molgen_energy.datasets.smiles_shards import SMILES_MANIFEST
from molgen_energy.formats.declaration import HDF5Format
from molgen_energy.formats.npz import NpzFormat
from molgen_energy.formats.yaml import YAMLFormat
from molgen_energy.metrics.reference import STATISTICS
from molgen_energy.systems.molecules.shards import SAMPLING_MANIFEST
from molgen_energy.systems.molecules.state import MOLECULE_STATE
from molgen_energy.systems.properties.config import PROPERTY_STATE
from molgen_energy.systems.shapes.files import SHAPES
from molgen_energy.systems.shapes.system import SHAPE_STATE
from molgen_energy.systems.spins.files import COUPLINGS, SPINS
from molgen_energy.systems.spins.shards import SPIN_MANIFEST
from molgen_energy.systems.spins.system import SPIN_STATE

FORMATS: dict[str, HDF5Format | NpzFormat | YAMLFormat] = {
    "molecules": MOLECULES,
    "shapes": SHAPES,
    "spins": SPINS,
    "couplings": COUPLINGS,
    "statistics": STATISTICS,
    "state-molecules": MOLECULE_STATE,
    "state-properties": PROPERTY_STATE,
    "state-shapes": SHAPE_STATE,
    "state-spins": SPIN_STATE,
    "manifest-sample": SAMPLING_MANIFEST,
    "manifest-smiles": SMILES_MANIFEST,
    "manifest-ccd": COMPONENT_MANIFEST,
    "manifest-spins": SPIN_MANIFEST,
}
