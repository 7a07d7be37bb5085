"""Descriptors: rings of hand-made molecules, published scores, and RDKit called directly."""

from __future__ import annotations

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import Descriptors, Lipinski, rdMolDescriptors

from molgen_energy.chemistry import descriptors as module
from molgen_energy.chemistry.convert import molecule_from_rdkit
from molgen_energy.chemistry.descriptors import (
    DESCRIPTORS,
    describe,
    descriptors,
    has_sa_score,
    ring_systems,
)
from molgen_energy.data.molecules import Molecule

RINGS = {
    # Name: SMILES, sizes of rings, kinds of joints of each system.
    "chain": ("CCCC", [], []),
    "biphenyl": ("c1ccccc1-c1ccccc1", [6, 6], [set(), set()]),
    "naphthalene": ("c1ccc2ccccc2c1", [6, 6], [{"fused"}]),
    "steroid": ("C1CCC2C(C1)CCC1C2CCC2CCCC12", [5, 6, 6, 6], [{"fused"}]),
    "spiro[4.5]decane": ("C1CCC2(C1)CCCCC2", [5, 6], [{"spiro"}]),
    "norbornane": ("C1CC2CCC1C2", [5, 5], [{"bridged"}]),
    "bicyclo[2.2.2]octane": ("C1CC2CCC1CC2", [6, 6, 6], [{"bridged"}]),
    "adamantane": ("C1C2CC3CC1CC(C2)C3", [6, 6, 6, 6], [{"bridged"}]),
    "cubane": ("C12C3C4C1C5C2C3C45", [4] * 6, [{"fused"}]),
    "spiro and bridged": ("C1CC2(C1)CC1CCC2C1", [4, 5, 5], [{"spiro", "bridged"}]),
    "spiro and fused": ("C1CC12CCc1ccccc12", [3, 5, 6], [{"spiro", "fused"}]),
    "two systems": ("C1CC1C1CCC2(C1)CC2", [3, 3, 5], [set(), {"spiro"}]),
    "large rings": ("C1CCCCCCC1C1CCCCCCCCCCC1", [8, 12], [set(), set()]),
    "oxepane": ("C1CCCOCC1", [7], [set()]),
}  # fmt: skip


@pytest.mark.parametrize("name", RINGS)
def test_rings_and_ring_systems(name):
    smiles, sizes, systems = RINGS[name]
    molecule = Chem.MolFromSmiles(smiles)
    found = descriptors(molecule)
    assert found["rings"] == len(sizes)
    for size in range(3, 9):
        assert found[f"rings_{size}"] == sizes.count(size)
    assert found["rings_larger"] == sum(size > 8 for size in sizes)
    assert found["ring_systems"] == len(systems)
    for kind in ("fused", "spiro", "bridged"):
        assert found[f"{kind}_systems"] == sum(kind in system for system in systems)
    # RDKit counts atoms where this counts systems.
    assert (found["spiro_systems"] > 0) == (rdMolDescriptors.CalcNumSpiroAtoms(molecule) > 0)
    bridgeheads = rdMolDescriptors.CalcNumBridgeheadAtoms(molecule)
    assert (found["bridged_systems"] > 0) == (bridgeheads > 0)


def test_systems_do_not_depend_on_the_order_of_rings():
    """A chain of fused rings whose middle one comes last is one system."""
    anthracene = Chem.MolFromSmiles("c1ccc2cc3ccccc3cc2c1")
    rings = anthracene.GetRingInfo()
    atoms, bonds = rings.AtomRings(), rings.BondRings()
    for order in ((0, 1, 2), (2, 0, 1), (0, 2, 1), (1, 2, 0)):
        systems = ring_systems([atoms[k] for k in order], [bonds[k] for k in order])
        assert systems == [frozenset({"fused"})]


@pytest.mark.parametrize(
    ("smiles", "qed"),
    [
        # Values of the authors' own implementation, from the documentation of RDKit's QED.
        ("N=C(CCSCc1csc(N=C(N)N)n1)NS(N)(=O)=O", 0.253),
        ("CNC(=NCCSCc1nc[nH]c1C)NC#N", 0.234),
        ("CCCCCNC(=N)NN=Cc1c[nH]c2ccc(CO)cc12", 0.234),
    ],
)
def test_published_qed(smiles, qed):
    assert descriptors(Chem.MolFromSmiles(smiles))["qed"] == pytest.approx(qed, abs=0.001)


@pytest.mark.parametrize(
    ("smiles", "score"),
    [
        # From the table of P. Ertl's program, `SA_Score/data/zim.100.txt`.
        ("CC(C(=O)[O-])c1ccc(-c2ccccc2)cc1", 2.462),
        ("OC(c1ccncc1)c1ccc(OCC[NH+]2CCCC2)cc1", 3.822),
        ("NC(=[NH2+])NCC1COc2ccccc2O1", 3.290),
    ],
)
def test_published_sa_scores(smiles, score):
    assert descriptors(Chem.MolFromSmiles(smiles))["sa_score"] == pytest.approx(score, abs=0.02)


DRUGS = (
    "CC(=O)Oc1ccccc1C(=O)O",
    "Cn1cnc2c1c(=O)n(C)c(=O)n2C",
    "C[N+](C)(C)CC([O-])=O",
    "OB(O)c1ccc(Cl)cc1S(=O)(=O)NC#N",
    "CN1CC[C@]23c4c5ccc(O)c4O[C@H]2[C@@H](O)C=C[C@H]3[C@H]1C5",
)


@pytest.mark.parametrize("smiles", DRUGS)
def test_molecules_with_explicit_hydrogens_against_rdkit(smiles):
    """Atoms, Kekulé bonds and charges give what RDKit computes from the SMILES."""
    whole = Chem.AddHs(Chem.MolFromSmiles(smiles))
    whole.AddConformer(Chem.Conformer(whole.GetNumAtoms()))
    Chem.Kekulize(whole, clearAromaticFlags=True)
    found = dict(zip(DESCRIPTORS, describe(molecule_from_rdkit(whole)).tolist(), strict=True))
    plain = Chem.MolFromSmiles(smiles)
    expected = {
        "molecular_weight": Descriptors.MolWt(plain),
        "qed": Descriptors.qed(plain),
        "logp": Descriptors.MolLogP(plain),
        "fraction_sp3": Descriptors.FractionCSP3(plain),
        "rotatable_bonds": Lipinski.NumRotatableBonds(plain),
        "donors": Lipinski.NumHDonors(plain),
        "acceptors": Lipinski.NumHAcceptors(plain),
        "rings": Descriptors.RingCount(plain),
        "formal_charge": sum(atom.GetFormalCharge() for atom in plain.GetAtoms()),
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_molecules_that_rdkit_refuses_have_none():
    crowd = np.stack([np.zeros(14, int), np.arange(1, 15)], axis=1)
    hub = Molecule(
        np.zeros((15, 3), "f4"), np.full(15, 6, "u1"), bond_index=crowd,
        bond_order=np.ones(14, "u1"),
    )  # fmt: skip
    assert np.isnan(describe(hub)).all()
    five = Molecule(
        np.zeros((6, 3), "f4"), np.array([6, 1, 1, 1, 1, 1], "u1"), bond_index=crowd[:5],
        bond_order=np.ones(5, "u1"),
    )  # fmt: skip
    assert np.isnan(describe(five)).all()


def test_without_the_file_of_fragments_only_the_sa_score_is_missing(monkeypatch, tmp_path):
    assert has_sa_score()
    monkeypatch.setattr(module, "_SA_SCORE", tmp_path)
    module._sa_score.cache_clear()
    try:
        assert not has_sa_score()
        found = descriptors(Chem.MolFromSmiles("CCO"))
    finally:
        monkeypatch.undo()
        module._sa_score.cache_clear()
    assert [key for key, value in found.items() if np.isnan(value)] == ["sa_score"]
