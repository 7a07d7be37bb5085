"""The Chemical Component Dictionary, on small dictionaries of its true layout."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import AllChem

from molgen_energy import preprocess
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.datasets import ccd
from molgen_energy.errors import InputError

pdbx = pytest.importorskip("biotite.structure.io.pdbx")

SMILES = {
    "BNZ": "c1ccccc1",
    "TOL": "Cc1ccccc1",
    "GLY": "[NH3+]CC(=O)[O-]",
    "LAC": "C[C@H](O)C(=O)O",
    "DLA": "C[C@@H](O)C(=O)O",
    "OLD": "CCO",
    "GAP": "CCN",
    "SEL": "C[Se]C",
    "SAL": "CC(=O)[O-].[Na+]",
    "ION": "[Cl-]",
    "RAD": "C[CH]C",
}
ORDERS = {1.0: "SING", 2.0: "DOUB", 3.0: "TRIP"}


def dictionary(folder: Path, smiles: dict[str, str]) -> Path:
    """A dictionary of these molecules: OLD is obsolete, the last atom of GAP has no coordinates."""
    about: dict[str, list[Any]] = {"id": list(smiles), "pdbx_release_status": []}
    atoms: dict[str, list[Any]] = {
        name: []
        for name in ("comp_id", "atom_id", "type_symbol", "charge", "x", "y", "z", "missing")
    }
    bonds: dict[str, list[Any]] = {
        name: [] for name in ("comp_id", "atom_id_1", "atom_id_2", "value_order")
    }
    for name, text in smiles.items():
        about["pdbx_release_status"].append("OBS" if name == "OLD" else "REL")
        molecule = Chem.AddHs(Chem.MolFromSmiles(text))
        AllChem.EmbedMolecule(molecule, randomSeed=1)
        Chem.Kekulize(molecule, clearAromaticFlags=True)
        places = molecule.GetConformer().GetPositions()
        for atom in molecule.GetAtoms():
            k = atom.GetIdx()
            last = name == "GAP" and k == molecule.GetNumAtoms() - 1
            values = (name, f"A{k}", atom.GetSymbol().upper(), atom.GetFormalCharge(), *places[k])
            for column, value in zip(atoms, (*values, last), strict=True):
                atoms[column].append(value)
        for bond in molecule.GetBonds():
            ends = (f"A{bond.GetBeginAtomIdx()}", f"A{bond.GetEndAtomIdx()}")
            for column, value in zip(
                bonds, (name, *ends, ORDERS[bond.GetBondTypeAsDouble()]), strict=True
            ):
                bonds[column].append(value)
    mask = np.where(atoms.pop("missing"), pdbx.MaskValue.MISSING, pdbx.MaskValue.PRESENT)
    places_of = {axis: np.array(atoms.pop(axis)) for axis in "xyz"}
    columns: dict[str, Any] = {name: np.array(values) for name, values in atoms.items()}
    for axis, values in places_of.items():
        columns[f"pdbx_model_Cartn_{axis}_ideal"] = pdbx.BinaryCIFColumn(
            values, mask.astype(np.uint8)
        )
        columns[f"model_Cartn_{axis}"] = values + 1
    block = pdbx.BinaryCIFBlock(
        {
            "chem_comp": pdbx.BinaryCIFCategory(
                {name: np.array(values) for name, values in about.items()}
            ),
            "chem_comp_atom": pdbx.BinaryCIFCategory(columns),
            "chem_comp_bond": pdbx.BinaryCIFCategory(
                {name: np.array(values) for name, values in bonds.items()}
            ),
        }
    )
    path = folder / "components.bcif"
    file = pdbx.BinaryCIFFile({"components": block})
    stream = io.BytesIO()
    file.write(stream)
    path.write_bytes(stream.getvalue())
    return path


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
    result = preprocess("ccd", output, workers=0)
    kept = ["BNZ", "DLA", "GLY", "LAC", "TOL"]  # in the order of identifiers
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
    ):
        assert count in result.summary


def test_filters_are_options(use: Callable[[dict[str, str]], Path]) -> None:
    output = use(SMILES)
    result = preprocess(
        "ccd",
        output,
        workers=0,
        elements="H,C,N,O,Na,Se,Cl",
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
    assert "1 left out with more than 12 atoms" in fewer.summary  # toluene


def test_scaffolds_and_stereoisomers_stay_in_one_split(
    use: Callable[[dict[str, str]], Path],
) -> None:
    output = use(SMILES)
    groups = {}
    for by in ("scaffold", "random"):
        preprocess("ccd", output, workers=0, split_by=by)
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
