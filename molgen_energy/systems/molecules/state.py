"""The declaration of the `state.yaml` of a run on molecules."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from molgen_energy.chemistry.charges import HIGHEST_SUM, MOST_AROMATIC
from molgen_energy.elements import atomic_number, check_ascending, symbol
from molgen_energy.formats.yaml import Schema, YAMLFormat
from molgen_energy.training.state import Count, Finite, RunState

MOST_ATOMS = 1_000_000
"""Atoms of a molecule in the histogram of sizes, or to sample."""
Atoms = Annotated[int, Field(ge=1, le=MOST_ATOMS)]
Charge = Annotated[int, Field(ge=-100, le=100)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
MOST_LEVELS = 10_000
"""Noise levels of a sampler that are listed one by one."""
_MOST_PROPERTIES = 1000


def _check_element(text: str) -> str:
    return symbol(atomic_number(text))


def _check_bonds(rows: list[list[int]]) -> list[list[int]]:
    for row in rows:
        if len(row) != 3 or row[0] > MOST_AROMATIC or row[1] > HIGHEST_SUM:
            raise ValueError(
                f"expected three numbers each: at most {MOST_AROMATIC} aromatic bonds, a sum of at "
                f"most {HIGHEST_SUM}, and atoms"
            )
    return rows


def _check_histogram(histogram: dict[int, int]) -> dict[int, int]:
    if not any(histogram.values()):
        raise ValueError("expected molecules of at least one size")
    return histogram


class AtomState(Schema):
    """Atoms of one element and formal charge."""

    element: Annotated[str, AfterValidator(_check_element)]
    """Symbol."""
    charge: Charge
    """Formal charge."""
    bonds: Annotated[list[list[Count]], Field(min_length=1), AfterValidator(_check_bonds)]
    """Of atoms without radicals: number of aromatic bonds, sum of the orders of the others, number
    of atoms."""


class StatisticsState(Schema):
    """Statistics of the training and validation molecules."""

    charges: Annotated[list[Charge], Field(min_length=2, max_length=2)]
    """Lowest and highest formal charge."""
    aromatic: bool
    """Whether there are aromatic bonds."""
    atoms: list[AtomState] | None = None
    """Atoms without radicals by `element`, `charge` and `bonds`, rows of three numbers: aromatic
    bonds, sum of the orders of the others, atoms. Of networks that generate charges and bonds;
    earlier versions wrote none."""

    @model_validator(mode="after")
    def _consistent(self) -> StatisticsState:
        low, high = self.charges
        if low > high:
            raise ValueError("expected the lowest charge before the highest one")
        if not all(low <= row.charge <= high for row in self.atoms or ()):
            raise ValueError(f"atoms hold a charge that is not from {low} to {high}")
        return self


class ConditionState(Schema):
    """Properties that the network is conditioned on, over the training molecules."""

    names: Annotated[list[Name], Field(min_length=1, max_length=_MOST_PROPERTIES)]
    """Of the P properties."""
    units: list[str]
    """Their units, P."""
    mean: list[Finite]
    """P."""
    std: list[_Positive]
    """P."""
    values: Annotated[list[list[Finite]], Field(min_length=1)]
    """Of some training molecules, (≤1000, P)."""
    lowest: list[Finite] | None = None
    """Of the training molecules, P; earlier versions wrote none."""
    highest: list[Finite] | None = None
    """Of the training molecules, P; earlier versions wrote none."""
    atoms: list[Atoms] | None = None
    """Number of atoms of the molecules of `values`; earlier versions wrote none."""

    @model_validator(mode="after")
    def _same_length(self) -> ConditionState:
        lengths = {len(self.units), len(self.mean), len(self.std), *map(len, self.values)}
        if lengths != {len(self.names)}:
            raise ValueError("expected a unit, a mean, a std and a column of values for each name")
        if self.atoms is not None and len(self.atoms) != len(self.values):
            raise ValueError("expected a number of atoms for each molecule of the values")
        low, high = self.lowest, self.highest
        if low is None and high is None:
            return self
        if low is None or high is None or {len(low), len(high)} != {len(self.names)}:
            raise ValueError("expected a lowest and a highest value for each name")
        if any(a >= b for a, b in zip(low, high, strict=True)):
            raise ValueError("expected each lowest value below the highest one")
        return self


class SamplingState(Schema):
    """How `sample` draws without options: as weights were evaluated, tuned or distilled."""

    sampler: Name | None = None
    """Name of the sampler."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Of the sampler."""
    spacing: str | None = None
    """Of its levels."""
    levels: Annotated[list[_NotNegative], Field(min_length=1, max_length=MOST_LEVELS)] | None = None
    """Its noise levels, or times, descending; steps and spacing count where options name one of
    them."""
    eta: Finite | None = None
    """Noise in the steps of the sampler ddim."""
    ancestral_positions: bool | None = None
    """Whether positions take ancestral steps in the sampler dpm++."""
    temperature: _NotNegative | None = None
    """Factor of the noise of steps from 0.3 Å."""
    final_noise: _NotNegative | None = None
    """Factor of the noise of steps below, and of the last noise."""


class MoleculeState(RunState):
    """The state of a run on molecules."""

    model_config = ConfigDict(extra="forbid")

    elements: Annotated[list[str], Field(min_length=1), AfterValidator(check_ascending)]
    """Symbols, by ascending atomic number."""
    size_histogram: Annotated[dict[Atoms, Count], AfterValidator(_check_histogram)]
    """Training molecules of each number of atoms."""
    statistics: StatisticsState | None = None
    """Earlier versions wrote none."""
    condition: ConditionState | None = None
    """Of a network with a condition."""
    sampling: SamplingState | None = None
    """Of pretrained weights, tuned checkpoints and students."""
    training: dict[str, str | float] | None = None
    """Of pretrained weights: command, hardware and minutes."""


MOLECULE_STATE = YAMLFormat(
    "state.yaml of a run on molecules",
    "What a checkpoint holds besides configuration and weights.",
    MoleculeState,
)
