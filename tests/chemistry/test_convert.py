"""RDKit molecules to arrays and back."""

from __future__ import annotations

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import AllChem

from molgen_energy.chemistry.convert import from_rdkit, to_rdkit
from molgen_energy.errors import InputError


def embedded(smiles: str, conformers: int = 1) -> Chem.Mol:
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMultipleConfs(molecule, conformers, randomSeed=3)
    return molecule


def test_there_and_back():
    given = [embedded("c1ccccc1[N+](=O)[O-]"), embedded("C#CC=O")]
    for k, molecule in enumerate(given):
        molecule.SetDoubleProp("gap", 0.25 + k)
        molecule.SetProp("smiles", Chem.MolToSmiles(Chem.RemoveHs(molecule)))
    given[0].SetProp("mu", "1.5")
    given[0].SetProp("author", "nobody")
    molecules = from_rdkit(given)
    assert len(molecules) == 2
    assert molecules.properties["gap"].values.tolist() == [0.25, 1.25]
    np.testing.assert_array_equal(molecules.properties["mu"].values, [1.5, np.nan])
    assert set(molecules.properties) == {"gap", "mu"}
    assert molecules.smiles.tolist() == ["O=[N+]([O-])c1ccccc1", "C#CC=O"]
    assert sorted(molecules[0].bond_order.tolist()).count(12) == 6
    assert molecules.groups is None
    for ours, theirs in zip(to_rdkit(molecules), given, strict=True):
        Chem.SanitizeMol(ours)
        assert Chem.MolToSmiles(ours) == Chem.MolToSmiles(theirs)
        np.testing.assert_allclose(
            ours.GetConformer().GetPositions(), theirs.GetConformer().GetPositions(), atol=1e-5
        )
        assert ours.GetConformer().Is3D()
        assert ours.GetDoubleProp("gap") == theirs.GetDoubleProp("gap")
        assert ours.GetProp("smiles") == theirs.GetProp("smiles")
    assert not to_rdkit(molecules)[1].HasProp("mu")
    again = from_rdkit(to_rdkit(molecules)).to_arrays()
    for name, array in molecules.to_arrays().items():
        np.testing.assert_array_equal(array, again[name], name)


def test_conformers_of_a_molecule_are_a_group():
    molecules = from_rdkit([embedded("CCO", 3), embedded("CC")])
    assert molecules.groups.tolist() == [0, 0, 0, 1]
    assert molecules.sizes.tolist() == [9, 9, 9, 8]
    assert not np.array_equal(molecules[0].positions, molecules[1].positions)


@pytest.mark.parametrize(
    ("smiles", "reason"),
    [("CCO", "no coordinates"), ("C*", "atom 2 is no chemical element"), ("N->[Fe]", "no order")],
)
def test_what_has_no_arrays_is_named(smiles, reason):
    molecule = Chem.MolFromSmiles(smiles, sanitize=False)
    if "coordinates" not in reason:
        molecule.AddConformer(Chem.Conformer(2))
    with pytest.raises(InputError, match=f"molecule 2: .*{reason}"):
        from_rdkit([embedded("C"), molecule])
    with pytest.raises(InputError, match="molecule 2 is None"):
        from_rdkit([embedded("C"), None])
    assert len(from_rdkit([])) == 0
