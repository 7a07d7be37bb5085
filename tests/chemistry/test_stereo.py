"""Stereochemistry of positions, against RDKit's own perception."""

from __future__ import annotations

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom

from molgen_energy.chemistry.stereo import Stereochemistry

ASKED = (
    "C[C@H](F)Cl", "C[C@@H](F)Cl", "C[S@](=O)CC", "N[C@@H](C)C(=O)O", "C/C=C/C", "F/C=C\\Cl",
    "C[C@H](O)[C@@H](N)/C=C/F", "CC[P@@](=O)(C)c1ccccc1", "C[N@+](CC)(CCC)c1ccccc1",
    "O[C@H]1CC[C@@H](C)C1",
)  # fmt: skip


def embedded(smiles: str, count: int) -> Chem.Mol:
    """Conformers of all stereoisomers that a SMILES leaves open."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMultipleConfs(molecule, count, randomSeed=7)
    return molecule


def without_marks(smiles: str) -> str:
    return "".join(letter for letter in smiles if letter not in "@/\\")


@pytest.mark.parametrize("smiles", ASKED)
def test_stereochemistry_is_rdkits(smiles):
    asked = Chem.AddHs(Chem.MolFromSmiles(smiles))
    stereo = Stereochemistry.of(asked)
    assert len(stereo)
    found = embedded(without_marks(smiles), 12)
    canonical = Chem.MolToSmiles(Chem.RemoveHs(asked))
    positions = np.stack([c.GetPositions() for c in found.GetConformers()])
    expected = []
    for conformer in found.GetConformers():
        Chem.AssignStereochemistryFrom3D(found, conformer.GetId(), replaceExistingTags=True)
        bare = Chem.RemoveHs(found)
        # Tags of centres that the SMILES leaves open, such as pyramidal nitrogen, do not count.
        for atom, ours in zip(bare.GetAtoms(), Chem.RemoveHs(asked).GetAtoms(), strict=True):
            if not ours.HasProp("_CIPCode"):
                atom.SetChiralTag(Chem.ChiralType.CHI_UNSPECIFIED)
        expected.append(Chem.MolToSmiles(bare) == canonical)
    matches = stereo.matches(positions)
    assert matches.all.tolist() == expected
    assert sum(expected) > 0
    mirrored = stereo.matches(positions * [-1, 1, 1])
    np.testing.assert_array_equal(mirrored.centres, matches.mirrored)
    np.testing.assert_array_equal(mirrored.double_bonds, matches.double_bonds)


def test_what_a_molecule_does_not_specify_does_not_count():
    for smiles in ("CCO", "CC(F)Cl", "CC=CC", "C[C@H]1CC[C@@H](C)CC1"):
        stereo = Stereochemistry.of(Chem.AddHs(Chem.MolFromSmiles(smiles)))
        assert not len(stereo)
        assert stereo.matches(np.zeros((3, 20, 3))).all.tolist() == [True] * 3


def test_positions_that_are_not_finite_have_no_stereochemistry():
    stereo = Stereochemistry.of(Chem.AddHs(Chem.MolFromSmiles("C[C@H](F)Cl")))
    matches = stereo.matches(np.full((2, 8, 3), np.nan))
    assert not matches.centres.any()
    assert not matches.mirrored.any()
