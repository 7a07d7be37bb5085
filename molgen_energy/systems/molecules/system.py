"""Molecules as a physical system: what the four verbs do with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from molgen_energy.output import check_writable
from molgen_energy.systems.base import SamplingCallback, SamplingResult, System
from molgen_energy.systems.molecules.config import MoleculeConfig
from molgen_energy.systems.molecules.sampling import check_name, sample_to_file
from molgen_energy.systems.molecules.task import MoleculeGenerator, MoleculeTask
from molgen_energy.training.checkpoint import Checkpoint


class _MoleculeSampling:
    """`MoleculeGenerator` for `sample`."""

    distributed = True
    inputs: tuple[Path, ...] = ()

    def __init__(self, generator: MoleculeGenerator, count: int, batch_size: int | None) -> None:
        self._generator, self.count, self._batch_size = generator, count, batch_size
        self.origin = generator.checkpoint.origin
        sampler = generator.sampler
        spaced = "" if sampler.spacing is None else f" of {sampler.spacing} spacing"
        self.method = (
            f"{generator.sampler_name}, {sampler.steps:,} steps{spaced}, "
            f"{sampler.evaluations:,} network evaluations each"
        )

    def write(
        self, output: Path, callback: SamplingCallback, resume: bool = False
    ) -> SamplingResult:
        """Draw the molecules and write them, or go on with it."""
        return sample_to_file(
            self._generator, self.count, output, callback, self._batch_size, resume
        )


class MoleculeSystem(System):
    """Molecules, drawn by a diffusion model or a flow."""

    name = "molecules"
    samples = "molecules"
    config = MoleculeConfig
    sampling = MappingProxyType(
        {
            "count": 100,
            "n_atoms": None,
            "seed": 0,
            "sampler": None,
            "steps": None,
            "spacing": None,
            "eta": None,
            "batch_size": None,
            "low_precision": False,
        }
    )
    output = "samples.sdf"

    def check_output(self, path: Path) -> None:
        """Raise `InputError` unless molecules can be written to a path."""
        check_name(path)
        check_writable(path)

    def task(
        self, config: Any, device: torch.device, progress: Callable[[int, int], None]
    ) -> MoleculeTask:
        """What the training loop needs."""
        return MoleculeTask(config, device, progress)

    def generator(
        self, checkpoint: Checkpoint, device: torch.device, asked: Mapping[str, Any]
    ) -> _MoleculeSampling:
        """What draws molecules with a checkpoint."""
        generator = MoleculeGenerator(
            checkpoint,
            device,
            asked["seed"],
            asked["n_atoms"],
            asked["low_precision"],
            asked["sampler"],
            asked["steps"],
            asked["eta"],
            asked["spacing"],
        )
        return _MoleculeSampling(generator, asked["count"], asked["batch_size"])

    def details(self, config: Any) -> str:
        """Springs, and the process where it is not diffusion."""
        process = "" if config.diffusion.process == "diffusion" else ", by flow matching"
        return f"{config.loss.section.describe()}{process}"
