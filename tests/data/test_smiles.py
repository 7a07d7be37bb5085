"""Conformers of SMILES files: minima of the force field with the given stereochemistry."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdForceFieldHelpers

from molgen_energy.api.preprocess import preprocess
from molgen_energy.chemistry import conformers as conformers_module
from molgen_energy.chemistry.conformers import Embedding, embed
from molgen_energy.chemistry.rdkit import build
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import Molecules
from molgen_energy.data.shards import shards_folder
from molgen_energy.errors import InputError

SMILES = (
    "C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O", "C/C=C/C", "C/C=C\\C", "[O-]C(=O)C[NH3+]",
    "C1=CCCCC1", "CC(C)[C@@H]1CC[C@@H](C)C[C@H]1O", "C/C(=N\\O)/c1ccccc1", "C[n+]1ccccc1",
    "[NH4+]", "C[S@](=O)c1ccccc1",
)  # fmt: skip
TABLE = "id,SMILES,gap\n1,CCO,0.5\n2,[Na+].CC(=O)[O-],0.25\n3,CC(C)(C)(C)C,1\n4,OCC,\n"


def loaded(path: Path) -> Molecules:
    with MoleculeFile(path) as file:
        return file.load()


def smi(path: Path, smiles: tuple[str, ...] = SMILES) -> Path:
    path.write_text("".join(f"{text} name {k}\n\n" for k, text in enumerate(smiles)))
    return path


def test_conformers_are_minima_of_the_given_stereoisomers(tmp_path):
    result = preprocess(smi(tmp_path / "a.smi"), tmp_path / "a.h5", workers=0)
    assert result.count == len(SMILES)
    assert result.warnings == ()
    for smiles, molecule in zip(SMILES, loaded(tmp_path / "a.h5"), strict=True):
        built = build(molecule, positions=True)
        Chem.SanitizeMol(built)
        Chem.AssignStereochemistryFrom3D(built)
        assert Chem.MolToSmiles(Chem.RemoveHs(built)) == Chem.CanonSmiles(smiles)
        assert molecule.smiles == Chem.CanonSmiles(smiles)
        properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(built)
        field = rdForceFieldHelpers.MMFFGetMoleculeForceField(built, properties)
        field.Initialize()
        assert np.abs(field.CalcGrad()).max() < 0.05  # kcal/mol/Å, of positions in float32


def test_groups_properties_and_bad_records(tmp_path):
    table = tmp_path / "a.csv"
    table.write_text(TABLE)
    with pytest.raises(InputError, match=r"a\.csv: line 3: .*2 fragments.*--largest-fragment"):
        preprocess(table, tmp_path / "a.h5")
    result = preprocess(
        table, tmp_path / "a.h5", skip_bad=True, largest_fragment=True, conformers=2, workers=0,
        properties="gap=eV",
    )  # fmt: skip
    (bad,) = result.skipped
    assert bad.startswith("line 4: RDKit refuses 'CC(C)(C)(C)C': Explicit valence for atom # 1")
    assert result.warnings[0].startswith("1 of 3 SMILES repeat the molecule of an earlier one, the")
    assert "in line 5" in result.warnings[0]
    assert result.count == 6 and "1 reduced to the largest fragment" in result.summary
    molecules = loaded(tmp_path / "a.h5")
    assert molecules.sizes.tolist() == [9, 9, 7, 7, 9, 9]
    assert molecules.groups.tolist() == [1, 1, 2, 2, 1, 1]
    assert molecules.smiles.tolist() == ["CCO"] * 2 + ["CC(=O)[O-]"] * 2 + ["CCO"] * 2
    np.testing.assert_array_equal(
        molecules.properties["gap"].values, [0.5, 0.5, 0.25, 0.25, np.nan, np.nan]
    )
    assert molecules.units == {"gap": "eV"}
    result = preprocess(
        table, tmp_path / "b.h5", skip_bad=True, drop_duplicates=True, elements="C,H,O", workers=0
    )
    assert "1 left out as duplicates" in result.summary
    assert loaded(tmp_path / "b.h5").smiles.tolist() == ["CCO"]


def test_files_with_different_columns(tmp_path):
    """A property that a file lacks is missing in its molecules, whichever file comes first."""
    texts = {"a.csv": "smiles,gap\nC,1\n", "b.csv": "smiles,mu\nO,2\n", "c.smi": "N\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    for names in (["a.csv", "b.csv", "c.smi"], ["c.smi", "b.csv", "a.csv"]):
        files = [tmp_path / name for name in names]
        preprocess(files, tmp_path / "all.h5", workers=0)
        molecules = loaded(tmp_path / "all.h5")
        of_smiles = {"C": (1, np.nan), "O": (np.nan, 2), "N": (np.nan, np.nan)}
        expected = np.array([of_smiles[smiles] for smiles in molecules.smiles])
        for k, name in enumerate(("gap", "mu")):
            np.testing.assert_array_equal(molecules.properties[name].values, expected[:, k])


def test_gzip_is_told_by_the_content(tmp_path):
    plain, packed = tmp_path / "plain.smi.gz", tmp_path / "packed.smi"
    plain.write_text("C\n")
    packed.write_bytes(gzip.compress(b"C\n"))
    for path in (plain, packed):
        preprocess(path, tmp_path / "a.h5", workers=0)
        assert loaded(tmp_path / "a.h5").smiles.tolist() == ["C"]


def test_the_same_for_any_number_of_processes(tmp_path):
    """Also from gzip, and in part from finished shards."""
    path = smi(tmp_path / "a.smi")
    preprocess(path, tmp_path / "a.h5", conformers=2, workers=0, relax="none")
    packed = tmp_path / "a.smi.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    preprocess(packed, tmp_path / "b.h5", conformers=2, workers=2, relax="none")
    ours, theirs = loaded(tmp_path / "a.h5").to_arrays(), loaded(tmp_path / "b.h5").to_arrays()
    for name, values in ours.items():
        np.testing.assert_array_equal(values, theirs[name], name)
    preprocess(path, tmp_path / "b.h5", conformers=2, workers=0, relax="none", seed=1)
    assert (loaded(tmp_path / "b.h5").positions != ours["positions"]).any()


def test_an_interrupted_run_continues(tmp_path, monkeypatch):
    path, output = smi(tmp_path / "a.smi", SMILES[:6]), tmp_path / "a.h5"
    monkeypatch.setattr("molgen_energy.datasets.smiles._CHUNK", 2)
    preprocess(path, tmp_path / "whole.h5", workers=0)
    embedded: list[str] = []

    def interrupted(item: Embedding) -> conformers_module.Conformers:
        embedded.append(item.smiles)
        if len(embedded) == 4:
            raise KeyboardInterrupt
        return embed(item)

    monkeypatch.setattr(conformers_module, "embed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preprocess(path, output, workers=0)
    assert not output.exists()
    assert len(list(shards_folder(output).glob("*.shard"))) == 1
    with pytest.raises(InputError, match="begun with seed 0, which cannot change to 3"):
        preprocess(path, output, workers=0, seed=3)
    preprocess(path, output, workers=0)
    assert len(embedded) == 4 + 4
    assert not shards_folder(output).exists()
    np.testing.assert_array_equal(loaded(output).positions, loaded(tmp_path / "whole.h5").positions)


def test_failures_name_line_and_reason(tmp_path):
    path = smi(tmp_path / "a.smi", ("CCO", "[Fe]C"))
    with pytest.raises(InputError, match=r"a\.smi: line 3: no MMFF94 parameters; try --relax"):
        preprocess(path, tmp_path / "a.h5", workers=0)
    path = smi(tmp_path / "b.smi", ("C" * 800, "CC"))
    result = preprocess(path, tmp_path / "b.h5", workers=1, timeout=0.5, skip_bad=True)
    assert result.count == 1
    assert "not finished within 0.5 s; --timeout allows more" in result.skipped[0]
    for text, message in (
        ("*C", "an atom of no element"), ("c1ccc", "cannot parse 'c1ccc'"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            preprocess(smi(path, (text,)), tmp_path / "b.h5", workers=0)
    path.write_text("smiles name\n\n")
    with pytest.raises(InputError, match=r"b\.smi.* holds no molecule"):
        preprocess(path, tmp_path / "b.h5", workers=0)


def test_other_files_are_named(tmp_path):
    path = smi(tmp_path / "a.smi")
    with pytest.raises(InputError, match=r"a\.smi holds SMILES; `preprocess smiles .*a\.smi`"):
        preprocess("files", tmp_path / "a.h5", files=(path,))
    with pytest.raises(InputError, match=r"b\.smi\.gz cannot be read"):
        (tmp_path / "b.smi.gz").write_bytes(gzip.compress(b"CC" * 99)[:-9])
        preprocess(tmp_path / "b.smi.gz", tmp_path / "a.h5", workers=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column": "smile"}, r"has no column 'smile' \(columns: id, SMILES, gap\)"),
        ({"relax": "mmf"}, "did you mean 'mmff94'"),
        ({"conformers": 0}, "--conformers 0"),
        ({"timeout": 0}, "--timeout 0"),
        ({"workers": -1}, "--workers -1"),
        ({"properties": "mu"}, "no molecule has a number for the property 'mu'"),
    ],
)
def test_bad_options(tmp_path, options, message):
    (tmp_path / "a.csv").write_text(TABLE.split("2,")[0])
    with pytest.raises(InputError, match=message):
        preprocess(tmp_path / "a.csv", tmp_path / "a.h5", **({"workers": 0} | options))


def test_relaxation_by_xtb(tmp_path):
    pytest.importorskip("tblite")
    from ase import Atoms
    from tblite.ase import TBLite

    preprocess(smi(tmp_path / "a.smi", ("CO", "[NH4+]")), tmp_path / "a.h5", workers=0,
               relax="xtb")  # fmt: skip
    for molecule in loaded(tmp_path / "a.h5"):
        atoms = Atoms(molecule.atomic_numbers, molecule.positions.astype(float))
        charge = int(molecule.formal_charges.sum())
        atoms.calc = TBLite(method="GFN2-xTB", charge=charge, verbosity=0)
        assert np.linalg.norm(atoms.get_forces(), axis=1).max() < 0.06
