"""Molecules as RDKit sees them: built from perceived bonds, sanitised, named."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, rdBase

_BOND_TYPES = {
    1: Chem.BondType.SINGLE,
    2: Chem.BondType.DOUBLE,
    3: Chem.BondType.TRIPLE,
    12: Chem.BondType.AROMATIC,
}


@dataclass(frozen=True)
class Verdict:
    """What RDKit says of one molecule.

    ``smiles`` is that of the largest fragment (EDM's protocol), None for an invalid molecule;
    ``reason`` is RDKit's own for an invalid one; ``hydrogens_added`` says that it sanitised only
    because hydrogens were assumed that its atoms do not include, or unpaired electrons.
    """

    valid: bool
    fragments: int
    smiles: str | None
    hydrogens_added: bool
    reason: str


def build(
    atomic_numbers: NDArray[np.uint8],
    orders: NDArray[np.uint8],
    positions: NDArray[np.float32] | None = None,
) -> Chem.RWMol:
    """RDKit molecule of atoms (N,) with bond orders (N, N); not sanitised, no formal charges."""
    molecule = Chem.RWMol()
    for number in atomic_numbers.tolist():
        molecule.AddAtom(Chem.Atom(number))
    first, second = np.nonzero(np.triu(orders))
    for i, j, order in zip(
        first.tolist(), second.tolist(), orders[first, second].tolist(), strict=True
    ):
        molecule.AddBond(i, j, _BOND_TYPES[order])
    if positions is not None:
        conformer = Chem.Conformer(len(atomic_numbers))
        conformer.SetPositions(np.ascontiguousarray(positions, np.float64))
        conformer.Set3D(True)
        molecule.AddConformer(conformer)
    return molecule


def judge(molecule: Chem.RWMol) -> Verdict:
    """Sanitise a molecule as a whole, then name its largest fragment; changes `molecule`."""
    fragments = len(Chem.GetMolFrags(molecule))
    with rdBase.BlockLogs():
        try:
            Chem.SanitizeMol(molecule)
            implicit = any(
                atom.GetTotalNumHs() > 0 or atom.GetNumRadicalElectrons() > 0
                for atom in molecule.GetAtoms()
            )
            largest = molecule
            if fragments > 1:
                parts = Chem.GetMolFrags(molecule, asMols=True, sanitizeFrags=True)
                largest = max(parts, key=lambda part: part.GetNumAtoms())
            return Verdict(True, fragments, Chem.MolToSmiles(largest), implicit, "")
        except ValueError as error:  # what sanitisation raises
            return Verdict(False, fragments, None, False, str(error).strip())
        except RuntimeError:  # an atom with more bonds than it can count
            return Verdict(False, fragments, None, False, "valence beyond what RDKit counts")
