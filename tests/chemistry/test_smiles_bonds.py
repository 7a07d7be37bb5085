"""Bonds of a SMILES on the atoms of a geometry: RDKit reads the SMILES back."""

from __future__ import annotations

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom

from molgen_energy.chemistry.rdkit import build
from molgen_energy.chemistry.smiles_bonds import add_bonds_of_smiles
from molgen_energy.data.molecules import AROMATIC, Molecule, Molecules

SMILES = [
    "C",
    "C#CC#C",
    "[NH3+]CC([O-])=O",
    "O=N(=O)C1=CC=CN1",
    "c1ccc2[nH]ccc2c1",
    "C12C3C4C1C5C2C3C45",
    "N=C1C=NON=NC1=N",
    "[H]N=[N+]=[N-]",
]


def embedded(smiles: str, order: str) -> Molecule:
    """Geometry and elements of a SMILES, without bonds; heavy atoms first unless shuffled."""
    whole = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert rdDistGeom.EmbedMolecule(whole, randomSeed=7) == 0
    atoms = np.arange(whole.GetNumAtoms())
    if order == "shuffled":
        np.random.default_rng(3).shuffle(atoms)
    numbers = np.array([atom.GetAtomicNum() for atom in whole.GetAtoms()], np.uint8)
    positions = whole.GetConformer().GetPositions().astype(np.float32)
    return Molecule(positions[atoms], numbers[atoms], smiles=smiles)


@pytest.mark.parametrize("order", ["heavy first", "shuffled"])
def test_rdkit_reads_the_smiles_back(order):
    """With every hydrogen an atom, and no radical: RDKit's canonical SMILES is that of the text."""
    found = add_bonds_of_smiles(Molecules.from_list([embedded(text, order) for text in SMILES]))
    assert found.bonds is not None
    assert AROMATIC not in found.bonds.order
    for molecule in found:
        built = build(molecule)
        Chem.SanitizeMol(built)
        assert not any(atom.GetTotalNumHs() for atom in built.GetAtoms())
        expected = Chem.MolToSmiles(Chem.MolFromSmiles(molecule.smiles))
        assert Chem.MolToSmiles(Chem.RemoveHs(built)) == expected
        i, j = molecule.bond_index.T
        assert np.linalg.norm(molecule.positions[i] - molecule.positions[j], axis=1).max() < 2.3


@pytest.mark.parametrize(("order", "length", "bonded"), [
    ([0, 1], 1.9, True), ([0, 1], 2.2, True), ([0, 1], 2.4, False), ([1, 0], 1.9, True),
    ([1, 0], 2.2, False),
])  # fmt: skip
def test_long_bonds_need_the_order_of_the_smiles(order, length, bonded):
    """Methanol whose atoms C and O are so far apart, in both orders."""
    methanol = embedded("CO", "heavy first")
    positions = methanol.positions.copy()
    axis = (positions[1] - positions[0]) / np.linalg.norm(positions[1] - positions[0])
    # The sum of the radii of C and O is 1.42 Å, that of C and C 1.52 Å.
    positions[[1, 5]] += axis * (length * 1.42 / 1.52 - np.linalg.norm(positions[1] - positions[0]))
    atoms = [*order, 2, 3, 4, 5]
    moved = Molecule(positions[atoms], methanol.atomic_numbers[atoms], smiles="CO")
    molecules = Molecules.from_list([moved])
    if bonded:
        assert add_bonds_of_smiles(molecules).bonds.order.tolist() == [1] * 5
    else:
        with pytest.raises(ValueError, match="do not have the bonds"):
            add_bonds_of_smiles(molecules)


@pytest.mark.parametrize(
    ("smiles", "reason"),
    [
        ("C[", "cannot read the SMILES 'C['"),
        ("CN", "do not have the bonds of the SMILES 'CN'"),
        ("C", "do not have the bonds of the SMILES 'C'"),
        ("C=C", "do not have the bonds of the SMILES 'C=C'"),
        ("C(C)(C)(C)(C)C", "cannot read"),
        ("C~C", "not single, double or triple"),
        ("", "cannot read"),
    ],
)
def test_a_smiles_of_another_molecule_is_refused(smiles, reason):
    ethane = embedded("CC", "heavy first")
    other = Molecule(ethane.positions, ethane.atomic_numbers, smiles=smiles)
    with pytest.raises(ValueError, match="SMILES") as caught:
        add_bonds_of_smiles(Molecules.from_list([ethane, other]))
    assert reason in caught.value.args[0]
    assert caught.value.args[1] == 1
