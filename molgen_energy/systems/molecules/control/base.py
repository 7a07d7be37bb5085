"""What a user asks of drawn molecules, beside sampler and seed: the interface.

A `Control` knows which molecules of a job belong to which input, fixes part of them, or gives what
they begin with. It is made from the options that a job stores (`molgen_energy.systems.molecules.
control.build_control`), so that a resumed job needs no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from molgen_energy.data.molecules import AROMATIC, Molecule, Molecules
from molgen_energy.diffusion.guidance import SamplingHook, chained
from molgen_energy.diffusion.state import Layout, State
from molgen_energy.elements import atomic_number, symbol
from molgen_energy.formats.yaml import Schema
from molgen_energy.systems.molecules.fields import MoleculeStatistics
from molgen_energy.systems.molecules.sizes import SizeDistribution

MOST_RECORDS = 10_000
"""Input records of a job."""
LONGEST_SMARTS = 5000
"""Characters of a pattern."""
FURTHEST = 1e5
"""Å; the largest coordinate, with which single precision still holds 0.01 Å."""
_MOST_ATOMS = 10_000
_CHARGES = range(-128, 128)  # formal charges that an array can hold
_ORDERS = (1, 2, 3, 12)


def _check_atoms(lines: list[str]) -> list[str]:
    for line in lines:
        _parse_atom(line)
    return lines


def _check_bonds(lines: list[str]) -> list[str]:
    for line in lines:
        _parse_bond(line)
    return lines


def _parse_atom(line: str) -> tuple[int, tuple[float, float, float], int]:
    """Element, coordinates and formal charge."""
    words = line.split()
    if len(words) != 5:
        raise ValueError(f"expected element, x, y, z and charge, found '{line[:60]}'")
    x, y, z = map(float, words[1:4])
    if not np.isfinite((x, y, z)).all():
        raise ValueError(f"coordinates are not finite: '{line[:60]}'")
    if max(map(abs, (x, y, z))) > FURTHEST or int(words[4]) not in _CHARGES:
        raise ValueError(f"coordinates or a charge too large: '{line[:60]}'")
    return atomic_number(words[0]), (x, y, z), int(words[4])


def _parse_bond(line: str) -> tuple[int, int, int]:
    """Two atoms, from 1, and the order of their bond."""
    words = [int(word) for word in line.split()]
    if len(words) != 3 or min(words) < 1 or words[2] not in _ORDERS:
        raise ValueError(f"expected two atoms and a bond order, found '{line[:60]}'")
    return words[0], words[1], words[2]


class Record(Schema):
    """An input molecule, or a part of one, in the manifest of a job."""

    source: Annotated[str, Field(max_length=1000)]
    """Where it comes from: file and record."""
    atoms: Annotated[
        list[str], Field(min_length=1, max_length=_MOST_ATOMS), AfterValidator(_check_atoms)
    ]
    """A text for each atom: element, coordinates (Å) and formal charge."""
    bonds: Annotated[list[str], AfterValidator(_check_bonds)]
    """A text for each bond: two atoms, counted from 1, and its order, 12 if aromatic."""
    aromatic: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """Numbers of bonds, from 1, that are aromatic though their order is that of a Kekulé form."""

    @classmethod
    def of_molecule(
        cls, molecule: Molecule, source: str, aromatic: NDArray[np.bool_] | None = None
    ) -> Record:
        """The record of a molecule; `aromatic` tells it of Kekulised bonds, (E,)."""
        charges = molecule.formal_charges
        if charges is None:
            charges = np.zeros(len(molecule), np.int8)
        atoms = [
            f"{symbol(number)} {x} {y} {z} {charge}"
            for number, (x, y, z), charge in zip(
                molecule.atomic_numbers.tolist(),
                # As text, float32 has the fewest digits that tell it apart.
                molecule.positions.astype(np.float32).astype(str).tolist(),
                charges.tolist(),
                strict=True,
            )
        ]
        bonds = []
        if molecule.bond_index is not None and molecule.bond_order is not None:
            bonds = [
                f"{i + 1} {j + 1} {order}"
                for (i, j), order in zip(
                    molecule.bond_index.tolist(), molecule.bond_order.tolist(), strict=True
                )
            ]
        numbers = [] if aromatic is None else (np.flatnonzero(aromatic) + 1).tolist()
        return cls(source=source, atoms=atoms, bonds=bonds, aromatic=numbers)

    @property
    def molecule(self) -> Molecule:
        """The molecule, with formal charges and bonds."""
        atoms = [_parse_atom(line) for line in self.atoms]
        bonds = np.array([_parse_bond(line) for line in self.bonds], np.int64).reshape(-1, 3)
        return Molecule(
            np.array([place for _, place, _ in atoms], np.float32),
            np.array([number for number, _, _ in atoms], np.uint8),
            np.array([charge for _, _, charge in atoms], np.int8),
            (bonds[:, :2] - 1).astype(np.uint32),
            bonds[:, 2].astype(np.uint8),
        )

    @property
    def in_aromatic_form(self) -> Molecule:
        """The molecule with aromatic bonds as such."""
        molecule = self.molecule
        assert molecule.bond_order is not None
        orders = molecule.bond_order.copy()
        orders[np.array(self.aromatic, np.int64) - 1] = AROMATIC
        return replace(molecule, bond_order=orders)

    def __len__(self) -> int:
        return len(self.atoms)

    @model_validator(mode="after")
    def _consistent(self) -> Record:
        atoms, bonds = len(self.atoms), len(self.bonds)
        pairs = [_parse_bond(line)[:2] for line in self.bonds]
        if any(max(pair) > atoms for pair in pairs):
            raise ValueError(f"bonds of more than {atoms} atoms")
        if len({frozenset(pair) for pair in pairs if pair[0] != pair[1]}) < bonds:
            raise ValueError("bonds: expected each pair of two atoms once")
        if any(number > bonds for number in self.aromatic):
            raise ValueError(f"aromatic: there are {bonds} bonds")
        return self


class Network(NamedTuple):
    """What a control needs to know of the network."""

    layout: Layout
    """Fields that it generates."""
    statistics: MoleculeStatistics
    """Elements, charges and bonds of its training molecules."""
    sizes: SizeDistribution
    """Atoms of the training molecules."""
    n_atoms: tuple[int, int] | None
    """Fewest and most atoms that are asked for."""
    name: str
    """Of the checkpoint, for messages."""
    given: tuple[str, ...] = ()
    """Fields that it gets without noise, see `GivenFields`."""
    equivariant: bool = False
    """Whether it is E(3)-equivariant, so that mirror images are equally frequent."""


class Batch(NamedTuple):
    """Molecules that are drawn together."""

    numbers: Tensor
    """Of the molecules, (B,) int64, on the CPU."""
    mask: Tensor
    """(B, N), true at real atoms, on the device of the network."""
    layout: Layout
    """Of the states."""


class Tally:
    """Counts written molecules for the notes at the end of `sample`."""

    def add(self, molecules: Molecules, numbers: NDArray[np.int64]) -> None:
        """Count some molecules, and their numbers, (M,)."""

    def notes(self) -> tuple[str, ...]:
        """Lines for the user."""
        return ()


class Control:
    """What is asked of drawn molecules. This base class asks nothing.

    All that it says of a molecule depends on the molecule's number alone.
    """

    records: int = 1
    """Input records; a job draws the same number of molecules for each."""
    each: int = 1
    """Molecules of a record: those of record r have the numbers r·each … (r+1)·each − 1."""
    gives: bool = False
    """Whether it names whole molecules, so that `given` has values."""

    @classmethod
    def read(cls, value: Any, options: Mapping[str, Any]) -> Any:
        """The value of its option as a job stores it, from that of a user; reads files.

        Parameters
        ----------
        value
            Of the option with the name of the control in `CONTROLS`.
        options
            All options of the user.

        Raises
        ------
        InputError
            The value is not valid; names the option.
        """
        raise NotImplementedError

    @classmethod
    def of_options(cls, options: Mapping[str, Any]) -> Control:
        """The control of the options of a job."""
        raise NotImplementedError

    @property
    def options(self) -> dict[str, Any]:
        """The options of a `SamplingJob` that make it again."""
        return {}

    @property
    def units(self) -> dict[str, str]:
        """Units of the properties that `finish` adds to molecules, by name."""
        return {}

    def bind(self, network: Network) -> None:
        """Take the network that draws the molecules.

        Raises
        ------
        InputError
            The network cannot do what is asked; names the option and the remedy.
        """

    def record_of(self, numbers: Tensor) -> Tensor:
        """The input record of each molecule, (B,)."""
        if self.records == 1:
            return torch.zeros_like(numbers)
        return numbers // self.each

    @property
    def largest(self) -> int | None:
        """The most atoms of a molecule; None leaves sizes to the generator."""
        return None

    def sizes(self, numbers: Tensor, uniform: Tensor) -> Tensor | None:
        """Atoms of molecules, (B,), from their numbers and numbers in [0, 1); None as above."""
        return None

    def hook(self, batch: Batch) -> SamplingHook | None:
        """The hook of the sampler for a batch."""
        return None

    def start(self, batch: Batch) -> State | None:
        """Samples that a batch begins with, in the units of the state; None is pure noise."""
        return None

    def given(self, batch: Batch) -> State | None:
        """The values of the fields that the network gets without noise; None if there are none."""
        return None

    def finish(self, molecules: Molecules, numbers: Tensor) -> Molecules:
        """Drawn molecules after a last change, such as the frame of the input."""
        return molecules

    def label(self, molecules: Molecules, numbers: NDArray[np.int64]) -> Molecules:
        """Molecules with what tells in a file which input they belong to: SMILES and groups."""
        return molecules

    def provenance(self) -> dict[str, str]:
        """What was asked and fixed, for the file of molecules, by name."""
        return {}

    @property
    def warnings(self) -> tuple[str, ...]:
        """Lines for the user before the first molecule."""
        return ()

    def tally(self) -> Tally:
        """A new count for the notes at the end."""
        return Tally()


class _Tallies(Tally):
    def __init__(self, tallies: Sequence[Tally]) -> None:
        self._tallies = tallies

    def add(self, molecules: Molecules, numbers: NDArray[np.int64]) -> None:
        for tally in self._tallies:
            tally.add(molecules, numbers)

    def notes(self) -> tuple[str, ...]:
        return tuple(note for tally in self._tallies for note in tally.notes())


class Controls(Control):
    """Several controls; of what two of them fix, the last one decides."""

    def __init__(self, controls: Sequence[Control]) -> None:
        self._controls = tuple(controls)
        # Only one of them has input records.
        self.records = max(control.records for control in controls)
        self.gives = any(control.gives for control in controls)

    @property
    def options(self) -> dict[str, Any]:
        return self._merged(control.options for control in self._controls)

    @property
    def units(self) -> dict[str, str]:
        return self._merged(control.units for control in self._controls)

    @staticmethod
    def _merged(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        return {name: value for part in parts for name, value in part.items()}

    def bind(self, network: Network) -> None:
        for control in self._controls:
            control.each = self.each
            control.bind(network)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(warning for control in self._controls for warning in control.warnings)

    @property
    def largest(self) -> int | None:
        return next((c.largest for c in self._controls if c.largest is not None), None)

    def sizes(self, numbers: Tensor, uniform: Tensor) -> Tensor | None:
        for control in self._controls:
            if (sizes := control.sizes(numbers, uniform)) is not None:
                return sizes
        return None

    def hook(self, batch: Batch) -> SamplingHook | None:
        hooks = (control.hook(batch) for control in self._controls)
        return chained([hook for hook in hooks if hook is not None])

    def start(self, batch: Batch) -> State | None:
        for control in self._controls:
            if (state := control.start(batch)) is not None:
                return state
        return None

    def given(self, batch: Batch) -> State | None:
        for control in self._controls:
            if (state := control.given(batch)) is not None:
                return state
        return None

    def finish(self, molecules: Molecules, numbers: Tensor) -> Molecules:
        for control in self._controls:
            molecules = control.finish(molecules, numbers)
        return molecules

    def label(self, molecules: Molecules, numbers: NDArray[np.int64]) -> Molecules:
        for control in self._controls:
            molecules = control.label(molecules, numbers)
        return molecules

    def provenance(self) -> dict[str, str]:
        return self._merged(control.provenance() for control in self._controls)

    def tally(self) -> Tally:
        return _Tallies([control.tally() for control in self._controls])


def encoded(batch: Batch, data: Mapping[str, Tensor]) -> State:
    """The state of named data of a batch, see `MoleculeField.encode`; what is missing is 0.

    Parameters
    ----------
    data
        `positions` (B, N, 3) in Å, `atomic_numbers` (B, N), `formal_charges` (B, N) and
        `bond_orders` (B, N, N), on the device of the mask; any of them may be missing.
    """
    shape, device = batch.mask.shape, batch.mask.device
    pairs = (*shape, shape[1])
    every: dict[str, Tensor] = {
        "positions": torch.zeros(*shape, 3, device=device),
        "atomic_numbers": torch.zeros(shape, dtype=torch.uint8, device=device),
        "formal_charges": torch.zeros(shape, dtype=torch.int8, device=device),
        "bond_orders": torch.zeros(pairs, dtype=torch.uint8, device=device),
    }
    every |= data
    values = {name: field.encode(every) for name, field in batch.layout.fields.items()}
    return State.from_fields(batch.layout, batch.mask, values)
