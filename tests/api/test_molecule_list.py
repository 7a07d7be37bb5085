"""The list that `sample` returns."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from rdkit import Chem

import molgen_energy as mg
from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.convert import molecule_from_ase, to_ase, to_rdkit
from molgen_energy.data.molecules import Molecule, Molecules
from molgen_energy.errors import InputError


@pytest.fixture
def some(molecules) -> mg.MoleculeList:
    found = to_rdkit(perceive(molecules.select(np.arange(7))))
    for molecule in found:
        molecule.SetProp("bonds", "perceived")
    return mg.MoleculeList(found)


def test_it_is_a_list(some):
    assert isinstance(some[0], Chem.Mol) and type(some[2:4]) is mg.MoleculeList
    assert list(some[2:4]) == list(some)[2:4]
    assert repr(some).startswith("MoleculeList of 7: ") and repr(some).endswith(", …")
    assert repr(mg.MoleculeList()) == "MoleculeList of 0: "
    assert repr(some[:1]) == f"MoleculeList of 1: {Chem.rdMolDescriptors.CalcMolFormula(some[0])}"


def test_a_saved_list_is_evaluated_as_the_list(some, tmp_path):
    """Perceived bonds stay perceived, in every format."""
    options = {"metrics": "rates", "workers": 0, "train": tmp_path / "a.h5"}
    paths = [some.save(tmp_path / name) for name in ("a.h5", "a.sdf", "a.xyz")]
    expected = mg.evaluate(some, **options)
    for path in paths:
        found = mg.evaluate(path, **options)
        assert found.summary == expected.summary
        assert found.files[0].metrics["validity"] == expected.files[0].metrics["validity"]
    with pytest.raises(InputError, match=r"the name must end in"):
        some.save(tmp_path / "a.pdb")
    with pytest.raises(InputError, match="no molecules to save"):
        mg.MoleculeList().save(tmp_path / "b.sdf")


def test_ase_atoms(some, monkeypatch):
    """Positions, elements, charges and properties, and back."""
    pytest.importorskip("ase")
    for atoms, molecule in zip(some.to_ase(), some, strict=True):
        np.testing.assert_allclose(
            atoms.get_positions(), molecule.GetConformer().GetPositions(), atol=1e-6
        )
        assert atoms.get_chemical_symbols() == [a.GetSymbol() for a in molecule.GetAtoms()]
        assert atoms.info["gap"] == molecule.GetDoubleProp("gap")
    ion = Molecule(
        np.eye(2, 3, dtype="f4"), np.array([8, 1], "u1"), np.array([-1, 0], "i1"),
        properties={"energy": 1.5},
    )  # fmt: skip
    (atoms,) = to_ase(Molecules.from_list([ion]))
    assert atoms.get_initial_charges().tolist() == [-1, 0]
    assert atoms.info == {"energy": 1.5}
    back = molecule_from_ase(atoms)
    np.testing.assert_array_equal(back.positions, ion.positions)
    atoms.numbers[1] = 0
    with pytest.raises(ValueError, match="atom 2 is no chemical element"):
        molecule_from_ase(atoms)
    with pytest.raises(ValueError, match="no atoms"):
        molecule_from_ase(atoms[:0])
    monkeypatch.setitem(sys.modules, "ase", None)
    with pytest.raises(InputError, match=r"ASE is not installed; pip install 'molgen-energy\["):
        some.to_ase()


def test_representations_of_samples():
    pytest.importorskip("ase")
    options = {"checkpoint": "qm9_energy", "steps": 3, "n_atoms": 5, "seed": 3}
    drawn = mg.sample(2, **options)
    atoms = mg.sample(2, as_="ase", **options)
    assert type(drawn) is mg.MoleculeList and len(atoms) == 2
    np.testing.assert_allclose(
        atoms[1].get_positions(), drawn[1].GetConformer().GetPositions(), atol=1e-5
    )
    with pytest.raises(InputError, match=r"did you mean 'rdkit'\?"):
        mg.sample(2, as_="rdki", **options)
    with pytest.raises(InputError, match="leave out the output file"):
        mg.sample(2, "a.sdf", as_="ase", **options)
