"""Molecules that are in memory already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from molgen_energy.data.molecules import MoleculeChunk, Molecules
from molgen_energy.datasets.base import ScreenedDataset, option
from molgen_energy.datasets.log import DatasetLog


@dataclass(frozen=True, kw_only=True)
class MoleculesInMemory(ScreenedDataset):
    """Molecules as arrays, with all their columns."""

    name = "memory"
    output = "molecules.h5"

    molecules: Molecules
    split: str = option("0.8,0.1,0.1", "Shares for training, validation, test.")
    seed: int = option(0, "Seed of the split.")

    def source_name(self) -> str:
        """They come from the caller."""
        return "molecules in memory"

    def chunks(self, log: DatasetLog) -> Iterator[MoleculeChunk]:
        """All molecules at once."""
        count = len(self.molecules)
        yield MoleculeChunk(np.arange(1, count + 1), self.molecules)
        log.progress(count, count)
