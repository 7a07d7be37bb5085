"""`evaluate` as a function: inputs of all kinds, and what the report offers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem.AllChem import EmbedMolecule

from molgen_energy.api.evaluate import evaluate
from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.molfiles import MoleculeTextWriter
from molgen_energy.chemistry.rdkit import build
from molgen_energy.data.hdf5 import MoleculeWriter
from molgen_energy.data.molecules import Molecules
from molgen_energy.errors import InputError
from molgen_energy.metrics.sources import RDKitSource

FAST = {"metrics": "rates", "workers": 0}


@pytest.fixture(scope="module")
def some(molecules) -> Molecules:
    """Forty molecules with perceived bonds."""
    return perceive(molecules.select(np.arange(0, 2000, 50)))


@pytest.fixture(scope="module")
def sdf(some, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("api") / "samples.sdf"
    with MoleculeTextWriter(path, {}) as writer:
        writer.append(replace(some, bonds=None))  # the writer perceives them
    return path


def test_rdkit_molecules_are_evaluated_as_their_file(some, sdf):
    """From memory, from a supplier of the file, and from the file itself."""
    built = [build(molecule, positions=True) for molecule in some]
    for molecule in built:
        molecule.SetProp("bonds", "perceived")
    supplied = list(Chem.SDMolSupplier(str(sdf), sanitize=False, removeHs=False))
    options = {"metrics": "rates,geometry,composition", "workers": 0}
    from_file, from_memory, from_supplier = (
        evaluate(inputs, **options).files[0] for inputs in (sdf, built, supplied)
    )
    assert from_memory.name == "molecules"
    assert from_memory.count == from_file.count == 40
    for key, metric in from_file.metrics.items():
        assert from_supplier.metrics[key] == metric  # also says that bonds were perceived
        if metric is not None:  # a file has its coordinates rounded to 1e-4 Å
            assert from_memory.metrics[key].value == pytest.approx(metric.value, rel=0.02)
    for molecule in built:
        molecule.ClearProp("bonds")
    given = evaluate(built, **FAST)
    assert given.summary.startswith("bonds given in the file; valences strict")
    assert given.files[0].metrics["validity"] == from_memory.metrics["validity"]


def test_rdkit_molecules_that_cannot_be_used(some):
    good = build(some[0], positions=True)
    for bad, message in ((Chem.MolFromSmiles("C"), "no conformer"), (None, "it is None")):
        with pytest.raises(InputError, match=f"molecule 2: .*{message}"):
            evaluate([good, bad], **FAST)
        report = evaluate([good, bad, good], skip_bad=True, **FAST)
        assert (report.files[0].count, report.files[0].skipped) == (2, 1)
        assert any("1 bad record skipped" in text for text in report.warnings())
    with pytest.raises(InputError, match="nothing to evaluate"):
        evaluate([], **FAST)
    with pytest.raises(InputError, match="not both in one list"):
        evaluate([good, "a.sdf"], **FAST)


@pytest.mark.parametrize("names", [{"inputs": ""}, {"reference": ""}, {"train": ""}])
def test_an_empty_name_is_not_the_current_folder(sdf, names, monkeypatch):
    monkeypatch.chdir(sdf.parent)  # which holds molecules
    with pytest.raises(InputError, match="a file name is empty"):
        evaluate(**({"inputs": sdf} | names), **FAST)


def test_a_report_as_text_dictionary_and_folder(sdf, tmp_path):
    report = evaluate([str(sdf)], subset=10, workers=0)
    assert "passes all checks" in str(report)
    assert "novelty against QM9's 100,000 training molecules" in str(report)
    assert max(map(len, report.table(width=90).splitlines())) <= 90
    assert repr(report) == f"Report of {sdf.name} (40); print it for the table"
    values = report.to_dict()
    assert values["files"][0]["molecules"] == 40
    assert values["subset"] == 10
    page = report.save(str(tmp_path / "out"))
    assert page == tmp_path / "out" / "report.html"
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored["files"][0]["metrics"] == json.loads(json.dumps(values["files"][0]["metrics"]))
    assert len(stored["files"][0]["provenance"]["SHA-256"]) == 64


def test_progress_counts_all_molecules(some, sdf, tmp_path):
    """The total is known for HDF5 files alone."""
    with MoleculeWriter(tmp_path / "a.h5", source="test") as writer:
        writer.append(some)
    calls: list[tuple[int, int | None]] = []
    evaluate(
        [tmp_path / "a.h5", tmp_path / "a.h5"],
        train=tmp_path / "a.h5",
        progress=lambda done, total: calls.append((done, total)),
        **FAST,
    )
    assert calls == [(40, 120), (80, 120), (120, 120)]
    calls.clear()
    evaluate(sdf, progress=lambda done, total: calls.append((done, total)), **FAST)
    assert calls == [(40, None)]


def test_options_of_another_system(tmp_path):
    from molgen_energy.data.arrays import write_arrays

    angle = 2 * np.pi * np.arange(5) / 5
    columns = {
        "radius": np.ones(3, "f4"),
        "positions": np.tile(np.stack([np.cos(angle), np.sin(angle)], axis=-1), (3, 1, 1)),
    }
    columns["positions"] = columns["positions"].astype("f4")
    write_arrays(tmp_path / "a.h5", "shapes", "test", columns, {})
    report = evaluate(tmp_path / "a.h5")
    assert report.samples == "polygons"
    assert report.files[0].metrics["angles"].value == pytest.approx(0, abs=1e-6)
    assert "value ± standard error or [95 % interval]" in report.table()
    page = evaluate([tmp_path / "a.h5"] * 2).save(tmp_path / "out")
    assert {p.name for p in page.parent.iterdir()} == {
        "report.html", "report.json", "1_polygons.png", "2_polygons.png"
    }  # fmt: skip
    with pytest.raises(InputError, match="--bonds is for molecules, not for shapes"):
        evaluate(tmp_path / "a.h5", bonds="given")


def test_ions_in_memory_need_no_bonds_as_those_of_a_file():
    mols = [Chem.AddHs(Chem.MolFromSmiles(smiles)) for smiles in ("[Na+].[Cl-]", "O")]
    for molecule in mols:
        molecule.AddConformer(Chem.Conformer(molecule.GetNumAtoms()))
    assert RDKitSource(mols).given_bonds.every


def test_a_generated_molecule_without_bonds_has_given_ones(tmp_path):
    """A network may generate none; its other molecules keep theirs."""
    methane = Chem.AddHs(Chem.MolFromSmiles("C"))
    EmbedMolecule(methane, randomSeed=1)
    bare = Chem.RWMol(methane)
    for bond in list(bare.GetBonds()):
        bare.RemoveBond(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx())
    molecules = [methane, bare.GetMol()]
    with Chem.SDWriter(str(tmp_path / "both.sdf")) as writer:
        for molecule in molecules:
            molecule.SetProp("bonds", "given")
            writer.write(molecule)
    for source in (molecules, tmp_path / "both.sdf"):
        report = evaluate(source, **FAST)
        assert report.summary.startswith("bonds given in the file; valences strict")
        assert report.files[0].metrics["molecule_stability"].value == 0.5
