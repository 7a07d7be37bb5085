"""Properties of molecules as conditions of a denoiser."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field as Option
from torch import Tensor

from molgen_energy.config import Section
from molgen_energy.diffusion.noise import RandomNumbers, Stream
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.models.base import ChannelAxis

Range: TypeAlias = tuple[float, float]
"""Lowest and highest value that a property may have; equal for a single value."""
Where: TypeAlias = Mapping[str, Range | None]
"""Ranges of properties that samples shall have, by name; None draws values from training
molecules, and properties without an entry are left to the network."""

_STORED = 1000  # training molecules whose properties a checkpoint holds, to draw conditions from
_NEAREST = 0.03  # share of these from which a sample with wanted properties gets its size


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

    @property
    def knows_none(self) -> bool:
        """Whether the network also learns molecules without any property."""
        return self.dropout > 0 or (len(self.properties) > 1 and self.single_dropout > 0)


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
    atoms: NDArray[np.int64] | None = None
    """Number of atoms of the molecules of `values`, (≤1000,); earlier versions stored none."""
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
        atoms: NDArray[np.int64],
        seed: int,
        dropout: float = 0.0,
        single_dropout: float = 0.0,
    ) -> PropertyCondition:
        """The condition of training molecules with properties (M, P), NaN where missing.

        `atoms` has their number of atoms, (M,).

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
        complete = np.flatnonzero(np.isfinite(values).all(axis=1))
        if not len(complete):
            raise InputError(
                f"condition.properties: no training molecule has all of {', '.join(names)}; "
                "choose fewer"
            )
        places = np.random.default_rng(seed).permutation(len(complete))[:_STORED]
        chosen = complete[np.sort(places)]
        mean, std = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
        return cls(
            tuple(names), tuple(units), tuple(mean.tolist()), tuple(std.tolist()),
            values[chosen],
            tuple(np.nanmin(values, axis=0).tolist()), tuple(np.nanmax(values, axis=0).tolist()),
            atoms[chosen], dropout, single_dropout if len(names) > 1 else 0.0,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The condition in YAML types, for the `state.yaml` of a checkpoint."""
        return {
            "names": list(self.names), "units": list(self.units),
            "mean": list(self.mean), "std": list(self.std),
            "lowest": list(self.lowest), "highest": list(self.highest),
            "values": self.values.tolist(),
            **({} if self.atoms is None else {"atoms": self.atoms.tolist()}),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> PropertyCondition:
        """The condition from the result of `to_dict`."""
        names = tuple(state["names"])
        values = np.array(state["values"], np.float64).reshape(-1, len(names))
        # Earlier versions wrote no range: it is that of the stored molecules.
        lowest = state.get("lowest") or values.min(axis=0).tolist()
        highest = state.get("highest") or values.max(axis=0).tolist()
        atoms = state.get("atoms")
        return cls(
            names, tuple(state["units"]), tuple(state["mean"]), tuple(state["std"]), values,
            tuple(lowest), tuple(highest),
            None if atoms is None else np.array(atoms, np.int64),
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

    def values_for(
        self, where: Where | None, random: RandomNumbers, atoms: Tensor | None
    ) -> Tensor:
        """Properties of samples with some numbers of atoms (B,), (B, P) float64.

        Each is uniform in the range that `where` has for its name, NaN if the name is not there,
        and that of a random training molecule with about so many atoms if the range is None; NaN
        without `atoms`. All are those of that molecule without `where`.
        """
        wanted = dict.fromkeys(self.names) if where is None else where
        rows = [wanted.get(name) or (math.nan, math.nan) for name in self.names]
        low, high = torch.tensor(rows, dtype=torch.float64).T
        uniform = random.uniforms(Stream.WANTED, len(self.names)).cpu().double()
        values: Tensor = low + (high - low) * uniform
        drawn = [name for name in self.names if wanted.get(name, ()) is None]
        if drawn and atoms is not None:
            columns = [self.names.index(name) for name in drawn]
            values[:, columns] = torch.from_numpy(
                self.values[self._rows(random, atoms)][:, columns]
            )
        return values

    def _rows(self, random: RandomNumbers, atoms: Tensor) -> NDArray[np.int64]:
        """Random training molecules, (B,) rows of `values`, of sizes as near as there are."""
        numbers = random.integers(Stream.CONDITION).cpu().numpy()
        if self.atoms is None:
            return numbers % len(self.values)
        sizes, kind = np.unique(atoms.cpu().numpy(), return_inverse=True)
        rows = np.empty(len(numbers), np.int64)
        for k, size in enumerate(sizes):
            distance = np.abs(self.atoms - size)
            near, own = np.flatnonzero(distance == distance.min()), kind == k
            rows[own] = near[numbers[own] % len(near)]
        return rows

    def sizes_for(self, where: Where, random: RandomNumbers) -> Tensor | None:
        """Numbers of atoms (B,) of random training molecules with about the wanted properties.

        None if only the sizes of all training molecules are known, or no value is wanted.
        """
        columns = [k for k, name in enumerate(self.names) if where.get(name) is not None]
        if self.atoms is None or not columns:
            return None
        values = self.values_for(where, random, None).numpy()
        distance2 = np.zeros((len(values), len(self.values)))
        for k in columns:
            distance2 += ((values[:, k, None] - self.values[:, k]) / self.std[k]) ** 2
        count = max(1, round(_NEAREST * len(self.values)))
        near = np.argpartition(distance2, count - 1, axis=1)[:, :count]
        near.sort(axis=1)
        place = (random.uniform(Stream.SIZE).cpu().double().numpy() * count).astype(np.int64)
        return torch.from_numpy(self.atoms[near[np.arange(len(near)), place]])

    def text(self, where: Where) -> str:
        """Wanted values with their units: `gap=0.2 hartree, mu=1:2 D`; empty if there are none."""
        units = dict(zip(self.names, self.units, strict=True))
        return ", ".join(
            f"{name}={range_text(*wanted)} {units[name]}".rstrip()
            for name, wanted in where.items()
            if wanted is not None
        )

    def check(self, where: Where) -> tuple[str, ...]:
        """What to know about wanted properties, a line each: which leave the range of training.

        Raises
        ------
        InputError
            The network has no such condition; a range is empty; or a value is further outside of
            the training molecules' range than that is wide.
        """
        notes = []
        for name, wanted in where.items():
            if name not in self.names:
                raise InputError(f"--where {unknown_name('property', name, self.names)}")
            if wanted is None:
                continue
            low, high = wanted
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise InputError(
                    f"--where {name}={range_text(low, high)}: expected a finite number, or a range "
                    f"from the lowest to the highest, such as {name}=1:2"
                )
            at = self.names.index(name)
            lowest, highest = self.lowest[at], self.highest[at]
            if lowest <= low and high <= highest:
                continue
            text = (
                f"--where {name}={range_text(low, high)} is outside of the training molecules' "
                f"range, {lowest:g} to {highest:g} {self.units[at]}".rstrip()
            )
            width = max(highest - lowest, self.std[at])
            if low < lowest - width or high > highest + width:
                raise InputError(f"{text}, by more than its width; ask for values in it")
            notes.append(f"{text}; the network has not seen such molecules")
        return tuple(notes)


def range_text(low: float, high: float) -> str:
    """A range as options and messages write it: `0.2`, or `0.2:0.25`."""
    return f"{low:g}" if low == high else f"{low:g}:{high:g}"


def where_text(where: Where) -> str:
    """Wanted properties in one line: `gap=0.2, alpha=70:80, mu` for any mu of the data."""
    if not where:
        return "no property"
    return ", ".join(
        name if wanted is None else f"{name}={range_text(*wanted)}"
        for name, wanted in where.items()
    )


def wanted_ranges(where: Mapping[str, Any]) -> dict[str, Range | None]:
    """Wanted properties as ranges, from numbers, pairs of numbers or None by name.

    Raises
    ------
    InputError
        A value is neither, or there are no names.
    """
    ranges: dict[str, Range | None] = {}
    if not isinstance(where, Mapping) or not all(isinstance(name, str) for name in where):
        raise InputError(f"where: expected values by name, such as {{'gap': 0.2}}, found {where!r}")
    for name, value in where.items():
        if value is None:
            ranges[name] = None
            continue
        try:
            low, high = value if isinstance(value, Sequence) else (value, value)
            ranges[name] = float(low), float(high)
        except (TypeError, ValueError):
            raise InputError(
                f"where: {name} is {value!r}; expected a number, or its range such as (0.2, 0.25)"
            ) from None
    return ranges


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
