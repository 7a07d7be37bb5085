"""Whole molecules as input of a network: checked, with the form of bonds that it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.rdkit import bond_forms
from molgen_energy.data.batches import DeviceMolecules, MoleculeBatch
from molgen_energy.data.molecules import AROMATIC, Molecule, Molecules
from molgen_energy.diffusion.state import State
from molgen_energy.elements import symbol
from molgen_energy.errors import InputError
from molgen_energy.systems.molecules.control.base import Batch, Control, Network, encoded
from molgen_energy.systems.molecules.control.composition import check_elements

GRAPH_FIELDS = ("elements", "nuclear_charges", "formal_charges", "bonds")
"""Fields that a molecule without positions has."""


class InputMolecules:
    """Molecules whose state a network can take.

    Bonds are Kekulised or aromatic as those of the training data. Molecules without bonds get those
    of their distances, if the network has bonds.

    Parameters
    ----------
    molecules
        M of them.
    names
        Of each, for messages: its option, file and record.
    network
        The network.

    Raises
    ------
    InputError
        A molecule has elements or charges that the network does not know, or bonds that it cannot
        hold.
    """

    def __init__(
        self, molecules: Sequence[Molecule], names: Sequence[str], network: Network
    ) -> None:
        low, high = network.statistics.charges
        for molecule, name in zip(molecules, names, strict=True):
            check_elements(map(symbol, np.unique(molecule.atomic_numbers).tolist()), network, name)
            charges = molecule.formal_charges
            if charges is None or "formal_charges" not in network.layout:
                continue
            if foreign := sorted({int(c) for c in charges if not low <= c <= high}):
                raise InputError(
                    f"{name} has a formal charge of {foreign[0]:+}, and {network.name} knows those "
                    f"from {low:+} to {high:+}; give another molecule"
                )
        if "bonds" in network.layout:
            aromatic = network.statistics.aromatic
            molecules = [
                _with_bonds(molecule, name, aromatic)
                for molecule, name in zip(molecules, names, strict=True)
            ]
        self.molecules = Molecules.from_list(molecules)
        self._data: dict[torch.device, DeviceMolecules] = {}

    def padded(self, records: Tensor, device: torch.device) -> MoleculeBatch:
        """The molecules with these numbers, (B,), on a device."""
        if device not in self._data:
            dense = self.molecules.bonds is not None
            self._data[device] = DeviceMolecules(self.molecules, device, dense)
        return self._data[device].batch(records.cpu().numpy())

    def state(self, batch: Batch, records: Tensor) -> State:
        """The state of the molecules with these numbers, (B,), one for each sample of a batch."""
        return encoded(batch, self.padded(records, batch.mask.device).data)


class WholeMolecules(Control):
    """Base of controls that name whole molecules, so that samples have their numbers of atoms.

    `bind` of a subclass makes `_inputs`.

    Parameters
    ----------
    sizes
        Atoms of each input molecule.
    """

    gives = True
    _inputs: InputMolecules

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = torch.tensor(sizes)
        self.records = len(sizes)

    @property
    def largest(self) -> int:
        return int(self._sizes.max())

    def sizes(self, numbers: Tensor, uniform: Tensor) -> Tensor:
        return self._sizes[self.record_of(numbers).cpu()]

    def given(self, batch: Batch) -> State:
        return self._inputs.state(batch, self.record_of(batch.numbers))


def everywhere(batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    """Fields that are fixed at all atoms, or pairs, of a batch; see `FixedValues.of_fields`."""
    device = batch.mask.device
    yes = torch.ones((), dtype=torch.bool, device=device)
    return {
        name: yes.expand(*batch.layout.shape(batch.layout.fields[name].domain, batch.mask)[:-1], 1)
        for name in names
    }


def _with_bonds(molecule: Molecule, name: str, aromatic: bool) -> Molecule:
    """The molecule with bonds in aromatic or Kekulé form."""
    if molecule.bond_order is None or (not len(molecule.bond_order) and len(molecule) > 1):
        charges = molecule.formal_charges
        molecule = perceive(Molecules.from_list([molecule]))[0]
        molecule = replace(molecule, formal_charges=charges)
    assert molecule.bond_order is not None
    if not aromatic and not (molecule.bond_order == AROMATIC).any():
        return molecule
    forms = bond_forms(molecule)
    orders = forms.aromatic if aromatic else forms.kekule
    if not aromatic and (orders == AROMATIC).any():
        raise InputError(
            f"{name} has aromatic bonds that RDKit cannot Kekulise, and the network knows single, "
            "double and triple bonds; correct the molecule"
        )
    return replace(molecule, bond_order=orders)
