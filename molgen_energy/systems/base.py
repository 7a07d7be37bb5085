"""What a physical system is to the four verbs.

A dataset (`molgen_energy.systems.datasets`) makes the data of `preprocess`, an evaluator
(`molgen_energy.systems.evaluators`) the report of `evaluate`; neither needs a network. For `train`
and `sample` a `System` joins data, network and loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from molgen_energy.config import Config
from molgen_energy.data.hdf5 import check_hdf5_name
from molgen_energy.progress import ProgressCallback
from molgen_energy.training.checkpoint import Checkpoint
from molgen_energy.training.task import Task


@dataclass(frozen=True)
class SamplingResult:
    """What was written where, how many samples were drawn for it now, and how many diverged.

    Of several processes the first one alone writes.
    """

    path: Path | None
    written: int
    drawn: int
    not_finite: int = 0
    interrupted: bool = False


class SamplingCallback(Protocol):
    """Who is told how sampling goes."""

    def found(self, samples: int) -> None:
        """So many were finished before."""
        ...

    def advance(self, samples: int, share: float) -> None:
        """The network was called for so many samples, a share of all its calls for them."""
        ...

    def interrupted(self, samples: int) -> None:
        """So many are finished and kept; now they are written where they can be used."""
        ...


class Generator(Protocol):
    """A checkpoint, ready to make samples."""

    count: int
    """How many will be made."""
    inputs: tuple[Path, ...]
    """Files that are read, over which nothing must be written."""
    distributed: bool
    """Whether several processes share the work; else the first one does all of it."""

    @property
    def origin(self) -> str:
        """The run and the step that the weights are of."""
        ...

    @property
    def method(self) -> str:
        """How samples are made, in a few words."""
        ...

    def write(
        self, output: Path, callback: SamplingCallback, resume: bool = False
    ) -> SamplingResult:
        """Make the samples and write them; resumed where this was begun, if the system can."""
        ...


class System(ABC):
    """A physical system: what the four verbs do with it. Registered in `SYSTEMS`."""

    name: ClassVar[str]
    samples: ClassVar[str]
    """What there are many of: molecules, lattices, polygons."""
    config: ClassVar[type[Config]]
    """All sections with their defaults; `system` among them."""
    sampling: ClassVar[Mapping[str, Any]]
    """The options of `sample` that this system takes, by parameter name, with their defaults."""
    output: ClassVar[str]
    """The file that `sample` writes where none is named."""

    @abstractmethod
    def task(self, config: Any, device: torch.device, progress: ProgressCallback) -> Task:
        """What the training loop needs, from a configuration of this system.

        `progress` is told how many of how many samples are prepared, where that takes long.

        Raises
        ------
        InputError
            Data is missing, broken, or of another system.
        """

    @abstractmethod
    def generator(
        self, checkpoint: Checkpoint, device: torch.device, options: Mapping[str, Any]
    ) -> Generator:
        """What makes samples with a checkpoint of this system; `options` has every option.

        Raises
        ------
        InputError
            The checkpoint is damaged or an option does not serve.
        """

    def check_output(self, path: Path) -> None:
        """Raise `InputError` unless samples can be written to a path; HDF5 it is here."""
        check_hdf5_name(path)

    def describe(self, config: Any, parameters: int) -> str:
        """Network and loss of a run, in a line for the user."""
        return (
            f"{config.model.name} {config.model.layers}×{config.model.width}, "
            f"{parameters:,} parameters, loss {config.loss.name}{self.details(config)}"
        )

    def details(self, config: Any) -> str:
        """What else there is to say."""
        return ""


def build_with_seed(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """A network whose weights are drawn with a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
