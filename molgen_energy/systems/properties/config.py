"""Configuration and state of a network that predicts properties of molecules."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from molgen_energy.config import Config, OneOf, PositiveInt, TrainingConfig
from molgen_energy.elements import check_ascending
from molgen_energy.formats.yaml import YAMLFormat
from molgen_energy.models import PROPERTY_MODELS
from molgen_energy.models.invariant import InvariantConfig
from molgen_energy.training.state import RunState

_MOST_PROPERTIES = 1000
_Name = Annotated[str, Field(min_length=1, max_length=200)]


class PropertyTrainingConfig(TrainingConfig):
    """Optimisation of a network that predicts properties."""

    validation_molecules: PositiveInt = 2048
    """Most molecules of the validation split that the validation loss is averaged over."""


class PropertyConfig(Config):
    """A run that learns to predict properties of molecules.

    The loss is the mean absolute error, relative to the deviation of each property from a linear
    function of the composition.
    """

    system: str = "properties"
    properties: Annotated[tuple[str, ...], Field(max_length=_MOST_PROPERTIES)] = ()
    """Names of the properties, of the data file."""
    model: Annotated[InvariantConfig, OneOf("model", PROPERTY_MODELS)] = InvariantConfig()
    training: PropertyTrainingConfig = PropertyTrainingConfig()


class PropertyState(RunState):
    """The state of a run that learns to predict properties."""

    model_config = ConfigDict(extra="forbid")

    elements: Annotated[list[str], Field(min_length=1), AfterValidator(check_ascending)]
    """Symbols of the elements that the network knows, by ascending atomic number."""
    names: Annotated[list[_Name], Field(min_length=1, max_length=_MOST_PROPERTIES)]
    """Of the P properties."""
    units: list[str]
    """Their units, P."""

    @model_validator(mode="after")
    def _same_length(self) -> PropertyState:
        if len(self.units) != len(self.names):
            raise ValueError("expected a unit for each name")
        return self


PROPERTY_STATE = YAMLFormat(
    "state.yaml of a run on properties",
    "What a checkpoint holds besides configuration and weights.",
    PropertyState,
)
