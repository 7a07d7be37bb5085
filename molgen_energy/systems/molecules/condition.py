"""Properties of molecules as conditions of a denoiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field as Option
from torch import Tensor

from molgen_energy.config import Section
from molgen_energy.diffusion.noise import RandomNumbers, Stream
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.models.base import ChannelAxis

_STORED = 1000  # training molecules whose properties a checkpoint holds, to draw conditions from


class NoConditionConfig(Section):
    """No condition."""

    name: str = "none"


class PropertyConditionConfig(Section):
    """Properties of the data file as a condition."""

    name: str = "properties"
    properties: Annotated[tuple[str, ...], Option(min_length=1)] = ("gap",)
    """Names of the properties."""
    dropout: Annotated[float, Option(ge=0, le=1)] = 0.1
    """Share of training molecules without any property, for classifier-free guidance."""
    single_dropout: Annotated[float, Option(ge=0, le=1)] = 0.5
    """With several properties: the share of molecules for which a property is withheld, each
    independently of the others, so that the network knows every subset of them."""


class NoCondition:
    """No condition."""

    Config: ClassVar[type[Section]] = NoConditionConfig


@dataclass(frozen=True)
class PropertyCondition:
    """Properties, normalised over the training molecules.

    A denoiser gets two numbers for each property: its normalised value, and 1 if it is known; both
    are 0 for a missing or withheld value.
    """

    Config: ClassVar[type[Section]] = PropertyConditionConfig

    names: tuple[str, ...]
    units: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    values: NDArray[np.float64]
    """Of some training molecules, (≤1000, P), from which sampling draws."""
    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    """Range of the training molecules."""
    dropout: float = 0.0
    single_dropout: float = 0.0

    @property
    def channels(self) -> int:
        """Channels of the condition, 2P."""
        return 2 * len(self.names)

    @property
    def channel_names(self) -> tuple[str, ...]:
        """What each channel means, 2P."""
        return (
            *(f"condition {name}" for name in self.names),
            *(_known(name) for name in self.names),
        )

    @classmethod
    def fit(
        cls,
        names: Sequence[str],
        units: Sequence[str],
        values: NDArray[np.float64],
        dropout: float,
        seed: int,
        single_dropout: float = 0.0,
    ) -> PropertyCondition:
        """Means, deviations and ranges of training properties (M, P); NaN counts as missing.

        Raises
        ------
        InputError
            A property is missing for all molecules, or the same for all; or no molecule has all.
        """
        for name, column in zip(names, values.T, strict=True):
            known = column[np.isfinite(column)]
            if not len(known) or float(known.std()) == 0:
                raise InputError(
                    f"condition.properties: {name} has no two different values in the training "
                    "molecules; choose other properties"
                )
        complete = values[np.isfinite(values).all(axis=1)]
        if not len(complete):
            raise InputError(
                f"condition.properties: no training molecule has all of {', '.join(names)}; "
                "choose fewer"
            )
        chosen = np.random.default_rng(seed).permutation(len(complete))[:_STORED]
        mean, std = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
        return cls(
            tuple(names), tuple(units), tuple(mean.tolist()), tuple(std.tolist()),
            complete[np.sort(chosen)],
            tuple(np.nanmin(values, axis=0).tolist()), tuple(np.nanmax(values, axis=0).tolist()),
            dropout, single_dropout if len(names) > 1 else 0.0,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The condition in YAML types, for the `state.yaml` of a checkpoint."""
        return {
            "names": list(self.names), "units": list(self.units),
            "mean": list(self.mean), "std": list(self.std),
            "lowest": list(self.lowest), "highest": list(self.highest),
            "values": self.values.tolist(),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> PropertyCondition:
        """The condition from the result of `to_dict`."""
        names = tuple(state["names"])
        values = np.array(state["values"], np.float64).reshape(-1, len(names))
        # Earlier versions wrote no range: it is that of the stored molecules.
        lowest = state.get("lowest") or values.min(axis=0).tolist()
        highest = state.get("highest") or values.max(axis=0).tolist()
        return cls(
            names, tuple(state["units"]), tuple(state["mean"]), tuple(state["std"]), values,
            tuple(lowest), tuple(highest),
        )  # fmt: skip

    def encode(self, values: Tensor, random: RandomNumbers | None = None) -> Tensor:
        """The condition of a denoiser, (B, 2P), from properties (B, P), NaN where missing.

        With random numbers, all properties of a share `dropout` of the molecules are withheld, and
        single ones of a share `single_dropout`.
        """
        known = torch.isfinite(values)
        if random is not None and self.dropout:
            withheld = random.uniform(Stream.CONDITION_DROPOUT) < self.dropout
            known = known & ~withheld[:, None]
        if random is not None and self.single_dropout:
            single = random.uniforms(Stream.SINGLE_DROPOUT, len(self.names)) < self.single_dropout
            known = known & ~single
        mean, std = _on(values.device, self.mean), _on(values.device, self.std)
        normalised = torch.where(known, (values - mean) / std, 0)
        return torch.cat([normalised, known.to(values.dtype)], dim=1).float()

    def draw(self, random: RandomNumbers) -> Tensor:
        """Properties (B, P) float64 of random training molecules, one for each sample."""
        rows = random.integers(Stream.CONDITION).cpu() % len(self.values)
        return torch.from_numpy(self.values[rows.numpy()])

    def given(self, wanted: Mapping[str, float], count: int) -> Tensor:
        """Given properties for all of `count` samples, (count, P) float64, NaN where not given.

        Raises
        ------
        InputError
            The model has no such condition.
        """
        for name in wanted:
            if name not in self.names:
                raise InputError(unknown_name("condition", name, self.names))
        row = [wanted.get(name, float("nan")) for name in self.names]
        return torch.tensor(row, dtype=torch.float64).expand(count, -1)


@lru_cache
def _on(device: torch.device, numbers: tuple[float, ...]) -> Tensor:
    """Numbers on a device, float64; copying them at every step would make a GPU wait."""
    return torch.tensor(numbers, dtype=torch.float64, device=device)


def _known(name: str) -> str:
    """Name of the channel that says whether a property is known."""
    return f"condition {name} known"


def check_conditions(
    theirs: PropertyCondition | None, own: PropertyCondition | None, where: Path
) -> None:
    """Raise `InputError` where a run cannot start from weights with another condition."""
    if theirs is None:
        return
    if own is None:
        raise InputError(
            f"{where} has a condition on {', '.join(theirs.names)}; set condition.name=properties "
            f"and condition.properties=[{', '.join(theirs.names)}]"
        )
    units = dict(zip(own.names, own.units, strict=True))
    for name, unit in zip(theirs.names, theirs.units, strict=True):
        if units.get(name, unit) != unit:
            raise InputError(
                f"{where} has the property {name} in {unit or 'no unit'}, the data in "
                f"{units[name] or 'no unit'}; convert the data"
            )


def renormalised(
    weight: Tensor, axis: ChannelAxis, theirs: PropertyCondition, own: PropertyCondition
) -> Tensor:
    """The weight of a linear layer for properties with other means and standard deviations.

    A property v enters as z = (v − m)/s; from z' = (v − m')/s' of other data,
    w·z = w·(s'/s)·z' + w·(m' − m)/s. The second term goes to the channel of known properties.
    """
    weight = weight.float().clone()
    for name, mean, std in zip(theirs.names, theirs.mean, theirs.std, strict=True):
        if name not in own.names or f"condition {name}" not in axis.names:
            continue
        other = own.names.index(name)
        value, known = (
            weight.select(axis.axis, axis.names.index(channel))
            for channel in (f"condition {name}", _known(name))
        )
        known += value * ((own.mean[other] - mean) / std)
        value *= own.std[other] / std
    return weight


CONDITIONS: dict[str, type[NoCondition] | type[PropertyCondition]] = {
    "none": NoCondition,
    "properties": PropertyCondition,
}
