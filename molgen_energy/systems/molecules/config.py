"""The configuration of a run on molecules."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from molgen_energy.config import (
    Auto,
    Config,
    DataConfig,
    OneOf,
    PositiveFloat,
    PositiveInt,
    PositiveOrAuto,
    Section,
    TrainingConfig,
    one_of,
)
from molgen_energy.diffusion.process import PROCESSES
from molgen_energy.elements import atomic_number
from molgen_energy.losses import LOSSES, SPIN_LOSSES, EdgesConfig, EnergyConfig, SpringsConfig
from molgen_energy.losses.base import LossConfig
from molgen_energy.models import MODELS


def _symbols(value: list[str] | Auto) -> list[str] | Auto:
    if value != "auto":
        for symbol in value:
            atomic_number(symbol)
    return value


class MoleculeDataConfig(DataConfig):
    """What to train on; without a path it is the bundled sample of QM9."""

    elements: Annotated[list[str] | Auto, AfterValidator(_symbols)] = "auto"
    """Symbols of the vocabulary; `auto` takes those of the file."""
    in_memory: bool | Auto = "auto"
    """Whether all training molecules stay in memory, on the device, or are streamed in windows;
    `auto` keeps them there unless that takes more than a quarter of the memory available."""
    window: PositiveInt = 200_000
    """Training molecules in a window, where they are streamed; two windows are in memory."""


class ModelConfig(Section):
    """Network that predicts the noise."""

    name: Annotated[str, one_of("model", MODELS)] = "gdm"
    layers: PositiveInt = 9
    width: PositiveInt = 256
    normalization: PositiveFloat = 1.0
    """Sums over an atom's neighbours are divided by it."""


class DiffusionConfig(Section):
    """Forward process, and the scale that positions and features are divided by."""

    process: Annotated[str, one_of("process", PROCESSES)] = "diffusion"
    """`diffusion` predicts noise, `flow_matching` the velocity from data to noise."""
    prediction: Literal["noise", "velocity"] = "noise"
    """What the network gives of a diffusion: ε, or v = α ε − σ x, of which ε is made."""
    steps: Annotated[int, Field(ge=2)] = 1000
    precision: Annotated[float, Field(gt=0, lt=0.5)] = 1e-5
    time_power: PositiveFloat = 1.0
    """Training draws times as u to this power, u uniform: above 1, little noise is frequent."""
    spread_times: bool = False
    """Whether the times of a batch are spread evenly rather than independent."""
    position_scale: PositiveFloat = 1.0
    type_scale: PositiveFloat = 4.0
    charge_scale: PositiveFloat = 10.0

    @model_validator(mode="after")
    def _one_velocity(self) -> DiffusionConfig:
        if self.process != "diffusion" and self.prediction != "noise":
            raise ValueError("prediction is of the process diffusion; a flow has its own velocity")
        return self


def _loss_name(name: str) -> str:
    OneOf("loss", LOSSES, {"spins": SPIN_LOSSES}).section(name)
    return name


class MoleculeLossConfig(Section):
    """Loss on positions; features have the squared (`mae`: absolute) error of what is predicted."""

    name: Annotated[str, AfterValidator(_loss_name)] = "energy"
    springs: SpringsConfig = SpringsConfig()
    edges: EdgesConfig = EdgesConfig()
    position_weight: PositiveOrAuto = "auto"
    """w; `auto` takes the paper's, converted to the run's springs and edges for the energy."""

    @property
    def section(self) -> LossConfig:
        """The section of the named loss."""
        if self.name == "energy":
            return EnergyConfig(springs=self.springs, edges=self.edges)
        return LOSSES[self.name].Config()  # type: ignore[call-arg]


class MoleculeTrainingConfig(TrainingConfig):
    """Optimisation. Either `steps` or `epochs` says how long."""

    augment_rotations: bool = False
    low_precision: bool | Literal["auto"] = "auto"
    """bfloat16 on pairs; `auto` uses it where the processor has units for it (AMX, a GPU)."""
    validation_molecules: PositiveInt = 2048
    """How many molecules of the validation split the validation loss is taken over, at most."""


class MoleculeConfig(Config):
    """A run on molecules: a diffusion model."""

    system: str = "molecules"
    data: MoleculeDataConfig = MoleculeDataConfig()
    model: ModelConfig = ModelConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    loss: MoleculeLossConfig = MoleculeLossConfig()
    training: MoleculeTrainingConfig = MoleculeTrainingConfig()
