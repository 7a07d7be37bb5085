"""The fields of molecules, which encode data as a state and decode states as data.

`MOLECULE_FIELDS` holds them by name. A model lists the fields that it predicts
(`DenoiserConfig.fields`); `build_layout` makes them for the molecules of a data set.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from molgen_energy.chemistry.charges import AtomKind
from molgen_energy.config import PositiveFloat, Section
from molgen_energy.data.molecules import AROMATIC
from molgen_energy.diffusion.state import Field, Layout
from molgen_energy.elements import atomic_number, symbol
from molgen_energy.errors import InputError, unknown_name
from molgen_energy.systems.molecules.state import MoleculeState


class ScalesConfig(Section):
    """Scales that fields are divided by.

    Scales above 1 keep the noise of level 0 in classes and integers far below half a unit, so that
    rounding removes it (EDM: Hoogeboom et al., ICML 2022).
    """

    positions: PositiveFloat = 1.0
    """Å."""
    elements: PositiveFloat = 4.0
    nuclear_charges: PositiveFloat = 10.0
    formal_charges: PositiveFloat = 4.0
    bonds: PositiveFloat = 4.0
    signed: bool = False
    """Whether elements and bonds are encoded as −1 and 1 rather than 0 and 1, before the division
    (JODO: Huang et al., 2023)."""


@dataclass(frozen=True)
class MoleculeStatistics:
    """Statistics of the training and validation molecules that fields need."""

    elements: tuple[int, ...]
    """Atomic numbers, ascending."""
    charges: tuple[int, int] = (0, 0)
    """Lowest and highest formal charge."""
    aromatic: bool = False
    """Whether there are aromatic bonds."""
    atoms: Counter[AtomKind] | None = None
    """Numbers of atoms by charge and bonds, without radicals; None where that is not known."""

    @classmethod
    def of_state(cls, state: MoleculeState) -> MoleculeStatistics:
        """Those of the training molecules of a checkpoint."""
        elements = tuple(atomic_number(name) for name in state.elements)
        if state.statistics is None:
            return cls(elements)
        low, high = state.statistics.charges
        atoms = None
        if state.statistics.atoms is not None:
            atoms = Counter(
                {
                    AtomKind(atomic_number(row.element), row.charge, aromatic, others): count
                    for row in state.statistics.atoms
                    for aromatic, others, count in row.bonds
                }
            )
        return cls(elements, (low, high), state.statistics.aromatic, atoms)

    def to_dict(self) -> dict[str, Any]:
        """In YAML types, without the elements, which checkpoints store by symbol."""
        found: dict[str, Any] = {"charges": list(self.charges), "aromatic": self.aromatic}
        if self.atoms is not None:
            by_charge: dict[tuple[int, int], list[list[int]]] = {}
            for kind, count in sorted(self.atoms.items()):
                rows = by_charge.setdefault((kind.element, kind.charge), [])
                rows.append([kind.aromatic, kind.others, count])
            found["atoms"] = [
                {"element": symbol(element), "charge": charge, "bonds": rows}
                for (element, charge), rows in by_charge.items()
            ]
        return found


@dataclass(frozen=True)
class MoleculeField(Field):
    """A field of a molecule. `encode` reads a batch's named data, see `MoleculeBatch.data`."""

    @classmethod
    @abstractmethod
    def build(cls, scales: ScalesConfig, statistics: MoleculeStatistics) -> MoleculeField:
        """The field for the molecules of a data set."""

    @property
    def columns(self) -> frozenset[str]:
        """Optional columns of the data file that the field needs."""
        return frozenset()


@dataclass(frozen=True)
class ClassField(MoleculeField):
    """A field of classes, each value from no to yes: from 0 to 1, or from −1 to 1 if signed."""

    signed: bool = False

    @property
    def midpoint(self) -> float:
        return 0.0 if self.signed else super().midpoint

    def _from_unit(self, values: Tensor) -> Tensor:
        """Values in the units of the state, from values from 0 to 1."""
        return (2 * values - 1 if self.signed else values) / self.scale

    def _to_unit(self, values: Tensor) -> Tensor:
        """The inverse of `_from_unit`."""
        values = values * self.scale
        return (values + 1) / 2 if self.signed else values


@dataclass(frozen=True)
class Positions(MoleculeField):
    """Centred positions; encodes and decodes `positions` (B, N, 3) in Å."""

    @classmethod
    def build(cls, scales: ScalesConfig, statistics: MoleculeStatistics) -> Positions:
        return cls("positions", "atom", 3, scales.positions, "zero_mean")


@dataclass(frozen=True)
class Elements(ClassField):
    """One-hot elements; encodes and decodes `atomic_numbers` (B, N)."""

    elements: tuple[int, ...] = ()

    @classmethod
    def build(cls, scales: ScalesConfig, statistics: MoleculeStatistics) -> Elements:
        elements = statistics.elements
        return cls(
            "elements", "atom", len(elements), scales.elements,
            discrete=True, elements=elements, signed=scales.signed,
        )  # fmt: skip

    @property
    def channel_names(self) -> tuple[str, ...]:
        return tuple(f"elements {symbol(number)}" for number in self.elements)

    def encode(self, data: Mapping[str, Tensor]) -> Tensor:
        numbers = data["atomic_numbers"].long()
        index = _element_index(self.elements, numbers.device)[numbers]
        one_hot = index[..., None] == torch.arange(self.channels, device=index.device)
        return self._from_unit(one_hot.to(data["positions"].dtype))

    def decode(self, values: Tensor) -> dict[str, Tensor]:
        numbers = torch.tensor(self.elements, dtype=torch.uint8, device=values.device)
        return {"atomic_numbers": numbers[values.argmax(dim=-1)]}


@lru_cache
def _element_index(elements: tuple[int, ...], device: torch.device) -> Tensor:
    """Index of each atomic number among the elements, (256,)."""
    index = torch.zeros(256, dtype=torch.long)
    index[list(elements)] = torch.arange(len(elements))
    return index.to(device)


@dataclass(frozen=True)
class NuclearCharges(MoleculeField):
    """Atomic numbers as numbers; encodes `atomic_numbers`, which `Elements` decodes."""

    @classmethod
    def build(cls, scales: ScalesConfig, statistics: MoleculeStatistics) -> NuclearCharges:
        return cls("nuclear_charges", "atom", 1, scales.nuclear_charges, discrete=True)

    def encode(self, data: Mapping[str, Tensor]) -> Tensor:
        numbers = data["atomic_numbers"].to(data["positions"].dtype)
        return numbers[..., None] / self.scale

    def decode(self, values: Tensor) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class FormalCharges(MoleculeField):
    """Formal charges as numbers; encodes and decodes `formal_charges` (B, N) in a range."""

    lowest: int = 0
    highest: int = 0

    @classmethod
    def build(cls, scales: ScalesConfig, statistics: MoleculeStatistics) -> FormalCharges:
        low, high = statistics.charges
        return cls(
            "formal_charges", "atom", 1, scales.formal_charges,
            discrete=True, lowest=low, highest=high,
        )  # fmt: skip

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({"formal_charges"})

    def encode(self, data: Mapping[str, Tensor]) -> Tensor:
        return data["formal_charges"].to(data["positions"].dtype)[..., None] / self.scale

    def decode(self, values: Tensor) -> dict[str, Tensor]:
        charges = (values[..., 0] * self.scale).round().clamp(self.lowest, self.highest)
        return {"formal_charges": charges.nan_to_num().to(torch.int8)}


@dataclass(frozen=True)
class Bonds(ClassField):
    """Whether a bond exists, a third of its order, and whether it is aromatic.

    Encodes and decodes `bond_orders` (B, N, N), 0 without a bond; an aromatic bond has no order.
    The third channel is there if the data has aromatic bonds. JODO's compressed edges (Huang et
    al., 2023, arXiv:2305.12347).
    """

    @classmethod
    def build(cls, scales: ScalesConfig, statistics: MoleculeStatistics) -> Bonds:
        channels = 3 if statistics.aromatic else 2
        return cls(
            "bonds", "pair", channels, scales.bonds, "symmetric",
            discrete=True, signed=scales.signed,
        )  # fmt: skip

    @property
    def channel_names(self) -> tuple[str, ...]:
        return ("bonds exists", "bonds order", "bonds aromatic")[: self.channels]

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({"bonds"})

    def encode(self, data: Mapping[str, Tensor]) -> Tensor:
        orders = data["bond_orders"]
        aromatic = orders == AROMATIC
        kinds = [orders > 0, torch.where(aromatic, 0, orders) / _HIGHEST_ORDER, aromatic]
        values = torch.stack([kind.to(data["positions"].dtype) for kind in kinds], dim=-1)
        return self._from_unit(values[..., : self.channels])

    def decode(self, values: Tensor) -> dict[str, Tensor]:
        values = self._to_unit(values)
        orders = (values[..., 1] * _HIGHEST_ORDER).nan_to_num().round().clamp(0, _HIGHEST_ORDER)
        orders = orders.to(torch.uint8)
        if self.channels == 3:
            orders = torch.where((values[..., 2] >= 0.5) & (orders == 0), AROMATIC, orders)
        decoded = torch.where(values[..., 0] >= 0.5, orders, 0).to(torch.uint8)
        atoms = decoded.shape[1]
        decoded[:, range(atoms), range(atoms)] = 0
        return {"bond_orders": decoded}


_HIGHEST_ORDER = 3

MOLECULE_FIELDS: dict[str, type[MoleculeField]] = {
    "positions": Positions,
    "elements": Elements,
    "nuclear_charges": NuclearCharges,
    "formal_charges": FormalCharges,
    "bonds": Bonds,
}
"""Fields by name. To add one, subclass `MoleculeField` and add a row."""


def build_layout(
    names: Sequence[str], scales: ScalesConfig, statistics: MoleculeStatistics
) -> Layout:
    """The named fields for the molecules of a data set.

    Raises
    ------
    InputError
        There is no such field, or positions do not come first.
    """
    fields = []
    for name in names:
        if name not in MOLECULE_FIELDS:
            raise InputError(unknown_name("field", name, MOLECULE_FIELDS))
        fields.append(MOLECULE_FIELDS[name].build(scales, statistics))
    if not fields or fields[0].name != "positions":
        raise InputError("the fields of a model of molecules must begin with positions")
    return Layout(fields)


def field_columns(layout: Layout) -> frozenset[str]:
    """Optional columns of the data file that the fields of a layout need."""
    return frozenset().union(*(field.columns for field in layout.fields.values()))
