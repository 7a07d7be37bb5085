"""Whether two sets of bonds of the same atoms agree, such as given and perceived ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from molgen_energy.chemistry.rdkit import bond_forms
from molgen_energy.data.molecules import Molecules


@dataclass(frozen=True)
class BondAgreement:
    """How two sets of bonds of M molecules agree; arrays (M,)."""

    same_bonds: NDArray[np.bool_]
    """Whether both have the same bonds, with aromatic ones as aromatic."""
    same_connectivity: NDArray[np.bool_]
    """Whether both have bonds between the same pairs of atoms."""
    only: NDArray[np.int64]
    """Number of bonds between pairs of atoms that only the first set bonds."""
    other_only: NDArray[np.int64]
    """The same of the second set."""
    bonds: NDArray[np.int64]
    """Number of bonds in the first set."""
    other_bonds: NDArray[np.int64]
    """The same of the second set."""


def compare_bonds(
    molecules: Molecules, others: Molecules, with_rdkit: bool = True
) -> BondAgreement:
    """Compare two sets of bonds of the same atoms, whatever the order of the bonds.

    Bonds of the same pairs are the same if their orders are equal as they are, or in aromatic form
    (`molgen_energy.chemistry.rdkit.bond_forms`), both with the formal charges of `molecules`:
    the Kekulé structure that a program chose, and charges that only one set has, do not count.
    Where RDKit finds no aromatic form, such as that of a ring it cannot Kekulise, only equal orders
    are the same.

    Parameters
    ----------
    molecules, others
        With bonds, both M molecules of the same atoms.
    with_rdkit
        Whether to look for aromatic forms.
    """
    first, first_order, first_owner = _sorted(molecules)
    second, second_order, second_owner = _sorted(others)
    count = len(molecules)
    only = np.bincount(first_owner[~np.isin(first, second)], minlength=count)
    other_only = np.bincount(second_owner[~np.isin(second, first)], minlength=count)
    connected = (only == 0) & (other_only == 0)
    of_first, of_second = connected[first_owner], connected[second_owner]
    owner = first_owner[of_first]
    unequal = owner[first_order[of_first] != second_order[of_second]]
    same = connected.copy()
    for k in np.unique(unequal).tolist():
        same[k] = with_rdkit and _same_aromatic_form(molecules, others, k)
    return BondAgreement(
        same, connected, only, other_only,
        np.bincount(first_owner, minlength=count), np.bincount(second_owner, minlength=count),
    )  # fmt: skip


def _sorted(
    molecules: Molecules,
) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]:
    """A number for the pair of atoms of each bond, ascending, with order and molecule, (ΣE,)."""
    assert molecules.bonds is not None
    atoms = np.sort(molecules.atoms_of_bonds(), axis=1)
    pair = atoms[:, 0] * len(molecules.atomic_numbers) + atoms[:, 1]
    ascending = np.argsort(pair, kind="stable")
    owner = molecules.molecule_index_of_bonds
    return pair[ascending], molecules.bonds.order[ascending], owner[ascending]


def _same_aromatic_form(molecules: Molecules, others: Molecules, k: int) -> bool:
    """Whether molecule k has the same bonds in aromatic form; both bond the same pairs."""
    one = molecules[k]
    other = replace(others[k], formal_charges=one.formal_charges)
    forms = []
    for molecule in (one, other):
        assert molecule.bond_index is not None
        atoms = np.sort(molecule.bond_index.astype(np.int64), axis=1)
        ascending = np.lexsort((atoms[:, 1], atoms[:, 0]))
        forms.append(bond_forms(molecule).aromatic[ascending])
    return bool((forms[0] == forms[1]).all())
