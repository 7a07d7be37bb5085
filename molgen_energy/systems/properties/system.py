"""Properties of molecules as a system: a network that predicts them, trained on a data file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from molgen_energy.data.hdf5 import MOLECULES
from molgen_energy.errors import InputError
from molgen_energy.progress import ProgressCallback
from molgen_energy.systems.base import System
from molgen_energy.systems.molecules.system import MoleculeSystem
from molgen_energy.systems.properties.config import PropertyConfig, PropertyState
from molgen_energy.systems.properties.task import PropertyTask
from molgen_energy.training.checkpoint import Checkpoint


class PropertySystem(System):
    """Properties of molecules, predicted from elements and positions.

    It draws no samples: `evaluate --predictor` judges those of a generator by it.
    """

    name = "properties"
    samples = "molecules"
    config = PropertyConfig
    state = PropertyState
    # Those of a generator, so that `generator` answers whatever options are given.
    sampling = MoleculeSystem.sampling
    output = "samples.h5"
    file_format = MOLECULES

    def task(self, config: Any, device: torch.device, progress: ProgressCallback) -> PropertyTask:
        """Training on a file of molecules."""
        return PropertyTask(config, device)

    def generator(
        self, checkpoint: Checkpoint, device: torch.device, options: Mapping[str, Any]
    ) -> NoReturn:
        """Raise `InputError`: there is nothing to draw."""
        raise InputError(
            f"{checkpoint.path} predicts properties and draws no molecules; name a generator with "
            "--checkpoint, and judge its samples with `molgen-energy evaluate FILE --predictor RUN`"
        )

    def check_output(self, path: Path) -> None:
        """Nothing: `generator` says that there will be no output."""

    def describe(self, config: Any, parameters: int) -> str:
        """Network and properties of a run, in one line."""
        model = config.model
        return (
            f"{model.name} {model.layers}×{model.width}, {parameters:,} parameters, predicts "
            f"{', '.join(config.properties)}"
        )

    def next_command(self, config: Any, run: str) -> str:
        """How to judge samples by a run."""
        return f"molgen-energy evaluate samples.h5 --predictor {run}"
