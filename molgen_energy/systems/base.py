"""The interface of a physical system for `train` and `sample`.

A `System` brings data, network and loss together. `preprocess` and `evaluate` need no network;
their registries are in `molgen_energy.systems.datasets` and `molgen_energy.systems.evaluators`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from molgen_energy.config import Config
from molgen_energy.data.arrays import ArrayFile
from molgen_energy.data.hdf5 import check_hdf5_name
from molgen_energy.formats.declaration import HDF5Format
from molgen_energy.progress import ProgressCallback
from molgen_energy.training.checkpoint import Checkpoint
from molgen_energy.training.state import RunState
from molgen_energy.training.task import Task


@dataclass(frozen=True)
class SamplingResult:
    """The file of samples, and how many samples were written, drawn now, and diverged.

    Of several processes only the first writes a file.
    """

    path: Path | None
    written: int
    drawn: int
    not_finite: int = 0
    interrupted: bool = False
    notes: tuple[str, ...] = ()
    """What to know about the samples, a line each."""


class SamplingCallback(Protocol):
    """Receives the progress of sampling."""

    def found(self, samples: int) -> None:
        """Called at the start of a resumed job with the number of finished samples."""
        ...

    def advance(self, samples: int, share: float) -> None:
        """Called after a network evaluation of some samples, a share of all that they need."""
        ...

    def interrupted(self, samples: int) -> None:
        """Called after an interruption with the number of finished samples, before writing them."""
        ...


class NoCallback:
    """A `SamplingCallback` that ignores progress."""

    def found(self, samples: int) -> None:
        pass

    def advance(self, samples: int, share: float) -> None:
        pass

    def interrupted(self, samples: int) -> None:
        pass


class Generator(Protocol):
    """A checkpoint, ready to draw samples."""

    count: int
    """Samples to draw."""
    inputs: tuple[Path, ...]
    """Files that it reads, which the output must not replace."""
    distributed: bool
    """Whether several processes share the work; otherwise the first one does all of it."""
    warnings: tuple[str, ...]
    """What to know about the options before sampling, a line each."""

    @property
    def origin(self) -> str:
        """Run and step of the weights."""
        ...

    @property
    def method(self) -> str:
        """A few words on how samples are drawn, such as the sampler and its steps."""
        ...

    def write(
        self, output: Path, callback: SamplingCallback, resume: bool = False
    ) -> SamplingResult:
        """Draw the samples and write them into the file `output`.

        With `resume`, continue its interrupted job. `callback` receives the progress.
        """
        ...


class System(ABC):
    """A physical system, registered in `SYSTEMS`."""

    name: ClassVar[str]
    samples: ClassVar[str]
    """Plural noun for its samples: molecules, lattices, polygons."""
    config: ClassVar[type[Config]]
    """All sections with their defaults."""
    state: ClassVar[type[RunState]] = RunState
    """The declaration of the `state.yaml` of its checkpoints."""
    sampling: ClassVar[Mapping[str, Any]]
    """The options of `sample` for this system, by parameter name, with their defaults."""
    output: ClassVar[str]
    """Default file of `sample`."""
    file_format: ClassVar[HDF5Format]
    """The declaration of its HDF5 files."""
    default_config: ClassVar[str | None] = None
    """The configuration of `train` without `--config`; None if one must be named."""

    @abstractmethod
    def task(self, config: Any, device: torch.device, progress: ProgressCallback) -> Task:
        """The training task of a configuration of this system, `config`, on a `device`.

        `progress` is called with the number of prepared samples, if that takes long.

        Raises
        ------
        InputError
            Data is missing, broken, or of another system.
        """

    @abstractmethod
    def generator(
        self, checkpoint: Checkpoint, device: torch.device, options: Mapping[str, Any]
    ) -> Generator:
        """The generator of samples for a checkpoint of this system, on a `device`.

        `options` has every option.

        Raises
        ------
        InputError
            The checkpoint is damaged, or an option is not valid.
        """

    def read_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options of a user as a job stores them, so that it needs no input file to resume.

        Raises
        ------
        InputError
            A file cannot be read, or options do not go together.
        """
        return dict(options)

    def check_output(self, path: Path) -> None:
        """Raise `InputError` unless samples can be written to a path; by default HDF5."""
        check_hdf5_name(path)

    def read_samples(self, path: Path) -> Any:
        """The samples of an HDF5 file in memory; by default its arrays by name."""
        return ArrayFile(path, self.file_format).columns

    def sampling_options(self, output: Path) -> Mapping[str, Any] | None:
        """Options of the interrupted job of a file, with `checkpoint`; None if it cannot resume.

        Raises
        ------
        InputError
            There is no interrupted job, or it is damaged.
        """
        return None

    def describe(self, config: Any, parameters: int) -> str:
        """Network and loss of a run, in one line."""
        model = config.model.name
        if {"layers", "width"} <= type(config.model).model_fields.keys():
            model += f" {config.model.layers}×{config.model.width}"
        return f"{model}, {parameters:,} parameters, loss {config.loss.name}{self.details(config)}"

    def details(self, config: Any) -> str:
        """Text that `describe` appends."""
        return ""

    def after_training(self, config: Any) -> str:
        """A suggestion to print after a run, besides sampling; may be empty."""
        return ""

    def next_command(self, config: Any, run: str) -> str:
        """The command that uses a run, whose folder is quoted for a shell; by default sampling."""
        count = self.sampling.get("count")
        option = "" if count is None else f" -n {count}"
        return f"molgen-energy sample{option} --checkpoint {run}"
