"""The cleaning of "GEOM-Drugs Revisited", against its definition for one molecule at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdMolTransforms

from molgen_energy.chemistry.cleaning import FAULTS, TOLERANCE, faults, length_deviations
from molgen_energy.chemistry.convert import molecule_from_rdkit
from molgen_energy.data.molecules import Molecule, Molecules

SMILES = ("CCO", "c1ccccc1Cl", "C[S@](=O)c1ccccc1", "OB(O)c1ccncc1", "C[N+](=O)[O-]", "CBr", "CI")
RADII = {1: 0.31, 6: 0.76, 7: 0.71, 8: 0.66, 9: 0.57, 15: 1.07, 16: 1.05, 17: 1.02, 35: 1.20,
         53: 1.39}  # fmt: skip


def embedded(smiles: str, kekule: bool = False) -> Chem.Mol:
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    assert rdDistGeom.EmbedMolecule(molecule, randomSeed=1) == 0
    if kekule:
        Chem.Kekulize(molecule, clearAromaticFlags=True)
    return molecule


def first_bond_at(factor: float) -> Molecule:
    """Ethanol whose bond of the two carbons has this part of the sum of its radii."""
    molecule = embedded("CCO")
    rdMolTransforms.SetBondLength(molecule.GetConformer(), 0, 1, factor * 2 * RADII[6])
    return molecule_from_rdkit(molecule)


def test_deviations_are_those_of_the_definition():
    molecules = [embedded(smiles, kekule) for smiles in SMILES for kekule in (False, True)]
    expected = []
    for molecule in molecules:
        places = molecule.GetConformer()
        for bond in molecule.GetBonds():
            i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
            a, b = (molecule.GetAtomWithIdx(k).GetAtomicNum() for k in (i, j))
            length = rdMolTransforms.GetBondLength(places, i, j)
            radii = RADII.get(a, 1.5) + RADII.get(b, 1.5)
            expected.append(abs(length - radii) / radii)
    found = Molecules.from_list([molecule_from_rdkit(molecule) for molecule in molecules])
    np.testing.assert_allclose(length_deviations(found), expected, atol=1e-6)
    assert faults(found) == [""] * len(molecules)


@pytest.mark.parametrize("side", [-1, 1])
def test_the_tolerance_is_a_part_of_the_sum_of_radii(side):
    within, beyond = (first_bond_at(1 + side * (TOLERANCE + d)) for d in (-0.001, 0.001))
    whole = molecule_from_rdkit(embedded("CCO"))
    assert faults(Molecules.from_list([whole, within, beyond, whole])) == ["", "", FAULTS[2], ""]


def test_each_fault_has_its_reason():
    good = molecule_from_rdkit(embedded("c1ccncc1"))
    assert good.bond_order is not None
    broken = {
        FAULTS[0]: replace(good, bond_order=np.where(good.bond_order == 12, 2, 1).astype("u1")),
        FAULTS[1]: molecule_from_rdkit(embedded("[Na+].[Cl-]")),
        FAULTS[2]: replace(good, positions=good.positions * np.float32("nan")),
    }
    assert faults(Molecules.from_list([good, *broken.values()])) == ["", *broken]
    star = np.stack([np.zeros(13), np.arange(1, 14)], axis=1).astype("u4")
    crowded = Molecule(np.zeros((14, 3), "f4"), np.full(14, 6, "u1"), None, star, np.ones(13, "u1"))
    assert faults(Molecules.from_list([crowded])) == [FAULTS[0]]
    bare = replace(good, bond_index=None, bond_order=None, formal_charges=None)
    assert faults(Molecules.from_list([bare])) == [FAULTS[1]]
    assert faults(Molecules.from_list([])) == []
