"""Spin glasses: from couplings to a ground state (section 5 of Kaba et al., NeurIPS 2025)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from molgen_energy.config import (
    Config,
    PositiveFloat,
    PositiveInt,
    Section,
    TrainingConfig,
    loss_on,
    one_of,
)
from molgen_energy.data.arrays import write_arrays
from molgen_energy.data.splits import SPLITS
from molgen_energy.errors import InputError
from molgen_energy.losses import (
    LOSSES,
    SPIN_LOSSES,
    SpinLoss,
    lattice_couplings,
)
from molgen_energy.models import SPIN_MODELS
from molgen_energy.systems.base import Observer, SamplingResult, System, build_with_seed
from molgen_energy.systems.spins.files import read_couplings, read_spins
from molgen_energy.systems.spins.lattices import BOUNDARIES, Lattices, fixed
from molgen_energy.systems.supervised import (
    Examples,
    Predictor,
    SupervisedTask,
    data_path,
)
from molgen_energy.training.checkpoint import Checkpoint


def _odd(number: int) -> int:
    if number % 2 == 0:
        raise ValueError(f"expected an odd number such as 3, not {number}")
    return number


class SpinModelConfig(Section):
    """Network from couplings to a logit for each site."""

    name: Annotated[str, one_of("model", SPIN_MODELS)] = "resnet"
    layers: PositiveInt = 6
    width: PositiveInt = 256
    kernel: Annotated[int, Field(gt=0, le=15), AfterValidator(_odd)] = 3
    """Odd side of a convolution's window."""


class SpinLossConfig(Section):
    """Loss between logits and a ground state, or of logits alone."""

    name: Annotated[str, loss_on("spins", SPIN_LOSSES, {"positions": LOSSES})] = "local_field"
    offset: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """h⁰ of `local_field`."""
    temperature: PositiveFloat = 0.1
    """T of `local_field` and `true_energy`."""
    margin: PositiveFloat = 1.0
    """μ of `margin`."""
    gauge: Literal["fixed", "either"] = "either"
    """A ground state and its flip are alike: `either` takes the nearer of the two, `fixed` the one
    with spin +1 in the middle, of which the network is told."""


class SpinConfig(Config):
    """A run on spin glasses."""

    system: str = "spins"
    model: SpinModelConfig = SpinModelConfig()
    loss: SpinLossConfig = SpinLossConfig()
    training: TrainingConfig = TrainingConfig()


_CHANNELS = 3
_LR = 1e-3  # Kaba et al., section 5: Adam 1e-3, for every loss


class SpinSystem(System):
    """Spin glasses on a square lattice, whose ground states are predicted from their couplings."""

    name = "spins"
    samples = "lattices"
    config = SpinConfig
    sampling = MappingProxyType({"count": None, "data": None, "batch_size": None})
    output = "spins_predicted.h5"

    def task(
        self, config: Any, device: torch.device, progress: Callable[[int, int], None]
    ) -> SupervisedTask:
        """What the training loop needs."""
        given = read_spins(data_path(config, self.name))
        labelled = given.lattices.spins is not None
        if not labelled and config.loss.name != "true_energy":
            raise InputError(
                f"{given.file.path} holds no ground states, which the loss {config.loss.name} "
                "needs; train with --loss true_energy, or solve its couplings with `preprocess`"
            )
        _check_kernel(config, given.lattices)
        if config.training.lr == "auto":
            config = config.replaced({"training.lr": _LR})
        loss, periodic = build_loss(config), given.lattices.periodic

        def examples(columns: dict[str, NDArray[Any]]) -> Examples:
            lattices = Lattices(columns["right"], columns["down"], periodic)
            spins = columns["spins"] if labelled else np.ones(lattices.right.shape, np.int8)
            targets = torch.from_numpy(fixed(spins, lattices.size // 2)).flatten(1)
            return Examples(as_channels(lattices), targets[..., None].float())

        def judge(prediction: Tensor, batch: Examples, draws: Tensor) -> Tensor:
            right, down, _ = batch.inputs.unbind(dim=1)
            return loss(
                prediction.flatten(1)[..., None],
                batch.targets,
                neighbours=lattice_couplings(right, down, periodic),
            )

        model = build_model(config, periodic)
        boundary = given.file.attributes["boundary"]
        return SupervisedTask(
            config, device, given.file, examples, model, judge, {"boundary": boundary}
        )

    def generator(
        self, checkpoint: Checkpoint, device: torch.device, asked: Mapping[str, Any]
    ) -> _SpinSampling:
        """What predicts ground states for given couplings."""
        return _SpinSampling(checkpoint, device, **asked)


def build_model(config: SpinConfig, periodic: bool) -> nn.Module:
    """The configured network, its weights drawn with the run's seed."""
    section = config.model
    return build_with_seed(
        config.training.seed,
        lambda: SPIN_MODELS[section.name](
            _CHANNELS, section.layers, section.width, section.kernel, periodic
        ),
    )


def _check_kernel(config: SpinConfig, lattices: Lattices) -> None:
    if lattices.periodic and config.model.kernel // 2 > lattices.size:
        raise InputError(
            f"model.kernel: {config.model.kernel} goes more than once around a lattice of size "
            f"{lattices.size}; take a smaller one"
        )


def build_loss(config: SpinConfig) -> SpinLoss:
    """The configured loss on logits."""
    section = config.loss
    given = section.model_dump() | {"either_gauge": section.gauge == "either"}
    loss = SPIN_LOSSES[section.name]
    return loss(**{name: given[name] for name in inspect.signature(loss).parameters})


def as_channels(lattices: Lattices) -> Tensor:
    """What the network is given, (M, 3, L, L): `right`, `down`, and a 1 at the reference site.

    The reference is the site in the middle, whose spin is +1 in the targets: without it there would
    be two answers, and the others are nowhere nearer to it.
    """
    reference = np.zeros((len(lattices), 1, lattices.size, lattices.size), np.float32)
    reference[:, :, lattices.size // 2, lattices.size // 2] = 1
    couplings = lattices.couplings().astype(np.float32)
    return torch.from_numpy(np.concatenate([couplings, reference], axis=1))


class _SpinSampling:
    """Predicted ground states of lattices."""

    shared = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        count: int | None,
        data: Path | None,
        batch_size: int | None,
    ) -> None:
        config, state = checkpoint.config_as(SpinConfig), checkpoint.state
        if state.get("boundary") not in BOUNDARIES:
            raise InputError(f"{checkpoint.path} is no checkpoint of a run on spins")
        self._config, self.origin = config, checkpoint.origin
        self._boundary = str(state["boundary"])
        self._trained_on = Path(str(config.data.path))
        self._data = self._trained_on if data is None else data
        self.inputs: tuple[Path, ...] = (self._trained_on, self._data)
        self._lattices, self._records, self._source = self._given()
        _check_kernel(config, self._lattices)
        if count is not None:
            if not 1 <= count <= len(self._lattices):
                raise InputError(
                    f"-n {count}: expected 1 to {len(self._lattices):,}, of so many lattices "
                    "there are couplings"
                )
            self._lattices = self._lattices.select(slice(count))
            self._records = self._records[:count]
        self.count = len(self._lattices)
        self.method = f"one network evaluation each, for {self._source}"
        model = build_model(config, self._boundary == "periodic")
        self._predict = Predictor(checkpoint, model, device, batch_size)

    def _given(self) -> tuple[Lattices, NDArray[np.int64], str]:
        """Lattices, their numbers in the file from 1, and where they come from.

        Of the file that the run was trained on they are the test split; of any other all.
        """
        path, periodic = self._data, self._boundary == "periodic"
        if path.suffix.lower() not in (".h5", ".hdf5"):
            lattices = read_couplings(path, periodic)
            return lattices, 1 + np.arange(len(lattices)), path.name
        own = path.resolve() == self._trained_on
        if own and not path.exists():
            raise InputError(
                f"{path}, which the run was trained on, is gone; name couplings with --data FILE"
            )
        given = read_spins(path)
        if given.lattices.periodic != periodic:
            raise InputError(
                f"{path} holds lattices with {given.file.attributes['boundary']} boundaries, the "
                f"run was trained on {self._boundary} ones; name others with --data"
            )
        which = given.file.split_indices("test") if own else np.arange(len(given.file))
        if not len(which):
            raise InputError(f"{path} holds no test lattice; name couplings with --data FILE")
        source = f"{path.name}, test split" if own else path.name
        return given.lattices.select(which), 1 + which, source

    def write(self, output: Path, observer: Observer, resume: bool = False) -> SamplingResult:
        """Predict configurations and write them, with the ground states where these are known."""
        logits = self._predict(as_channels(self._lattices), observer.advance).numpy()
        columns: dict[str, NDArray[Any]] = {
            "right": self._lattices.right,
            "down": self._lattices.down,
            "prediction": fixed(np.where(logits < 0, -1, 1).astype(np.int8)),
            "record": self._records,
            "split": np.full(self.count, SPLITS.index("test"), np.uint8),
        }
        if self._lattices.spins is not None:
            columns["spins"] = self._lattices.spins
        provenance = {
            "checkpoint": self.origin,
            "couplings": self._source,
            "config": self._config.to_yaml(),
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
