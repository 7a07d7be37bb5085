"""Molecules of a formula, or of some elements only."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from molgen_energy.diffusion.guidance import SamplingHook
from molgen_energy.diffusion.inpainting import FixedValues, MatchedValues
from molgen_energy.diffusion.state import State
from molgen_energy.elements import atomic_number, symbol
from molgen_energy.errors import InputError
from molgen_energy.systems.molecules.control.base import Batch, Control, Network, encoded
from molgen_energy.systems.molecules.state import MOST_ATOMS

_FORMULA = re.compile(r"(?:[A-Z][a-z]?[0-9]*)+", re.ASCII)
_TERM = re.compile(r"([A-Z][a-z]?)([0-9]*)", re.ASCII)
_LONGEST = 1000  # characters of a formula
_DIGITS = 8  # of a count; more say the same as these, that there are too many atoms


def parse_formula(text: str, option: str = "--formula") -> dict[str, int]:
    """Atoms of each element in Hill's order: carbon, hydrogen, then others by symbol.

    >>> parse_formula("C7H8N2")
    {'C': 7, 'H': 8, 'N': 2}

    Raises
    ------
    InputError
        The text is no formula of neutral atoms, or names no element.
    """
    if not isinstance(text, str):
        raise InputError(f"{option}: expected a text such as C7H8N2, found {type(text).__name__}")
    shown = text if len(text) <= 60 else f"{text[:60]}…"
    stripped = text.strip()
    if len(stripped) > _LONGEST or not _FORMULA.fullmatch(stripped):
        raise InputError(
            f"{option} {shown}: expected elements with numbers and nothing else, such as C7H8N2"
        )
    counts: Counter[str] = Counter()
    try:
        for name, number in _TERM.findall(stripped):
            counts[symbol(atomic_number(name))] += int(number.lstrip("0")[:_DIGITS] or not number)
    except InputError as error:
        raise InputError(f"{option} {shown}: {error}") from None
    if not 1 <= counts.total() <= MOST_ATOMS:
        raise InputError(f"{option} {shown}: expected 1 to {MOST_ATOMS:,} atoms")
    return {name: counts[name] for name in _hill_order(counts) if counts[name]}


def formula_text(counts: Mapping[str, int]) -> str:
    """A formula in Hill's order, such as `C7H8N2`."""
    return "".join(
        f"{name}{counts[name] if counts[name] > 1 else ''}" for name in _hill_order(counts)
    )


def _hill_order(names: Iterable[str]) -> list[str]:
    every = set(names)
    first = [name for name in ("C", "H") if name in every and "C" in every]
    return first + sorted(every - set(first))


def check_elements(names: Iterable[str], network: Network, what: str) -> None:
    """Raise `InputError`, which begins with `what`, unless the network generates all elements."""
    known = [symbol(number) for number in network.statistics.elements]
    if foreign := [name for name in names if name not in known]:
        raise InputError(
            f"{what}: {network.name} generates no {' and no '.join(foreign)}; choose among "
            f"{', '.join(known)}"
        )


def fixed_elements(batch: Batch, fixed: Tensor) -> dict[str, Tensor]:
    """The fields that hold elements, fixed at some atoms (B, N)."""
    names = [name for name in ("elements", "nuclear_charges") if name in batch.layout]
    return dict.fromkeys(names, fixed[..., None])


class Composition(Control):
    """Molecules of a formula: their elements are fixed, in Hill's order.

    Parameters
    ----------
    counts
        Atoms of each element, by symbol.
    """

    def __init__(self, counts: Mapping[str, int]) -> None:
        self._counts = dict(counts)
        numbers = [atomic_number(name) for name in counts]
        self._numbers = torch.repeat_interleave(
            torch.tensor(numbers, dtype=torch.uint8), torch.tensor(list(counts.values()))
        )

    @classmethod
    def read(cls, value: Any, options: Mapping[str, Any]) -> dict[str, int]:
        return parse_formula(value)

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> Composition:
        return cls(options["formula"])

    @property
    def options(self) -> dict[str, Any]:
        return {"formula": self._counts}

    def bind(self, network: Network) -> None:
        check_elements(self._counts, network, f"--formula {formula_text(self._counts)}")

    @property
    def largest(self) -> int:
        return len(self._numbers)

    def sizes(self, numbers: Tensor, uniform: Tensor) -> Tensor:
        return torch.full_like(numbers, len(self._numbers))

    def hook(self, batch: Batch) -> SamplingHook:
        numbers = self._numbers.to(batch.mask.device).expand(batch.mask.shape)
        values = encoded(batch, {"atomic_numbers": numbers})
        return MatchedValues.of_fields(values, fixed_elements(batch, batch.mask))

    def provenance(self) -> dict[str, str]:
        return {"formula": formula_text(self._counts)}


class AllowedElements(Control):
    """Generated atoms of some elements only; fixed atoms may be of others.

    Parameters
    ----------
    elements
        Their symbols.
    formula
        Whether a formula names all atoms.
    """

    def __init__(self, elements: Iterable[str], formula: bool = False) -> None:
        self._elements, self._formula = tuple(elements), formula
        self._forbidden: list[int] = []

    @classmethod
    def read(cls, value: Any, options: Mapping[str, Any]) -> list[str]:
        names = value.split(",") if isinstance(value, str) else value
        try:
            if not isinstance(names, Iterable) or not (names := list(names)):
                raise InputError(f"there is no element in {value!r}")
            numbers = {atomic_number(str(name).strip()) for name in names}
        except InputError as error:
            raise InputError(f"--elements: {error}; expected symbols, such as C,N,O,H") from None
        allowed = [symbol(number) for number in sorted(numbers)]
        formula = options.get("formula")
        if formula is not None:
            asked = parse_formula(formula)
            if others := [name for name in asked if name not in allowed]:
                raise InputError(
                    f"--formula {formula_text(asked)} has {' and '.join(others)}, which --elements "
                    f"{','.join(allowed)} forbids; leave one of them out"
                )
        return allowed

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> AllowedElements:
        return cls(options["elements"], options["formula"] is not None)

    @property
    def options(self) -> dict[str, Any]:
        return {"elements": list(self._elements)}

    def bind(self, network: Network) -> None:
        check_elements(self._elements, network, f"--elements {','.join(self._elements)}")
        allowed = {atomic_number(name) for name in self._elements}
        self._forbidden = [
            place
            for place, number in enumerate(network.statistics.elements)
            if number not in allowed
        ]

    @property
    def warnings(self) -> tuple[str, ...]:
        if "H" in self._elements or self._formula:
            return ()
        asked = ",".join(self._elements)
        return (f"--elements {asked} allows no hydrogens; with them: --elements {asked},H",)

    def hook(self, batch: Batch) -> SamplingHook | None:
        return _WithoutElements.of_batch(batch, self._forbidden) if self._forbidden else None

    def provenance(self) -> dict[str, str]:
        return {"elements": ",".join(self._elements)}


class _WithoutElements(FixedValues):
    """Holds the channels of forbidden elements at "no"."""

    @classmethod
    def of_batch(cls, batch: Batch, forbidden: list[int]) -> _WithoutElements:
        """For the places of forbidden elements among all."""
        values = encoded(batch, {})
        unlike = values["elements"]
        channels = torch.zeros(unlike.shape[-1], dtype=torch.bool, device=unlike.device)
        channels[forbidden] = True
        # Encoded elements are "no" in all channels but one; the lowest value is that of "no".
        no = torch.full_like(unlike, float(unlike.min()))
        return cls.of_fields(values.replace(elements=no), {"elements": channels.expand_as(unlike)})

    def after_sampling(self, state: State) -> State:
        """The samples with values so low that no forbidden element is the most probable one."""
        elements = state["elements"]
        lowest = elements.amin(dim=-1, keepdim=True) - 1
        where = self.fixed["atom"][..., state.layout.slices["elements"]]
        return state.replace(elements=torch.where(where, lowest, elements))
