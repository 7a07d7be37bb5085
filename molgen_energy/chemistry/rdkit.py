"""Molecules as RDKit sees them: built from given bonds, Kekulised, sanitised, named."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from rdkit import Chem, rdBase

from molgen_energy.data.molecules import AROMATIC, Molecule

BOND_TYPES = {
    1: Chem.BondType.SINGLE,
    2: Chem.BondType.DOUBLE,
    3: Chem.BondType.TRIPLE,
    AROMATIC: Chem.BondType.AROMATIC,
}
ORDERS = {kind: order for order, kind in BOND_TYPES.items()}

CROWD = 12
"""So many bonds at one atom are no chemistry; RDKit takes minutes over the rings they make."""


@dataclass(frozen=True)
class SanitizationResult:
    """What RDKit says of one molecule.

    ``smiles`` is that of the largest fragment (EDM's protocol), None for an invalid molecule;
    ``whole`` is that of the molecule with all its fragments, without stereo marks (JODO's names
    for FCD), where it was asked for; ``reason`` is RDKit's own for an invalid one;
    ``hydrogens_added`` says that it sanitised only because hydrogens were assumed that its atoms
    do not include, or unpaired electrons.
    """

    valid: bool
    fragments: int
    smiles: str | None = None
    hydrogens_added: bool = False
    reason: str = ""
    whole: str | None = None


def build(molecule: Molecule, positions: bool = False) -> Chem.RWMol:
    """RDKit molecule with the bonds and formal charges that are given; not sanitised."""
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


def most_neighbours(molecule: Molecule) -> int:
    """The largest number of bonds at one atom."""
    if molecule.bond_index is None or not len(molecule.bond_index):
        return 0
    return int(np.bincount(molecule.bond_index.ravel()).max())


def judge(molecule: Molecule, whole: bool = False) -> SanitizationResult:
    """Sanitise a molecule as a whole, then name its largest fragment.

    Parameters
    ----------
    whole
        Also name the molecule with all its fragments, if RDKit reads that name back.
    """
    built = build(molecule)
    fragments = len(Chem.GetMolFrags(built))
    if most_neighbours(molecule) > CROWD:
        return SanitizationResult(False, fragments, reason=f"an atom has more than {CROWD} bonds")
    with rdBase.BlockLogs():
        try:
            Chem.SanitizeMol(built)
            implicit = any(
                atom.GetTotalNumHs() > 0 or atom.GetNumRadicalElectrons() > 0
                for atom in built.GetAtoms()
            )
            largest = built
            if fragments > 1:
                parts = Chem.GetMolFrags(built, asMols=True, sanitizeFrags=True)
                largest = max(parts, key=lambda part: part.GetNumAtoms())
            smiles = Chem.MolToSmiles(largest)
            name = _readable_name(built) if whole else None
            return SanitizationResult(True, fragments, smiles, implicit, "", name)
        except ValueError as error:  # what sanitisation raises
            return SanitizationResult(False, fragments, reason=str(error).strip())
        except RuntimeError:  # an atom with more bonds than it can count
            return SanitizationResult(False, fragments, reason="valence beyond what RDKit counts")


def _readable_name(molecule: Chem.Mol) -> str | None:
    read = Chem.MolFromSmiles(Chem.MolToSmiles(molecule, isomericSmiles=False))
    if read is None:
        return None
    name: str = Chem.MolToSmiles(read, isomericSmiles=False)  # hydrogens are implied now
    return name


def kekulised(molecule: Molecule) -> Molecule:
    """The molecule with alternating single and double bonds for aromatic ones.

    Where RDKit finds no such assignment, the molecule is returned as it is.
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
