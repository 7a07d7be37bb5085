"""The datasets that `preprocess NAME` makes, by name."""

from __future__ import annotations

from molgen_energy.data.datasets.base import Dataset
from molgen_energy.systems.shapes.dataset import Polygons
from molgen_energy.systems.spins.dataset import SpinGlasses

DATASETS: dict[str, type[Dataset]] = {dataset.name: dataset for dataset in (Polygons, SpinGlasses)}
"""Imported at every start of the command: a dataset imports what is slow when it is made."""
