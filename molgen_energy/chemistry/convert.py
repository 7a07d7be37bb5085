"""Molecules of RDKit and ASE to arrays, and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rdkit import Chem

from molgen_energy.chemistry.fields import FIRST_RECORDS, FieldSelection, data_fields
from molgen_energy.chemistry.rdkit import ORDERS, build
from molgen_energy.data.molecules import Molecule, Molecules
from molgen_energy.errors import InputError

_OTHER_BONDS = {
    Chem.BondType.DATIVE: "dative (coordination)",
    Chem.BondType.DATIVEL: "dative (coordination)",
    Chem.BondType.DATIVER: "dative (coordination)",
    Chem.BondType.HYDROGEN: "a hydrogen bond",
    Chem.BondType.IONIC: "ionic",
}
_MANY_BONDS = 1000


def molecule_from_rdkit(molecule: Chem.Mol, conformer: int = -1) -> Molecule:
    """Atoms, formal charges, bonds and one conformer of a molecule, sanitised or not.

    Hydrogens are atoms only where they are explicit; deuterium and tritium are hydrogens.
    Stereochemistry, isotopes, radicals and valences have no column and are lost.

    Raises
    ------
    ValueError
        The molecule has no conformer, an atom of no element such as those of a query, or a bond
        that is not single, double, triple or aromatic: a dative bond, a hydrogen bond, one of order
        0 or one of a query. Such a bond has no order that a model could learn or a valence check
        could count, and leaving it out would change the molecule.
    """
    # In half the time of `GetAtoms`.
    each = map(molecule.GetAtomWithIdx, range(molecule.GetNumAtoms()))
    atoms = [(atom.GetAtomicNum(), atom.GetFormalCharge()) for atom in each]
    numbers = [number for number, _ in atoms]
    if 0 in numbers:
        query = molecule.GetAtomWithIdx(numbers.index(0)).GetSymbol()
        raise ValueError(f"atom {numbers.index(0) + 1} is no chemical element ('{query}')")
    if molecule.GetNumConformers() == 0:
        raise ValueError("no atoms" if not numbers else "no coordinates (no conformer)")
    bonds = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx(), b.GetBondType()) for b in _bonds(molecule)]
    for i, j, kind in bonds:
        if kind not in ORDERS:
            bond = molecule.GetBondBetweenAtoms(i, j)
            what = "a bond of a query" if bond.HasQuery() else _OTHER_BONDS.get(kind, "of order 0")
            raise ValueError(
                f"the bond of atoms {i + 1} and {j + 1} has no order 1, 2, 3 or aromatic: "
                f"it is {what}"
            )
    return Molecule(
        as_positions(molecule.GetConformer(conformer).GetPositions()),
        np.array(numbers, np.uint8),
        np.array([charge for _, charge in atoms], np.int8),
        np.array([(i, j) for i, j, _ in bonds], np.uint32).reshape(-1, 2),
        np.array([ORDERS[kind] for _, _, kind in bonds], np.uint8),
    )


def _bonds(molecule: Chem.Mol) -> Iterable[Chem.Bond]:
    """The bonds in their order; by their numbers it takes quadratic time."""
    if molecule.GetNumBonds() <= _MANY_BONDS:
        return map(molecule.GetBondWithIdx, range(molecule.GetNumBonds()))
    of_atoms = (bond for atom in molecule.GetAtoms() for bond in atom.GetBonds())
    return [bond for _, bond in sorted({bond.GetIdx(): bond for bond in of_atoms}.items())]


def as_positions(values: ArrayLike) -> NDArray[np.float32]:
    """Coordinates (N, 3) in float32; infinite, without a warning, where they do not fit."""
    with np.errstate(over="ignore"):
        return np.array(values, np.float32)


def from_rdkit(molecules: Iterable[Chem.Mol | None]) -> Molecules:
    """All conformers of RDKit molecules, with bonds, formal charges and data.

    Every conformer becomes a molecule. A molecule's data become columns as those of an SDF record
    do (`molgen_energy.chemistry.fields`): numbers are properties, `smiles` and `group` are
    themselves. Where a molecule has several conformers and none has a `group`, the conformers of
    each molecule are one group.

    Raises
    ------
    InputError
        As `molecule_from_rdkit`, or coordinates are not finite; names the molecule, from 1.
    """
    given = [_not_none(molecule, k) for k, molecule in enumerate(molecules, start=1)]
    fields = [
        {name: str(value) for name, value in molecule.GetPropsAsDict(False, False).items()}
        for molecule in given
    ]
    group = "group" if fields and all("group" in data for data in fields) else None
    selection = FieldSelection.detect(islice(fields, FIRST_RECORDS), group)
    several = any(molecule.GetNumConformers() > 1 for molecule in given)
    found = []
    for k, molecule in enumerate(given):
        ids = [conformer.GetId() for conformer in molecule.GetConformers()] or [-1]
        columns = selection.columns(fields[k])
        if several and group is None:
            columns["group"] = k
        try:
            for conformer in ids:
                one = molecule_from_rdkit(molecule, conformer)
                if not np.isfinite(one.positions).all():
                    raise ValueError("coordinates are not finite")
                found.append(replace(one, **columns))
        except ValueError as error:
            raise InputError(f"molecule {k + 1}: {error}") from error
    return Molecules.from_list(found)


def _not_none(molecule: Chem.Mol | None, number: int) -> Chem.Mol:
    if molecule is None:
        raise InputError(f"molecule {number} is None: RDKit could not read it; leave it out")
    return molecule


def to_rdkit(molecules: Molecules) -> list[Chem.Mol]:
    """RDKit molecules with one conformer each, the bonds and charges that are there, and data.

    They are not sanitised: what a model generates need not be valid. Properties, SMILES and group
    become properties of the same name.
    """
    return [_to_rdkit(molecule) for molecule in molecules]


def _to_rdkit(molecule: Molecule) -> Chem.Mol:
    built = build(molecule, positions=True)
    built.UpdatePropertyCache(strict=False)
    for name, value in data_fields(molecule).items():
        if isinstance(value, float):
            built.SetDoubleProp(name, value)
        else:
            built.SetProp(name, str(value))
    return built.GetMol()


def to_ase(molecules: Molecules) -> list[Any]:
    """ASE `Atoms`, one for each molecule: positions in Å, atomic numbers.

    Formal charges (e) become initial charges. Properties, SMILES and group are in `info`. ASE has
    no bonds.

    Raises
    ------
    InputError
        ASE is not installed.
    """
    try:
        from ase import Atoms
    except ImportError as error:
        raise InputError("ASE is not installed; pip install 'molgen-energy[notebook]'") from error
    found = []
    for molecule in molecules:
        atoms = Atoms(numbers=molecule.atomic_numbers, positions=molecule.positions)
        if molecule.formal_charges is not None and molecule.formal_charges.any():
            atoms.set_initial_charges(molecule.formal_charges.astype(np.float64))
        atoms.info.update(data_fields(molecule))
        found.append(atoms)
    return found


def molecule_from_ase(atoms: Any) -> Molecule:
    """Positions and elements of an ASE `Atoms`, without bonds; its cell is ignored.

    Raises
    ------
    ValueError
        It has no atoms, or an atom of no element (`X`).
    """
    numbers = np.array(atoms.get_atomic_numbers())
    if not len(numbers):
        raise ValueError("no atoms")
    if (numbers == 0).any():
        raise ValueError(f"atom {int(np.argmin(numbers)) + 1} is no chemical element ('X')")
    return Molecule(as_positions(atoms.get_positions()), numbers.astype(np.uint8))
