"""Spin glasses: from couplings to a ground state (section 5 of Kaba et al., NeurIPS 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict
from torch import Tensor, nn

from molgen_energy.config import Config, OneOf
from molgen_energy.data.arrays import write_arrays
from molgen_energy.data.splits import SPLITS
from molgen_energy.errors import InputError
from molgen_energy.formats.yaml import YAMLFormat
from molgen_energy.losses import LOSSES, SPIN_LOSSES, Loss, LossConfig, lattice_couplings
from molgen_energy.losses.spin import LocalFieldConfig
from molgen_energy.models import SPIN_MODELS
from molgen_energy.models.resnet import ResNetConfig
from molgen_energy.output import display_path, real_path
from molgen_energy.paths import find_again
from molgen_energy.progress import ProgressCallback
from molgen_energy.systems.base import SamplingCallback, SamplingResult, System
from molgen_energy.systems.networks import build_network
from molgen_energy.systems.spins.files import SPINS, read_couplings, read_spins
from molgen_energy.systems.spins.lattices import Lattices, fix_gauge
from molgen_energy.systems.supervised import (
    Examples,
    Predictor,
    SupervisedTask,
    check_loss,
    data_path,
    without_unknown_loss_keys,
)
from molgen_energy.training.checkpoint import Checkpoint
from molgen_energy.training.state import RunState

_CHANNELS = 3


class SpinConfig(Config):
    """A run on spin glasses."""

    system: str = "spins"
    model: Annotated[ResNetConfig, OneOf("model", SPIN_MODELS)] = ResNetConfig()
    loss: Annotated[LossConfig, OneOf("loss", SPIN_LOSSES, {"positions": LOSSES})] = (
        LocalFieldConfig()
    )

    @classmethod
    def upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Today's keys: a loss has only its own."""
        return without_unknown_loss_keys(values, SPIN_LOSSES)


class SpinState(RunState):
    """The state of a run on spin glasses."""

    model_config = ConfigDict(extra="forbid")

    boundary: Literal["open", "periodic"]
    """Of the training lattices."""


SPIN_STATE = YAMLFormat(
    "state.yaml of a run on spin glasses",
    "What a checkpoint holds besides configuration and weights.",
    SpinState,
)


class SpinSystem(System):
    """Spin glasses on a square lattice, whose ground states are predicted from their couplings."""

    name = "spins"
    samples = "lattices"
    config = SpinConfig
    state = SpinState
    sampling = MappingProxyType({"count": None, "data": None, "batch_size": None})
    output = "spins_predicted.h5"
    file_format = SPINS

    def task(self, config: Any, device: torch.device, progress: ProgressCallback) -> SupervisedTask:
        """Training on a file of spin glasses."""
        data = read_spins(data_path(config, self.name))
        lattices, periodic = data.lattices, data.lattices.periodic
        check_loss(config.loss, frozenset({"neighbours"}), self.samples)
        config.model.check_lattice(lattices.size, periodic)
        if config.training.lr == "auto":
            config = config.replaced({"training.lr": config.model.learning_rate})
        loss: Loss = config.loss.build(seed=config.training.seed)
        labelled = lattices.spins is not None
        if loss.uses_target and not labelled:
            unsupervised = [name for name, kind in SPIN_LOSSES.items() if not kind.uses_target]
            raise InputError(
                f"{data.file.path} holds no ground states, which the loss {config.loss.name} "
                f"requires; train with --loss {' or '.join(unsupervised)}, or solve its couplings "
                "with `preprocess`"
            )

        def examples(columns: dict[str, NDArray[Any]]) -> Examples:
            chosen = Lattices(columns["right"], columns["down"], periodic)
            spins = columns["spins"] if labelled else np.ones(chosen.right.shape, np.int8)
            targets = torch.from_numpy(fix_gauge(spins, chosen.size // 2)).flatten(1)
            return Examples(as_channels(chosen), targets[..., None].float())

        def batch_loss(prediction: Tensor, batch: Examples, drawn: Tensor) -> Tensor:
            right, down, _ = batch.inputs.unbind(dim=1)
            return loss(
                prediction.flatten(1)[..., None],
                batch.targets,
                neighbours=lattice_couplings(right, down, periodic),
                generator=drawn,
            )

        model = build_model(config, periodic)
        state = {"boundary": data.file.attributes["boundary"]}
        return SupervisedTask(config, device, data.file, examples, model, batch_loss, state)

    def generator(
        self, checkpoint: Checkpoint, device: torch.device, options: Mapping[str, Any]
    ) -> SpinGenerator:
        """Prediction of ground states from couplings."""
        return SpinGenerator(checkpoint, device, **options)


def build_model(config: SpinConfig, periodic: bool) -> nn.Module:
    """The configured network, with random weights of the run's seed."""
    return build_network(config.model, config.training.seed, _CHANNELS, periodic)


def as_channels(lattices: Lattices) -> Tensor:
    """The network's input, (M, 3, L, L): `right`, `down`, and a 1 at the reference site.

    The reference is the site in the middle, whose spin is +1 in the targets: without it a state and
    its flip would be equally good answers. From the middle all other sites are closest.
    """
    reference = np.zeros((len(lattices), 1, lattices.size, lattices.size), np.float32)
    reference[:, :, lattices.size // 2, lattices.size // 2] = 1
    couplings = lattices.couplings().astype(np.float32)
    return torch.from_numpy(np.concatenate([couplings, reference], axis=1))


class SpinGenerator:
    """Prediction of ground states of lattices."""

    distributed = False
    warnings: tuple[str, ...] = ()

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        count: int | None,
        data: Path | None,
        batch_size: int | None,
    ) -> None:
        config, state = checkpoint.config_as(SpinConfig), checkpoint.state_as(SpinState)
        self._config, self.origin = config, checkpoint.origin
        self._boundary = state.boundary
        self._trained_on = find_again(str(config.data.path), checkpoint.path)
        self._data = self._trained_on if data is None else data
        self._fingerprint = None if state.data is None else state.data.fingerprint
        self.inputs: tuple[Path, ...] = (self._trained_on, self._data)
        self._lattices, self._records, self._source = self._read()
        config.model.check_lattice(self._lattices.size, self._lattices.periodic)
        if count is not None:
            if not 1 <= count <= len(self._lattices):
                raise InputError(
                    f"-n {count}: expected 1 to {len(self._lattices):,}, the number of lattices "
                    "with couplings"
                )
            self._lattices = self._lattices.select(slice(count))
            self._records = self._records[:count]
        self.count = len(self._lattices)
        self.method = f"one network evaluation each, for {self._source}"
        model = build_model(config, self._boundary == "periodic")
        self._predict = Predictor(checkpoint, model, device, batch_size)

    def _read(self) -> tuple[Lattices, NDArray[np.int64], str]:
        """Lattices, their numbers in the file from 1, and the source in words.

        Of the file that the run was trained on, only the test split is read.
        """
        path, periodic = self._data, self._boundary == "periodic"
        if path.suffix.lower() not in (".h5", ".hdf5"):
            lattices = read_couplings(path, periodic)
            return lattices, 1 + np.arange(len(lattices)), display_path(Path(path.name))
        trained_on = real_path(path) == real_path(self._trained_on)
        if trained_on and not path.exists():
            raise InputError(
                f"{path}, the training data, does not exist any more; name couplings with --data "
                "FILE"
            )
        found = read_spins(path)
        if found.lattices.periodic != periodic:
            raise InputError(
                f"{path} holds lattices with {found.file.attributes['boundary']} boundaries, the "
                f"run was trained on {self._boundary} ones; name others with --data"
            )
        if trained_on and found.file.fingerprint() != self._fingerprint:
            raise InputError(
                f"{path} is not the file that the run was trained on; name couplings with --data "
                "FILE"
            )
        which = found.file.split_indices("test") if trained_on else np.arange(len(found.file))
        if not len(which):
            raise InputError(f"{path} holds no test lattice; name couplings with --data FILE")
        name = display_path(Path(path.name))
        source = f"{name}, test split" if trained_on else name
        return found.lattices.select(which), 1 + which, source

    def write(
        self, output: Path, callback: SamplingCallback, resume: bool = False
    ) -> SamplingResult:
        """Predict configurations and write them, with the ground states if the data have them."""
        logits = self._predict(as_channels(self._lattices), callback.advance).numpy()
        columns: dict[str, NDArray[Any]] = {
            "right": self._lattices.right,
            "down": self._lattices.down,
            "prediction": fix_gauge(np.where(logits < 0, -1, 1).astype(np.int8)),
            "record": self._records,
            "split": np.full(self.count, SPLITS.index("test"), np.uint8),
        }
        if self._lattices.spins is not None:
            columns["spins"] = self._lattices.spins
        provenance = {
            "checkpoint": self.origin,
            "couplings": self._source,
            "config": self._config.without_paths().to_yaml(),
        }
        write_arrays(
            output,
            "spins",
            f"predicted by {self.origin} for {self._source}",
            columns,
            {"boundary": self._boundary, "size": self._lattices.size},
            provenance,
        )
        return SamplingResult(output, self.count, self.count)
