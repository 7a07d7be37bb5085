"""Results of each molecule: every value against a molecule that is evaluated alone, and RDKit."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import of_smiles
from rdkit import Chem, rdBase
from typer.testing import CliRunner

import molgen_energy as mg
from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.convert import to_rdkit
from molgen_energy.cli import app
from molgen_energy.data.molecules import MoleculeChunk, Molecules
from molgen_energy.errors import InputError
from molgen_energy.metrics import molecule_table
from molgen_energy.metrics.checks.chunk import CheckSettings, check_chunk
from molgen_energy.metrics.checks.strain import Relaxation, strain_mmff
from molgen_energy.metrics.molecule_table import MoleculeTable

COLUMNS = (
    "file", "record", "smiles", "atoms", "unstable_atoms", "stable", "valid", "connected",
    "passes_all", "novel", "reason",
)  # fmt: skip


@pytest.fixture(scope="module")
def shaken(molecules) -> Molecules:
    """Molecules with noise, so that some fail, and two that fail in known ways."""
    some = molecules.select(np.arange(0, 1200, 100))
    noise = np.random.default_rng(1).normal(0, 0.03, some.positions.shape)
    some = replace(some, positions=(some.positions + noise).astype("f4"), properties={})
    pair = of_smiles("CO", "N", shift=15)
    return Molecules.concatenate([Molecules.from_list([pair]), replace(some, smiles=None)])


@pytest.fixture(scope="module")
def sdf(shaken, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "a.sdf"
    return mg.MoleculeList(to_rdkit(perceive(shaken))).save(path)


def test_rows_are_those_of_molecules_alone(shaken, sdf):
    """Rates of one molecule, and RDKit's own sanitisation and SMILES."""
    options = {"metrics": "rates", "bonds": "given", "valence": "edm", "workers": 0}
    table = mg.evaluate(sdf, **options).molecules
    rows = list(table)
    assert len(table) == len(rows) == len(shaken) and table.columns == COLUMNS
    built = to_rdkit(perceive(shaken))
    for k, (row, molecule) in enumerate(zip(rows, built, strict=True)):
        assert (row["file"], row["record"]) == ("a.sdf", k + 1)
        assert row["atoms"] == molecule.GetNumAtoms()
        expected, copy = None, Chem.Mol(molecule)
        with rdBase.BlockLogs():
            if Chem.SanitizeMol(copy, catchErrors=True) == Chem.SanitizeFlags.SANITIZE_NONE:
                parts = Chem.GetMolFrags(copy, asMols=True)
                largest = max(parts, key=Chem.Mol.GetNumAtoms)
                expected = Chem.CanonSmiles(Chem.MolToSmiles(largest))
        assert row["smiles"] == (expected or "") and row["valid"] == (expected is not None)
        assert bool(row["reason"]) != row["passes_all"]
        if k % 4:
            continue
        rates = mg.evaluate([molecule], **options).files[0].metrics
        for column, rate in (
            ("stable", "molecule_stability"), ("valid", "validity"), ("connected", "connected"),
            ("passes_all", "good"), ("novel", "novelty"),
        ):  # fmt: skip
            value = rates[rate].value
            assert row[column] == (None if value is None else bool(value)), (k, column)
    assert rows[0]["reason"] == "2 fragments" and rows[0]["smiles"] == "CO"
    assert {row["valid"] for row in rows} == {True, False}


def test_strain_of_the_subset(shaken, sdf):
    """That of the molecule itself; without one, why."""
    table = mg.evaluate(sdf, metrics="strain", subset=4, workers=0).molecules
    assert table.columns == (*COLUMNS, "strain_energy", "strain_rmsd", "strain_reason")
    perceived = perceive(shaken)
    rows = [row for row in table if row["strain_energy"] is not None]
    assert len(rows) == 4
    for row in rows:
        chunk = MoleculeChunk(np.array([1]), perceived.select(np.array([row["record"] - 1])))
        (expected,) = strain_mmff(chunk)
        assert row["strain_energy"] == pytest.approx(expected.strain, rel=0.05)
        assert row["valid"] and row["connected"]


def numbered(molecules: Molecules, records: list[int]):
    chunk = MoleculeChunk(np.array(records), perceive(molecules.select(np.array(records) - 1)))
    return check_chunk(chunk, CheckSettings("given", type_codes={}))


def test_rows_come_in_the_order_of_records_and_files(shaken, tmp_path, monkeypatch):
    """Also of chunks by whether molecules have bonds, of a file twice, and from the disk."""
    monkeypatch.setattr(molecule_table, "_IN_MEMORY", 100)
    table = MoleculeTable()
    for _ in range(2):
        table.begin("=a,b\n.sdf")
        table.add(numbered(shaken, [1, 3, 6]), np.array([True, True, False]))
        table.add(numbered(shaken, [2, 4, 5]), None)
        table.add(numbered(shaken, [7, 8]), None)
    table.add_relaxations("strain", [3, 8], [Relaxation(1.25, 0.5), Relaxation(None, None, "no")])
    table.add_posebusters([8, 3], [{"flat": True, "long": False}, {"flat": True, "long": True}])
    expected = [*range(1, 9)] * 2
    for _ in range(2):  # it can be read again
        rows = list(table)
        assert [row["record"] for row in rows] == expected
    third, last = rows[10], rows[15]
    assert (third["strain_energy"], third["strain_rmsd"], third["strain_reason"]) == (1.25, 0.5, "")
    assert (last["strain_energy"], last["strain_reason"]) == (None, "no")
    assert (third["posebusters"], last["posebusters"], rows[2]["posebusters"]) == (
        True,
        False,
        None,
    )
    assert (last["posebusters_flat"], last["posebusters_long"]) == (True, False)
    assert [row["novel"] for row in rows[:3]] == [True, None, True if rows[2]["valid"] else None]
    with table.save(tmp_path / "a.csv").open(newline="", encoding="utf-8") as file:
        stored = list(csv.DictReader(file))
    assert [tuple(row) for row in stored] == [table.columns] * 16
    assert {row["file"] for row in stored} == {"=a,b\n.sdf"}
    assert stored[10]["posebusters_long"] == "True" and stored[2]["strain_energy"] == ""
    pytest.importorskip("pandas")
    frame = table.to_pandas()
    assert frame["strain_energy"].isna().sum() == 15 and frame["posebusters"].sum() == 1
    assert str(frame["stable"].dtype) == "boolean" and frame["record"].tolist() == expected


def test_evaluate_keeps_rows_where_asked(sdf):
    assert mg.evaluate(sdf, metrics="rates", workers=0, per_molecule=False).molecules is None
    assert len(mg.evaluate([sdf, sdf], metrics="rates", workers=0).molecules) == 26


def test_json_and_csv_of_the_command(sdf, tmp_path, monkeypatch):
    """Beside the table, or JSON alone on standard output; the same numbers."""
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", str(sdf), "--metrics", "rates", "--workers", "0"]
    both = CliRunner().invoke(app, [*command, "--json", "a.json", "--per-molecule", "a.csv"])
    assert both.exit_code == 0, both.output
    assert "molecule stability" in both.stdout and "JSON: a.json" in both.stderr
    printed = CliRunner().invoke(app, [*command, "--json", "-"])
    assert json.loads(printed.stdout) == json.loads((tmp_path / "a.json").read_text("utf-8"))
    mg.evaluate(sdf, metrics="rates", workers=0).molecules.save("b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.json", "b.csv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--json", "a.sdf"], "a.sdf: name a file .json, or - to print JSON"),
        (["--json"], "requires an argument"),
        (["--per-molecule", "-"], "-: name a file .csv"),
        (["--json", "nowhere/a.json", "a.sdf"], "nowhere does not exist"),
    ],
)
def test_names_of_outputs_are_checked_first(options, message):
    done = CliRunner().invoke(app, ["evaluate", *options], env={"COLUMNS": "200"})
    assert done.exit_code == 2 and message in done.stderr


def test_other_systems_have_no_rows(tmp_path):
    angle = 2 * np.pi * np.arange(5) / 5
    positions = np.tile(np.stack([np.cos(angle), np.sin(angle)], axis=-1), (3, 1, 1))
    from molgen_energy.data.arrays import write_arrays

    columns = {"radius": np.ones(3, "f4"), "positions": positions.astype("f4")}
    write_arrays(tmp_path / "a.h5", "shapes", "test", columns, {})
    assert mg.evaluate(tmp_path / "a.h5").molecules is None
    assert mg.evaluate(tmp_path / "a.h5", per_molecule=False).molecules is None
    with pytest.raises(InputError, match="--per-molecule is for molecules, not for shapes"):
        mg.evaluate(tmp_path / "a.h5", per_molecule=True)
