"""Conversion to and from RDKit molecules, Kekulisation, sanitisation and canonical SMILES."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase

from molgen_energy.data.molecules import AROMATIC, Molecule

BOND_TYPES = {
    1: Chem.BondType.SINGLE,
    2: Chem.BondType.DOUBLE,
    3: Chem.BondType.TRIPLE,
    AROMATIC: Chem.BondType.AROMATIC,
}
ORDERS = {kind: order for order, kind in BOND_TYPES.items()}

MAX_NEIGHBOURS = 12
"""Largest number of bonds at one atom that RDKit is called with: ring perception takes minutes on
molecules with more, which are chemically impossible anyway."""


@dataclass(frozen=True)
class SanitizationResult:
    """Result of `sanitize` for one molecule."""

    valid: bool
    """Whether RDKit sanitises the molecule with all its fragments."""
    fragments: int
    """Number of connected fragments."""
    smiles: str | None = None
    """Canonical SMILES of the largest fragment (EDM's protocol); None if invalid."""
    hydrogens_added: bool = False
    """Whether it is valid only with implicit hydrogens or radical electrons."""
    reason: str = ""
    """RDKit's error message if invalid."""
    whole_smiles: str | None = None
    """SMILES of all fragments without stereochemistry (JODO's protocol for FCD), if requested."""


def build(molecule: Molecule, positions: bool = False) -> Chem.RWMol:
    """RDKit molecule with the given bonds and formal charges, not sanitised.

    Parameters
    ----------
    positions
        Whether to add the positions as a conformer.
    """
    built = Chem.RWMol()
    for number in molecule.atomic_numbers.tolist():
        built.AddAtom(Chem.Atom(number))
    if molecule.formal_charges is not None:
        for k in np.flatnonzero(molecule.formal_charges).tolist():
            built.GetAtomWithIdx(k).SetFormalCharge(int(molecule.formal_charges[k]))
    if molecule.bond_index is not None and molecule.bond_order is not None:
        for (i, j), order in zip(
            molecule.bond_index.tolist(), molecule.bond_order.tolist(), strict=True
        ):
            built.AddBond(i, j, BOND_TYPES[order])
    if positions:
        conformer = Chem.Conformer(len(molecule))
        conformer.SetPositions(np.ascontiguousarray(molecule.positions, np.float64))
        conformer.Set3D(True)
        built.AddConformer(conformer)
    return built


def max_neighbours(molecule: Molecule) -> int:
    """Largest number of bonds at one atom."""
    if molecule.bond_index is None or not len(molecule.bond_index):
        return 0
    return int(np.bincount(molecule.bond_index.ravel()).max())


def sanitize(molecule: Molecule, whole_smiles: bool = False) -> SanitizationResult:
    """Sanitise a molecule with all its fragments, then name the largest one.

    Parameters
    ----------
    whole_smiles
        Whether to compute the SMILES of all fragments too. It is None where RDKit cannot parse its
        own output.
    """
    built = build(molecule)
    parts = Chem.GetMolFrags(built)
    fragments = len(parts)
    if max_neighbours(molecule) > MAX_NEIGHBOURS:
        reason = f"an atom has more than {MAX_NEIGHBOURS} bonds"
        return SanitizationResult(False, fragments, reason=reason)
    with rdBase.BlockLogs():
        try:
            Chem.SanitizeMol(built)
            implicit = any(
                atom.GetTotalNumHs() > 0 or atom.GetNumRadicalElectrons() > 0
                for atom in built.GetAtoms()
            )
            largest = built
            if fragments > 1:  # `GetMolFrags(asMols=True)` takes an hour for 20,000 fragments
                largest = build(_part(molecule, np.array(max(parts, key=len))))
                Chem.SanitizeMol(largest)
            smiles = Chem.MolToSmiles(largest)
            whole = _whole_smiles(built) if whole_smiles else None
            return SanitizationResult(True, fragments, smiles, implicit, "", whole)
        except ValueError as error:  # raised by SanitizeMol
            return SanitizationResult(False, fragments, reason=str(error).strip())
        except RuntimeError:  # the valence of an atom overflows RDKit's counter
            return SanitizationResult(False, fragments, reason="valence beyond what RDKit counts")


def _part(molecule: Molecule, atoms: NDArray[np.int64]) -> Molecule:
    """Some atoms (n,) in ascending order, with the charges of them and the bonds among them."""
    index = order = None
    if molecule.bond_index is not None and molecule.bond_order is not None:
        new = np.full(len(molecule), -1)
        new[atoms] = np.arange(len(atoms))
        index = new[molecule.bond_index]
        inside = (index >= 0).all(axis=1)
        index, order = index[inside], molecule.bond_order[inside]
    charges = molecule.formal_charges
    return Molecule(
        molecule.positions[atoms],
        molecule.atomic_numbers[atoms],
        None if charges is None else charges[atoms],
        index,
        order,
    )


def _whole_smiles(molecule: Chem.Mol) -> str | None:
    parsed = Chem.MolFromSmiles(Chem.MolToSmiles(molecule, isomericSmiles=False))
    if parsed is None:
        return None
    smiles: str = Chem.MolToSmiles(parsed, isomericSmiles=False)  # with implicit hydrogens
    return smiles


def kekulised(molecule: Molecule) -> Molecule:
    """The molecule with alternating single and double bonds in place of aromatic ones.

    A molecule that RDKit cannot Kekulise is returned unchanged.
    """
    if molecule.bond_order is None or not (molecule.bond_order == AROMATIC).any():
        return molecule
    built = build(molecule)
    with rdBase.BlockLogs():
        try:
            Chem.Kekulize(built)
        except (ValueError, RuntimeError):
            return molecule
    orders = [ORDERS[bond.GetBondType()] for bond in built.GetBonds()]
    return replace(molecule, bond_order=np.array(orders, np.uint8))
