"""The declaration of `state.yaml`: what a checkpoint holds besides configuration and weights.

`RunState` is what all physical systems share; a system adds its own keys in a subclass.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import ConfigDict, Field, model_validator

from molgen_energy.config import TrainingConfig, resolved
from molgen_energy.formats.yaml import Schema

Count = Annotated[int, Field(ge=0, le=2**53)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Progress(Schema):
    """How far the run is; `training.loop` explains the keys."""

    step: Count
    """Steps taken."""
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Training time."""
    best_valid: Finite | None = None
    """Lowest validation loss."""
    best_step: Count | None = None
    """Steps of the checkpoint `best`; earlier versions did not write it."""
    kept_valid: Finite | None = None
    """Its validation loss, which may be above the lowest by `training.tolerance`."""
    last_valid: float | None = None
    """Last validation loss; it may be infinite or NaN."""
    sums: Annotated[list[float], Field(max_length=1000)] = Field(default_factory=list)
    """Sums of loss, its terms and gradient norm since the last row of `metrics.csv`."""
    count: Count = 0
    """Steps in these sums."""
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Of these steps in the sums; earlier versions wrote none, where each has weight 1."""
    skipped: Count = 0
    """Steps whose loss or gradient was not finite."""
    skipped_in_row: Count = 0
    """Those at the end."""

    @model_validator(mode="after")
    def _consistent(self) -> Progress:
        if not self.skipped_in_row <= self.skipped <= self.step or self.count > self.step:
            raise ValueError("expected skipped_in_row ≤ skipped ≤ step, and count ≤ step")
        return self


def has_stalled(training: TrainingConfig, step: int, best_step: int | None) -> bool:
    """Whether training ends: `training.patience` validations in a row gave no better weights."""
    if training.patience is None or best_step is None:
        return False
    return step - best_step >= training.patience * resolved(training.validate_every)


class TrainingDataSummary(Schema):
    """The data of the run."""

    source: Annotated[str, Field(max_length=10_000)]
    """In words."""
    training_samples: Count
    """Samples of the training split."""
    fingerprint: Annotated[str, Field(max_length=200)]
    """Of the training data; a resumed run needs the same."""


class InitialWeightsState(Schema):
    """The weights that the run started from."""

    origin: Annotated[str, Field(max_length=10_000)]
    """Run and step of these weights."""
    sha256: Digest
    """Of their file, `ema.safetensors`."""
    values: Count
    """Numbers that were taken."""
    drawn: Count
    """Numbers that were random, of new channels."""
    new: Annotated[list[str], Field(max_length=1000)]
    """Channels that the weights did not have, such as elements."""
    left_out: Annotated[list[str], Field(max_length=1000)]
    """Channels of the weights that the run does not have."""


class TeacherState(Schema):
    """The weights that a student learns from."""

    origin: Annotated[str, Field(max_length=10_000)]
    """Run and step of these weights."""
    sha256: Digest
    """Of their file, `ema.safetensors`; a resumed run needs the same."""


class RunState(Schema):
    """The state of a checkpoint; systems may add keys."""

    model_config = ConfigDict(extra="allow")

    format: Annotated[int, Field(ge=2, le=3)]
    """Of the checkpoint."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of packages that wrote it."""
    sha256: dict[str, Digest] | None = None
    """SHA-256 of each file of weights, by name without `.safetensors`; earlier versions wrote
    none."""
    epoch: Count = 0
    """Of the next step, from 0."""
    progress: Progress
    """How far the run is."""
    data: TrainingDataSummary | None = None
    """The data of the run."""
    initial_weights: InitialWeightsState | None = None
    """The weights that the run started from, unless these were random."""
    teacher: TeacherState | None = None
    """Of a student."""


State = TypeVar("State", bound=RunState)
