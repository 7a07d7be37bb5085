"""The Chemical Component Dictionary, on small dictionaries of its true layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from components import SMILES, dictionary
from rdkit import Chem
from rdkit.Chem import AllChem

from molgen_energy import preprocess
from molgen_energy.chemistry.cleaning import faults
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.datasets import ccd
from molgen_energy.errors import InputError

pytest.importorskip("biotite")


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], Path]:
    """Put a dictionary in the place of the installed one; returns where to write."""

    def put(smiles: dict[str, str]) -> Path:
        path = dictionary(tmp_path, smiles)
        monkeypatch.setattr(ccd, "dictionary_path", lambda: path)
        return tmp_path / "ccd.h5"

    return put


def heavy(smiles: str) -> str:
    return Chem.MolToSmiles(Chem.MolFromSmiles(smiles), isomericSmiles=False)


def test_components_are_what_their_smiles_say(use: Callable[[dict[str, str]], Path]) -> None:
    output = use(SMILES)
    result = preprocess("ccd", output, workers=0, clean=True)
    kept = ["BNZ", "DLA", "GLY", "LAC", "TOL"]  # in the order of identifiers
    assert result.count == len(kept)
    with MoleculeFile(output) as file:
        molecules = file.load()
    assert molecules.smiles is not None
    assert molecules.smiles.tolist() == [heavy(SMILES[name]) for name in kept]
    for found, name in zip(molecules, kept, strict=True):
        expected = Chem.AddHs(Chem.MolFromSmiles(SMILES[name]))
        assert found.atomic_numbers.tolist() == [a.GetAtomicNum() for a in expected.GetAtoms()]
        assert found.formal_charges is not None
        assert found.formal_charges.tolist() == [a.GetFormalCharge() for a in expected.GetAtoms()]
        AllChem.EmbedMolecule(expected, randomSeed=1)
        places = expected.GetConformer().GetPositions()
        np.testing.assert_allclose(found.positions, places, atol=1e-3)
        Chem.Kekulize(expected, clearAromaticFlags=True)
        assert found.bond_index is not None
        assert found.bond_order is not None
        bonds = {
            frozenset(map(int, ends)): int(order)
            for ends, order in zip(found.bond_index, found.bond_order, strict=True)
        }
        assert bonds == {
            frozenset((b.GetBeginAtomIdx(), b.GetEndAtomIdx())): round(b.GetBondTypeAsDouble())
            for b in expected.GetBonds()
        }
    for count in (
        "1 left out as obsolete",
        "1 left out without ideal coordinates",
        "2 left out with other elements",
        "1 left out with fewer than 5 atoms",
        "1 left out for missing hydrogens or unpaired electrons",
        "1 left out by cleaning: a bond is too long",
    ):
        assert count in result.summary


def test_filters_are_options(use: Callable[[dict[str, str]], Path]) -> None:
    output = use(SMILES)
    result = preprocess(
        "ccd",
        output,
        workers=0,
        elements="H,C,N,O,F,Na,Se,Cl",
        min_atoms=1,
        coordinates="model",
        keep_obsolete=True,
        keep_fragments=True,
        keep_incomplete=True,
    )
    assert result.count == len(SMILES)
    assert "left out" not in result.summary
    fewer = preprocess("ccd", output, workers=0, max_atoms=12, elements="H,C,N,O,Na")
    assert "1 left out with several fragments" in fewer.summary
    cleaned = preprocess(
        "ccd", output, workers=0, elements="H,C,N,O,F,Na", clean=True, keep_fragments=True
    )
    assert "1 left out with several fragments" in cleaned.summary
    with MoleculeFile(output) as file:
        assert faults(file.load()) == [""] * cleaned.count
    assert "1 left out with more than 12 atoms" in fewer.summary  # toluene


def test_scaffolds_and_stereoisomers_stay_in_one_split(
    use: Callable[[dict[str, str]], Path],
) -> None:
    output = use(SMILES)
    groups = {}
    for by in ("scaffold", "random"):
        preprocess("ccd", output, workers=0, split_by=by, clean=True)
        with MoleculeFile(output) as file:
            found = file.load().groups
            assert found is not None
            groups[by] = dict(zip(["BNZ", "DLA", "GLY", "LAC", "TOL"], found.tolist(), strict=True))
            for group in set(found.tolist()):
                assert len(set(file.split[found == group])) == 1
    assert groups["scaffold"]["BNZ"] == groups["scaffold"]["TOL"]
    assert groups["random"]["BNZ"] != groups["random"]["TOL"]
    for found in groups.values():
        assert found["LAC"] == found["DLA"] != found["GLY"]


def test_processes_do_not_matter(use: Callable[[dict[str, str]], Path]) -> None:
    output = use(SMILES)
    contents = []
    for workers in (0, 2):
        preprocess("ccd", output, workers=workers)
        with MoleculeFile(output) as file:
            contents.append((file.summarize().fingerprint, file.split.tolist()))
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinates": "best"}, "--coordinates"),
        ({"split_by": "weight"}, "--split-by"),
        ({"min_atoms": 9, "max_atoms": 8}, "--min-atoms 9"),
        ({"workers": -1}, "--workers"),
        ({"elements": "C,Qq"}, "Qq"),
        ({"relax": "mmf"}, "unknown --relax 'mmf'; did you mean 'mmff94'"),
        ({"relax": "mmff", "timeout": 0}, "--timeout 0"),
    ],
)
def test_bad_options(
    use: Callable[[dict[str, str]], Path], options: dict[str, Any], message: str
) -> None:
    output = use({"BNZ": SMILES["BNZ"]})
    with pytest.raises(InputError, match=message):
        preprocess("ccd", output, **options)
    assert not output.exists()


def test_a_damaged_dictionary_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "components.bcif"
    monkeypatch.setattr(ccd, "dictionary_path", lambda: path)
    for content in (b"", b"\x81\xa1a\x01", b"not a dictionary"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"components\.bcif is no dictionary"):
            preprocess("ccd", tmp_path / "ccd.h5", workers=0)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ccd.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'molgen-energy\[ccd\]'"):
        ccd.dictionary_path()
