"""What `preprocess` does about bad and suspicious molecules, by its options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import AllChem

from molgen_energy.api.preprocess import preprocess
from molgen_energy.chemistry.molfiles import MoleculeTextWriter
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecules
from molgen_energy.errors import InputError

WATER = "3\ngap=1\nO 0 0 0\nH 0.96 0 0.1\nH -0.24 0.93 0\n"
ETHANOL_TYPES = (
    "9\nAtoms. Timestep: 0\n1 -0.854 0.224 0.242\n1 0.387 -0.359 -0.401\n2 1.532 0.384 -0.007\n"
    "3 -1.748 -0.328 -0.065\n3 -0.975 1.276 -0.036\n3 -0.777 0.189 1.334\n3 0.528 -1.403 -0.108\n"
    "3 0.310 -0.314 -1.492\n3 1.597 0.331 0.961\n"
)


def loaded(path: Path) -> Molecules:
    with MoleculeFile(path) as file:
        return file.load()


def rdkit_molecules(*smiles: str, hydrogens: bool = True, flat: bool = False) -> list[Chem.Mol]:
    mols = []
    for text in smiles:
        mol = Chem.AddHs(Chem.MolFromSmiles(text)) if hydrogens else Chem.MolFromSmiles(text)
        if flat:
            AllChem.Compute2DCoords(mol)
        else:
            AllChem.EmbedMolecule(mol, randomSeed=1)
            positions = mol.GetConformer().GetPositions()
            for k, atoms in enumerate(Chem.GetMolFrags(mol)):
                positions[list(atoms)] += 10 * k
            mol.GetConformer().SetPositions(positions)
        mols.append(mol)
    return mols


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Two good molecules, a drawing, one without hydrogens, a salt, a copy, and one of zeros."""
    good = rdkit_molecules("CCO", "c1ccccc1N")
    zeros = Chem.Mol(good[0])
    zeros.GetConformer().SetPositions(np.zeros((9, 3)))
    mols = [
        *good,
        *rdkit_molecules("CCC", flat=True),
        *rdkit_molecules("CCCC", hydrogens=False),
        *rdkit_molecules("[Na+].CC(=O)[O-]"),
        good[1],
        zeros,
    ]
    path = tmp_path / "mixed.sdf"
    with Chem.SDWriter(str(path)) as writer:
        for k, mol in enumerate(mols):
            mol.SetDoubleProp("energy", float(k))
            writer.write(mol)
    return path


def test_each_kind_is_counted(mixed, tmp_path):
    with pytest.raises(InputError, match=r"mixed\.sdf: record 7: all atoms .*pass --skip-bad"):
        preprocess(mixed, tmp_path / "a.h5")
    assert not (tmp_path / "a.h5").exists()
    result = preprocess(mixed, tmp_path / "a.h5", skip_bad=True)
    assert (result.count, result.skipped_count) == (6, 1)
    assert result.warnings == (
        "1 of 6 molecules lies flat in z = 0, as 2D drawings do (record 3); write their SMILES "
        "to a .smi file, of which `preprocess smiles` makes conformers",
        "1 of 6 molecules has no hydrogens, which their carbons need (record 4); add hydrogens, or "
        "leave such records out with --require-hydrogens",
        "1 of 6 molecules holds several fragments, such as salts (record 5); --largest-fragment "
        "keeps the largest of each",
        "1 of 6 molecules repeats the elements and positions of an earlier one (record 6); "
        "--drop-duplicates leaves them out",
    )


def test_options_do_something_about_each_kind(mixed, tmp_path):
    result = preprocess(
        mixed, tmp_path / "a.h5", skip_bad=True, require_hydrogens=True, largest_fragment=True,
        drop_duplicates=True, elements="H,C,N,O",
    )  # fmt: skip
    assert len(result.warnings) == 1  # the drawing
    for text in (
        "1 reduced to the largest fragment", "1 left out for missing hydrogens",
        "1 left out as duplicates",
    ):  # fmt: skip
        assert text in result.summary
    molecules = loaded(tmp_path / "a.h5")
    assert molecules.sizes.tolist() == [9, 14, 11, 7]
    assert molecules.properties["energy"].values.tolist() == [0, 1, 2, 4]
    assert molecules[3].formal_charges.sum() == -1


def test_elements_that_are_left_out_are_named(mixed, tmp_path):
    with pytest.raises(InputError, match=r"record 2: it holds N, which is not among H, C, O"):
        preprocess(mixed, tmp_path / "a.h5", elements="C,H,O")
    result = preprocess(mixed, tmp_path / "a.h5", elements="C,H,O", skip_bad=True)
    assert "2 left out with N; 1 left out with Na" in result.summary
    with pytest.raises(InputError, match=r"no usable molecule \(.*7 left out with C;.* among Xe"):
        preprocess(mixed, tmp_path / "a.h5", elements="Xe", skip_bad=True)
    with pytest.raises(InputError, match="'Q' is no chemical element"):
        preprocess(mixed, tmp_path / "a.h5", elements="Q")


def test_molecules_in_memory_are_screened(tmp_path):
    mols = rdkit_molecules("CCO", "[Na+].CC(=O)[O-]")
    result = preprocess(mols, tmp_path / "a.h5", largest_fragment=True)
    assert loaded(tmp_path / "a.h5").sizes.tolist() == [9, 7]
    assert "1 reduced" in result.summary
    assert any("fragments" in text for text in preprocess(mols, tmp_path / "a.h5").warnings)


def test_records_of_several_files_are_named(tmp_path):
    (tmp_path / "a.xyz").write_text(WATER)
    (tmp_path / "b.xyz").write_text(WATER.replace("O 0 0 0", "O 0 0 1.5") + WATER)
    result = preprocess([tmp_path / "a.xyz", tmp_path / "b.xyz"], tmp_path / "a.h5")
    assert any("(record b.xyz: 2)" in text for text in result.warnings)
    (tmp_path / "b.xyz").write_text(WATER.replace("-0.24 0.93 0", "0.96 0 0.1"))
    with pytest.raises(InputError, match=r"b\.xyz: record 1: two atoms are in one place"):
        preprocess([tmp_path / "a.xyz", tmp_path / "b.xyz"], tmp_path / "a.h5")


def test_atom_types(tmp_path):
    path = tmp_path / "dump.xyz"
    path.write_text(ETHANOL_TYPES)
    (warning,) = preprocess(path, tmp_path / "a.h5").warnings
    assert "H, He, Li are the numbers 1 to 3" in warning and "--types C,O,H" in warning
    result = preprocess(path, tmp_path / "a.h5", types="C, O, H")
    assert result.warnings == ()
    assert loaded(tmp_path / "a.h5").atomic_numbers.tolist() == [6, 6, 8, 1, 1, 1, 1, 1, 1]
    with pytest.raises(InputError, match=r"record 1 has the atom type 3, and --types C,O names 2"):
        preprocess(path, tmp_path / "a.h5", types="C,O")


def test_a_folder_without_molecules(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in (".", "/"):
        with pytest.raises(InputError, match=f"the folder {name} holds no molecule file"):
            preprocess(name)


def test_chunks_do_not_matter(tmp_path, molecules, monkeypatch):
    """Duplicates across chunks, and the same counts."""
    twice = molecules.select(np.concatenate([np.arange(40), np.arange(10)]))
    twice = replace(twice, properties={})
    with MoleculeTextWriter(tmp_path / "a.xyz", {}) as writer:
        writer.append(twice)
    whole = preprocess(tmp_path / "a.xyz", tmp_path / "a.h5", drop_duplicates=True)
    monkeypatch.setattr("molgen_energy.datasets.files._CHUNK", 7)
    parts = preprocess(tmp_path / "a.xyz", tmp_path / "b.h5", drop_duplicates=True)
    assert whole.count == parts.count == 40
    assert whole.summary == parts.summary
