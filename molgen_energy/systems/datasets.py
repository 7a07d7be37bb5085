"""The datasets that `preprocess NAME` makes, by name."""

from __future__ import annotations

from molgen_energy.datasets.base import Dataset
from molgen_energy.datasets.ccd import ChemicalComponents
from molgen_energy.datasets.files import MoleculeFiles
from molgen_energy.datasets.geom_drugs import GeomDrugs
from molgen_energy.datasets.part import TrainingPart
from molgen_energy.datasets.qm9 import QM9
from molgen_energy.datasets.smiles import SmilesFiles
from molgen_energy.systems.shapes.dataset import Polygons
from molgen_energy.systems.spins.dataset import SpinGlasses

DATASETS: dict[str, type[Dataset]] = {
    dataset.name: dataset
    for dataset in (
        QM9,
        ChemicalComponents,
        GeomDrugs,
        MoleculeFiles,
        SmilesFiles,
        TrainingPart,
        Polygons,
        SpinGlasses,
    )
}
"""The command line imports all of them when it starts: import slow packages inside functions."""
