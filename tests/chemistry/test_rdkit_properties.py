"""RDKit's descriptors as properties, against RDKit called by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import AllChem, Crippen, Descriptors

from molgen_energy import preprocess
from molgen_energy.chemistry.convert import from_rdkit
from molgen_energy.chemistry.rdkit_properties import add_descriptors, parse_descriptors
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecules
from molgen_energy.errors import InputError

SMILES = ("CCO", "c1ccncc1", "CC(=O)N", "[NH3+]CC([O-])=O")
WANTED = ("logp=rdkit:MolLogP", "weight = rdkit:MolWt", "tpsa=rdkit:TPSA")


def embedded(*smiles: str) -> Molecules:
    """Molecules with bonds, charges and a conformer each."""
    found = [Chem.AddHs(Chem.MolFromSmiles(text)) for text in smiles]
    for molecule in found:
        AllChem.EmbedMolecule(molecule, randomSeed=1)
    return from_rdkit(found)


@pytest.mark.parametrize("bonds", ["given", "smiles", "perceived"])
def test_descriptors_are_those_of_rdkit(bonds):
    molecules = embedded(*SMILES[: 1 if bonds == "perceived" else None])
    if bonds != "given":
        molecules = replace(molecules, bonds=None, formal_charges=None)
    if bonds == "smiles":
        molecules = replace(molecules, smiles=np.array(SMILES, object))
    found = add_descriptors(molecules, parse_descriptors(WANTED))
    for k in range(len(molecules)):
        by_hand = Chem.MolFromSmiles(SMILES[k])
        assert found.properties["logp"].values[k] == pytest.approx(Crippen.MolLogP(by_hand))
        assert found.properties["weight"].values[k] == pytest.approx(Descriptors.MolWt(by_hand))
    assert found.units == {"logp": "", "weight": "Da", "tpsa": "Å^2"}


def test_what_rdkit_cannot_read_is_missing():
    molecules = embedded("C", "CC")
    orders = molecules.bonds.order.copy()
    orders[:] = 3  # carbon with four triple bonds
    broken = replace(molecules, bonds=replace(molecules.bonds, order=orders))
    found = add_descriptors(broken, parse_descriptors(["logp=rdkit:MolLogP"]))
    assert np.isnan(found.properties["logp"].values).all()
    with pytest.raises(InputError, match="the data have a property logp already"):
        add_descriptors(found, parse_descriptors(["logp=rdkit:qed"]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("logp=rdkit:MolLogp", r"unknown descriptor of RDKit 'MolLogp'; did you mean 'MolLogP'\?"),
        ("logp", "expected NAME=rdkit:DESCRIPTOR"),
        ("logp=MolLogP", "expected NAME=rdkit:DESCRIPTOR"),
        ("a/b=rdkit:qed", "'a/b' cannot be the name of a property"),
    ],
)
def test_bad_properties_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_descriptors([text])
    with pytest.raises(InputError, match="two properties of the name 'w'"):
        parse_descriptors(["w=rdkit:MolWt", "w=rdkit:qed"])


def test_preprocess_writes_them(cli_here, tmp_path):
    (tmp_path / "a.smi").write_text("\n".join(SMILES))
    done = cli_here(
        "preprocess", "a.smi", "-o", "a.h5", "--workers", "0", "--relax", "none",
        "--property", WANTED[0], "--property", WANTED[1], "--split", "1,0,0",
    )  # fmt: skip
    assert "logp is RDKit's MolLogP" in done.stderr + done.stdout
    with MoleculeFile(tmp_path / "a.h5") as file:
        values = file.load().properties["logp"].values
    expected = [Crippen.MolLogP(Chem.MolFromSmiles(smiles)) for smiles in SMILES]
    np.testing.assert_allclose(values, expected)
    with pytest.raises(InputError, match="unknown descriptor"):
        preprocess(tmp_path / "a.smi", tmp_path / "b.h5", property="x=rdkit:Logp")
