"""Every declared format of files, by name."""

from __future__ import annotations

from molgen_energy.datasets.smiles_shards import SMILES_MANIFEST
from molgen_energy.formats.yaml import YAMLFormat
from molgen_energy.systems.molecules.shards import SAMPLING_MANIFEST
from molgen_energy.systems.molecules.state import MOLECULE_STATE
from molgen_energy.systems.shapes.system import SHAPE_STATE
from molgen_energy.systems.spins.shards import SPIN_MANIFEST
from molgen_energy.systems.spins.system import SPIN_STATE

FORMATS: dict[str, YAMLFormat] = {
    "state-molecules": MOLECULE_STATE,
    "state-shapes": SHAPE_STATE,
    "state-spins": SPIN_STATE,
    "manifest-sample": SAMPLING_MANIFEST,
    "manifest-smiles": SMILES_MANIFEST,
    "manifest-spins": SPIN_MANIFEST,
}
