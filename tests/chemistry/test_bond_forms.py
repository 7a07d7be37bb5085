"""SDF of molecules with bonds: Kekulised or aromatic, or flagged; stereo as RDKit sees it."""

from __future__ import annotations

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom

from molgen_energy.chemistry.convert import from_rdkit
from molgen_energy.chemistry.molfiles import MoleculeReader, MoleculeTextWriter
from molgen_energy.chemistry.rdkit import bond_forms, build, short_reason
from molgen_energy.data.molecules import AROMATIC, Molecule, Molecules

AROMATIC_SMILES = ["Cc1ccccc1", "c1cc[nH]c1", "c1ccc2[nH]ccc2c1", "c1cnoc1", "CC=O"]
STEREO_SMILES = [
    "C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O", "F/C=C/F", "F/C=C\\F", "C[C@H](O)/C=C/[C@@H](F)Cl",
    "O[C@H]1CCC[C@@H]1F", "CC=C",
]  # fmt: skip


def embedded(smiles: list[str]) -> Molecules:
    built = [Chem.AddHs(Chem.MolFromSmiles(text)) for text in smiles]
    for molecule in built:
        assert rdDistGeom.EmbedMolecule(molecule, randomSeed=1) == 0
    return from_rdkit(built)


def written(path, molecules, form):
    with MoleculeTextWriter(path, {}, bond_form=form) as writer:
        writer.append(molecules)
    return writer, list(Chem.SDMolSupplier(str(path), sanitize=False, removeHs=False))


@pytest.mark.parametrize("form", ["kekule", "aromatic"])
def test_both_forms_are_the_same_molecules(tmp_path, form):
    molecules = embedded(AROMATIC_SMILES)
    assert (molecules.bonds.order == AROMATIC).any()
    writer, records = written(tmp_path / "a.sdf", molecules, form)
    for record, smiles in zip(records, AROMATIC_SMILES, strict=True):
        types = {int(bond.GetBondType()) for bond in record.GetBonds()}
        assert (int(Chem.BondType.AROMATIC) in types) == (form == "aromatic" and "c" in smiles)
        assert record.GetProp("bond_form") == form
        assert record.GetProp("status") == "valid"
        Chem.SanitizeMol(record)
        expected = Chem.MolToSmiles(Chem.MolFromSmiles(smiles))
        assert Chem.MolToSmiles(Chem.RemoveHs(record)) == expected
    assert not writer.invalid and not writer.not_kekulised
    # Kekulised bonds are written in the other form too.
    again = Molecules.from_list(list(MoleculeReader(tmp_path / "a.sdf")))
    _, records = written(tmp_path / "b.sdf", again, "aromatic")
    assert [r.GetBondWithIdx(1).GetIsAromatic() for r in records] == [True] * 4 + [False]


def test_what_cannot_be_kekulised_stays_and_is_flagged(tmp_path):
    """A ring of five aromatic CH; carbon with five bonds; nitro without charges is left alone."""
    angle = np.arange(5) * 2 * np.pi / 5
    ring = np.stack([np.cos(angle), np.sin(angle), 0 * angle], axis=1)
    bonds = [(i, (i + 1) % 5) for i in range(5)] + [(i, i + 5) for i in range(5)]
    broken = Molecule(
        np.concatenate([1.2 * ring, 2.3 * ring]).astype(np.float32),
        np.array([6] * 5 + [1] * 5, np.uint8),
        np.zeros(10, np.int8),
        np.array(bonds, np.uint32),
        np.array([AROMATIC] * 5 + [1] * 5, np.uint8),
    )
    positions = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    crowded = Molecule(
        positions, np.array([6, 1, 1, 1, 1, 1], np.uint8), np.zeros(6, np.int8),
        np.array([(0, k) for k in range(1, 6)], np.uint32), np.ones(5, np.uint8),
    )  # fmt: skip
    nitro = Molecule(
        positions[:4], np.array([7, 8, 8, 9], np.uint8), np.zeros(4, np.int8),
        np.array([(0, 1), (0, 2), (0, 3)], np.uint32), np.array([2, 2, 1], np.uint8),
    )  # fmt: skip
    molecules = Molecules.from_list([broken, crowded, nitro])
    writer, records = written(tmp_path / "a.sdf", molecules, "kekule")
    assert sum(bond.GetIsAromatic() for bond in records[0].GetBonds()) == 5
    assert records[0].GetProp("bond_form") == "aromatic, since RDKit cannot Kekulise it"
    assert records[0].GetProp("status").startswith("Can't kekulize mol. Unkekulized atoms")
    assert records[1].GetProp("bond_form") == "kekule"
    assert "Explicit valence for atom # 0 C, 5" in records[1].GetProp("status")
    assert [b.GetBondTypeAsDouble() for b in records[2].GetBonds()] == [2, 2, 1]
    assert [atom.GetFormalCharge() for atom in records[2].GetAtoms()] == [0] * 4
    assert writer.not_kekulised == 1
    reasons = {"aromatic bonds that cannot be Kekulised": 1, "C of valence 5": 1}
    assert writer.invalid == reasons
    for read, given in zip(MoleculeReader(tmp_path / "a.sdf"), molecules, strict=True):
        assert (read.bond_order == given.bond_order).all()


@pytest.mark.parametrize(("smiles", "reason"), [
    ("CC(C)(C)(C)C", "C of valence 5"), ("c1cccc1", "aromatic bonds that cannot be Kekulised"),
    ("Cc", "aromatic atoms outside of rings"),
])  # fmt: skip
def test_short_reasons(smiles, reason):
    with pytest.raises(ValueError, match=r"\w") as caught:
        Chem.SanitizeMol(Chem.MolFromSmiles(smiles, sanitize=False))
    assert short_reason(str(caught.value).strip()) == reason


@pytest.mark.parametrize("form", ["kekule", "aromatic"])
def test_stereo_is_that_of_the_coordinates(tmp_path, form):
    """As RDKit assigns it to the graph in memory; the SMILES is the one that was embedded."""
    molecules = embedded(STEREO_SMILES)
    written(tmp_path / "a.sdf", molecules, form)
    supplier = Chem.SDMolSupplier(str(tmp_path / "a.sdf"), removeHs=False)
    for read, molecule, smiles in zip(supplier, molecules, STEREO_SMILES, strict=True):
        assigned = build(molecule, positions=True)
        Chem.SanitizeMol(assigned)
        Chem.AssignStereochemistryFrom3D(assigned)
        tags, theirs = ([a.GetChiralTag() for a in m.GetAtoms()] for m in (read, assigned))
        assert tags == theirs
        stereo, theirs = ([b.GetStereo() for b in m.GetBonds()] for m in (read, assigned))
        assert stereo == theirs
        expected = Chem.MolToSmiles(Chem.MolFromSmiles(smiles))
        assert Chem.MolToSmiles(Chem.RemoveHs(read)) == expected


def test_forms_do_not_clean_up():
    """Perchloric acid with double bonds, which RDKit's clean-up would give charges."""
    acid = Molecule(
        np.zeros((6, 3), np.float32), np.array([17, 8, 8, 8, 8, 1], np.uint8),
        bond_index=np.array([(0, 1), (0, 2), (0, 3), (0, 4), (4, 5)], np.uint32),
        bond_order=np.array([2, 2, 2, 1, 1], np.uint8),
    )  # fmt: skip
    assert bond_forms(acid).kekule.tolist() == [2, 2, 2, 1, 1]
