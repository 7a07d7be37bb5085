"""Given and perceived bonds side by side, and JODO's rates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import of_smiles
from rdkit import Chem
from rdkit.Chem import AllChem

import molgen_energy as mg
from molgen_energy.data.hdf5 import MoleculeWriter
from molgen_energy.data.molecules import Molecules
from molgen_energy.errors import InputError
from molgen_energy.metrics.distances.similarity import SubstructureCounts

FAST = {"metrics": "rates", "workers": 0}
AGREEMENT = ("same_bonds", "same_connectivity", "bonds_only_given", "bonds_only_perceived")


def embedded(smiles: str) -> Chem.Mol:
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(molecule, randomSeed=7)
    AllChem.MMFFOptimizeMolecule(molecule)
    return molecule


@pytest.fixture(scope="module")
def drawn() -> list[Chem.Mol]:
    """Ethanol, a carboxylate, an amine with a bond too few, and acetone."""
    cut = Chem.RWMol(embedded("CCN"))
    cut.RemoveBond(0, 1)
    return [embedded("CCO"), embedded("CC(=O)[O-]"), cut, embedded("CC(C)=O")]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A reference with bonds."""
    path = tmp_path_factory.mktemp("real") / "real.sdf"
    with Chem.SDWriter(str(path)) as writer:
        for smiles in ("CCN", "c1ccccc1", "CC(=O)N"):
            writer.write(embedded(smiles))
    return path


def test_each_column_is_that_of_its_bonds_alone(drawn, real, tmp_path):
    both = mg.evaluate(drawn, real, bonds="both", **FAST)
    assert [column.label for column in both.files[0].columns] == ["given", "perceived"]
    assert [column.label for column in both.reference.columns] == ["given", "perceived"]
    for column, data in zip(both.files[0].columns, both.reference.columns, strict=True):
        alone = mg.evaluate(drawn, real, bonds=column.label, **FAST)
        for found, expected in ((column, alone.files[0]), (data, alone.reference)):
            for key, value in expected.metrics.items():
                if key not in AGREEMENT:
                    assert found.metrics[key] == value, key
    metrics = both.to_dict()["files"][0]["metrics"]
    # Ethanol and acetone are the same; distances show the bond that was cut.
    assert metrics["same_bonds"]["given"] == metrics["same_bonds"]["perceived"]
    assert (metrics["same_bonds"]["given"]["count"], metrics["same_bonds"]["given"]["total"]) == (
        sum(row["same_bonds"] for row in both.molecules if row["bonds"] == "given"), 4,
    )  # fmt: skip
    assert metrics["same_connectivity"]["given"]["count"] == 3
    assert metrics["bonds_only_given"]["given"]["count"] == 0
    assert metrics["bonds_only_perceived"]["given"]["count"] == 1
    data = both.reference.metrics["same_bonds"]
    assert data.total == 3
    assert both.to_dict()["bonds"] == "both"
    assert both.to_dict()["valence"] == {"given": "strict", "perceived": "edm"}
    rows = list(both.molecules)
    assert [row["bonds"] for row in rows] == ["given"] * 4 + ["perceived"] * 4
    assert [row["same_connectivity"] for row in rows] == [True, True, False, True] * 2
    assert [row["same_bonds"] for row in rows][:4] == [row["same_bonds"] for row in rows][4:]
    assert rows[0]["same_bonds"] and rows[3]["same_bonds"]
    page = both.save(tmp_path / "page").read_text()
    assert page.count("<small>given</small>") == page.count("<small>perceived</small>") == 2
    assert "molecules, bonds perceived: passing all checks" in page
    assert json.loads((tmp_path / "page/report.json").read_text())["bonds"] == "both"
    text = both.table(200)
    assert "same bonds" in text and text.count("given") >= 3


def test_valences_are_for_given_bonds_and_both_leave_out_the_same(drawn, real):
    """Sodium is known to RDKit, but not to perception."""
    chosen = [*drawn, embedded("[Na+].[Cl-]")]
    with pytest.raises(InputError, match=r"record 5 holds Na.*--skip-bad"):
        mg.evaluate(chosen, real, bonds="both", **FAST)
    report = mg.evaluate(chosen, real, bonds="both", valence="geom", skip_bad=True, **FAST)
    assert report.files[0].count == 4 and report.files[0].skipped == 1
    assert [c.metrics["validity"].total for c in report.files[0].columns] == [4, 4]
    assert report.to_dict()["valence"] == {"given": "geom", "perceived": "edm"}


def test_files_without_bonds(tmp_path, cli_here):
    path = tmp_path / "bare.h5"
    with MoleculeWriter(path, source="bare") as writer:
        writer.append(Molecules.from_list([of_smiles("CCO")]))
    done = cli_here("evaluate", path, "--bonds", "both", "--workers", 0, code=2)
    assert "bare.h5 has no bonds; leave out --bonds both" in done.stderr


def test_a_reference_without_bonds_has_no_agreement(drawn, tmp_path):
    with MoleculeWriter(tmp_path / "bare.h5", source="bare") as writer:
        writer.append(Molecules.from_list([of_smiles("CCO"), of_smiles("CO")]))
    report = mg.evaluate(drawn, tmp_path / "bare.h5", bonds="both", **FAST)
    given, perceived = report.reference.columns
    assert given.metrics["same_bonds"] is perceived.metrics["same_bonds"] is None
    assert given.metrics["molecule_stability"] == perceived.metrics["molecule_stability"]


def test_rates_of_jodo(real, tmp_path):
    """The values that `get_2D_edm_metric` of JODO returns for the same graphs."""

    def graph(smiles: str, charges: dict[int, int] | None = None, without: int = 0) -> Chem.Mol:
        molecule = embedded(smiles)
        for atom, charge in (charges or {}).items():
            molecule.GetAtomWithIdx(atom).SetFormalCharge(charge)
        if without:
            molecule = Chem.RWMol(molecule)
            molecule.RemoveAtom(molecule.GetNumAtoms() - 1)
        return molecule

    graphs = [
        graph("CCO"), graph("OCC"), graph("CCO", without=1), graph("CC(C)CN.O"), graph("CCN"),
        graph("CCN", {2: 1}), graph("CC=O", {0: 1}), graph("C[N+](=O)[O-]"), graph("CO", {1: -1}),
        graph("c1ccccc1"),
    ]  # fmt: skip
    with Chem.SDWriter(str(tmp_path / "train.sdf")) as train:
        for smiles in ("CCN", "c1ccccc1"):
            train.write(embedded(smiles))
    found = mg.evaluate(
        graphs, real, tmp_path / "train.sdf", bonds="given", valence="jodo", **FAST
    ).files[0]
    expected = {
        "molecule_stability": 0.7, "atom_stability": 94 / 97, "validity": 0.8, "complete": 0.7,
        "valid_unique": 0.7, "valid_unique_novel": 0.5,
    }  # fmt: skip
    values = {key: found.metrics[key].value for key in expected}
    assert values == pytest.approx(expected)


def test_fcd_of_jodo_reads_the_first_fragment(drawn, real, monkeypatch):
    """As `fcd_torch` does, to which a dot is the end."""
    read: list[str] = []

    class Recorder(SubstructureCounts):
        def __init__(self, kept: int) -> None:
            super().__init__()

        def add(self, smiles, names):
            read.extend(filter(None, smiles))

        def finish(self):
            return None

        def kept(self):
            return None

    monkeypatch.setattr("molgen_energy.metrics.molecule_evaluation.ChemNet", Recorder)
    monkeypatch.setattr("molgen_energy.metrics.options.is_missing", lambda _: False)
    pair = Chem.CombineMols(embedded("CCCN"), embedded("O"))
    for atom in range(pair.GetNumAtoms() - 3, pair.GetNumAtoms()):
        place = pair.GetConformer().GetAtomPosition(atom)
        pair.GetConformer().SetAtomPosition(atom, [place.x + 30, place.y, place.z])
    for valence, expected in (("jodo", "CCCN"), ("strict", "CCCN.O")):
        read.clear()
        mg.evaluate([pair], real, metrics="fcd", valence=valence, bonds="given", workers=0)
        assert read[-1] == expected
