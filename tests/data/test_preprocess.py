"""Datasets of molecules: every column from files to HDF5 and back, and datasets of one's own."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import AllChem
from typer.testing import CliRunner

from molgen_energy import cli as cli_package
from molgen_energy.api.preprocess import preprocess
from molgen_energy.chemistry.convert import from_rdkit
from molgen_energy.chemistry.molfiles import MoleculeReader, MoleculeTextWriter
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.data.molecules import Molecule, MoleculeChunk, Molecules, Property
from molgen_energy.datasets.base import RandomSplitDataset, option
from molgen_energy.datasets.log import DatasetLog
from molgen_energy.errors import InputError
from molgen_energy.systems import datasets

SMILES = ("c1ccccc1[N+](=O)[O-]", "C[NH3+]", "CC#N", "C/C=C\\O", "c1cc[nH]c1", "[O-]C=O")
WATER = "3\n{}\nO 0 0 0\nH 0.96 0 0.1\nH -0.24 0.93 0\n"


@pytest.fixture(scope="module")
def rich() -> Molecules:
    """Charged and aromatic molecules with properties in units, SMILES and groups."""
    mols = []
    for smiles in SMILES:
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        AllChem.EmbedMolecule(mol, randomSeed=1)
        mols.append(mol)
    molecules = from_rdkit(mols)
    gap = np.array([0.25, -1 / 3, np.nan, 1e-12, 7e8, 0.1])
    return replace(
        molecules,
        smiles=np.array(SMILES, object),
        properties={"gap": Property(gap, "hartree"), "Cv": Property(gap**2, "cal/(mol K)")},
        groups=np.array([5, 5, -3, 0, 0, 1 << 40]),
    )


def assert_equal(a: Molecules, b: Molecules, atol: float, but: tuple[str, ...] = ()) -> None:
    """Every column but some, positions within the digits of the format."""
    ours, theirs = a.to_arrays(), b.to_arrays()
    left = [name for name in ours if not name.startswith(but or ("-",))]
    assert set(left) == set(theirs)
    assert a.units == b.units
    for name in left:
        if name == "positions":
            np.testing.assert_allclose(ours[name], theirs[name], atol=atol)
        else:
            np.testing.assert_array_equal(ours[name], theirs[name], name)


@pytest.fixture(autouse=True)
def signals():
    """A command that runs in this process has SIGTERM end it as Ctrl-C does."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def written(path: Path, molecules: Molecules) -> Path:
    with MoleculeTextWriter(path, {"seed": "0"}) as writer:
        writer.append(molecules.select(np.arange(2)))
        writer.append(molecules.select(np.arange(2, len(molecules))))
    return path


def loaded(path: Path) -> Molecules:
    with MoleculeFile(path) as file:
        return file.load()


@pytest.mark.parametrize("suffix", ["sdf", "xyz", "h5"])
def test_every_column_goes_from_file_to_file(tmp_path, rich, suffix):
    """SDF → HDF5 → molecules → SDF, XYZ or HDF5."""
    source = written(tmp_path / "source.sdf", rich)
    result = preprocess(source, tmp_path / "a.h5", group="group")
    assert result.count == 6
    molecules = loaded(tmp_path / "a.h5")
    assert_equal(rich, molecules, 6e-5)
    if suffix == "h5":
        with MoleculeWriter(tmp_path / "b.h5", source="test") as writer:
            writer.append(molecules)
        assert_equal(molecules, loaded(tmp_path / "b.h5"), 0)
        return
    target = written(tmp_path / f"b.{suffix}", molecules)
    preprocess(target, tmp_path / "b.h5", group="group")
    lost = ("bonds", "formal_charges") if suffix == "xyz" else ()
    assert_equal(molecules, loaded(tmp_path / "b.h5"), 6e-5, lost)


def test_bonds_and_charges_are_written_as_they_are(tmp_path, rich):
    path = written(tmp_path / "a.sdf", rich)
    for read, given in zip(Chem.SDMolSupplier(str(path), sanitize=False, removeHs=False), rich,
                           strict=True):  # fmt: skip
        assert [a.GetFormalCharge() for a in read.GetAtoms()] == given.formal_charges.tolist()
        assert sum(b.GetIsAromatic() for b in read.GetBonds()) == (given.bond_order == 12).sum()
        assert read.GetProp("bonds") == "given"
        assert read.GetProp("status") == "valid"
        assert Chem.SanitizeMol(read, catchErrors=True) == 0
    bad = replace(rich[2], bond_order=np.full_like(rich[2].bond_order, 3))
    nowhere = replace(rich[2], positions=np.full_like(rich[2].positions, np.nan))
    path = written(tmp_path / "b.sdf", Molecules.from_list([bad, nowhere]))
    invalid, not_finite = Chem.SDMolSupplier(str(path), sanitize=False, removeHs=False)
    assert "valence" in invalid.GetProp("status")
    assert {b.GetBondTypeAsDouble() for b in invalid.GetBonds()} == {3.0}
    assert not_finite.GetProp("status") == "coordinates are not finite"
    assert not_finite.GetNumBonds() == len(rich[2].bond_order)
    assert not_finite.GetProp("smiles") == SMILES[2]


def test_bonds_are_perceived_where_there_are_none(tmp_path, rich):
    path = written(tmp_path / "a.sdf", replace(rich, bonds=None))
    (first, *_) = Chem.SDMolSupplier(str(path), sanitize=False, removeHs=False)
    assert first.GetProp("bonds") == "perceived"
    assert first.GetNumBonds() == len(rich[0].bond_order)
    assert sum(a.GetFormalCharge() for a in first.GetAtoms()) == 0
    assert [a.GetFormalCharge() for a in first.GetAtoms()] == rich[0].formal_charges.tolist()
    preprocess(path, tmp_path / "a.h5")
    with MoleculeFile(tmp_path / "a.h5") as file:  # what is perceived is no data
        assert not file.columns & {"bonds", "formal_charges"}
    assert next(iter(MoleculeReader(path))).bond_order is not None


def test_ase_reads_the_keys_of_an_xyz(tmp_path, rich):
    path = written(tmp_path / "a.xyz", rich)
    frames = ase.io.read(path, ":", format="extxyz")
    for frame, molecule in zip(frames, rich, strict=True):
        assert frame.info.get("gap", np.nan) == pytest.approx(
            molecule.properties["gap"], nan_ok=True
        )
        assert frame.info["group"] == molecule.group


def test_fields_and_keys_become_properties(tmp_path):
    keys = (
        'gap=0.5 name="a b" smiles="O" conf=x',
        "gap=-2 mu=1 conf=y",
        "conf=x",
        "gap=n/a conf=x",
    )
    (tmp_path / "a.xyz").write_text("".join(map(WATER.format, keys)))
    result = preprocess(tmp_path / "a.xyz", tmp_path / "a.h5", properties="gap=eV,mu", group="conf")
    molecules = loaded(tmp_path / "a.h5")
    np.testing.assert_array_equal(molecules.properties["gap"].values, [0.5, -2, np.nan, np.nan])
    np.testing.assert_array_equal(molecules.properties["mu"].values, [np.nan, 1, np.nan, np.nan])
    assert molecules.units == {"gap": "eV", "mu": ""}
    assert molecules.smiles.tolist() == ["O", "", "", ""]
    assert len(set(molecules.groups.tolist())) == 2
    assert "property gap is missing in 2 of 4 molecules (NaN)" in result.warnings
    assert result.summary == "3 atoms of H, O; properties gap, mu; 2 groups"
    preprocess(tmp_path / "a.xyz", tmp_path / "b.h5")
    with MoleculeFile(tmp_path / "b.h5") as file:  # gap is no number in one of the first records
        assert file.columns == {"smiles", "properties/mu"}
    preprocess(tmp_path / "a.xyz", tmp_path / "b.h5", properties="")
    with MoleculeFile(tmp_path / "b.h5") as file:
        assert file.columns == {"smiles"}
    with pytest.raises(InputError, match="no molecule has a number for the property 'U0'"):
        preprocess(tmp_path / "a.xyz", tmp_path / "c.h5", properties="U0")
    with pytest.raises(InputError, match=r"record 1 \(line 1\): it lacks the field 'id'"):
        preprocess(tmp_path / "a.xyz", tmp_path / "c.h5", group="id")
    assert not (tmp_path / "c.h5").exists()


def test_several_files_are_one_dataset(tmp_path, rich, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.xyz").write_text(WATER.format("gap=1") + "1\n\nQq 0 0 0\n")
    (tmp_path / "b.xyz").write_text(WATER.format("mu=2") * 2)
    runner, app = CliRunner(), cli_package.application()
    done = runner.invoke(app, ["preprocess", "a.xyz", "b.xyz", "--skip-bad"])
    assert done.exit_code == 0, done.output
    assert "left out a.xyz: record 2 (line 6)" in done.output
    molecules = loaded(tmp_path / "a.h5")
    np.testing.assert_array_equal(molecules.properties["mu"].values, [np.nan, 2, 2])
    assert preprocess(["b.xyz", "b.xyz"], "e.h5").count == 4
    written(tmp_path / "c.sdf", rich)
    done = runner.invoke(app, ["preprocess", "files", "b.xyz", "c.sdf", "-o", "d.h5"])
    assert done.exit_code == 2
    assert "have formal charges, those before have none" in " ".join(done.output.split())


def test_conformers_of_rdkit_stay_in_one_split(tmp_path):
    mols = []
    for smiles in SMILES * 4:
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        AllChem.EmbedMultipleConfs(mol, 3, randomSeed=1)
        mols.append(mol)
    result = preprocess(mols, tmp_path / "a.h5", split="0.5,0.25,0.25", seed=4)
    assert result.counts == {"train": 36, "valid": 18, "test": 18}
    with MoleculeFile(tmp_path / "a.h5") as file:
        labels = file.split.reshape(24, 3)
        assert (labels == labels[:, :1]).all()
        assert file.columns == {"formal_charges", "bonds", "group"}


@pytest.mark.parametrize(("largest", "warns"), [(120, True), (2, False)])
def test_a_large_group_that_moves_the_shares_is_named(tmp_path, largest, warns):
    names = ["a"] * largest + [f"b{k}" for k in range(200 - largest)]
    text = "".join(f"1\nname={name}\nC {k} 0 0\n" for k, name in enumerate(names))
    (tmp_path / "a.xyz").write_text(text)
    options = {"group": "name", "split": "0.34,0.33,0.33", "properties": ""}
    result = preprocess(tmp_path / "a.xyz", tmp_path / "a.h5", **options)
    shares = np.array([*result.counts.values()]) / 200
    assert (np.abs(shares - [0.34, 0.33, 0.33]).max() > 0.05) == warns
    found = ", ".join(f"{100 * share:.0f}" for share in shares)
    said = f"the split is {found} % instead of 34, 33, 33 %, since groups stay together, the"
    said += f" largest of {largest} molecules"
    assert any(text.startswith(said) for text in result.warnings) == warns


@dataclass(frozen=True, kw_only=True)
class Waters(RandomSplitDataset):
    """Waters with a random energy."""

    name = "waters"
    output = "waters.h5"

    count: int = option(10, "How many.")
    broken: bool = option(False, "With a molecule that is not finite.")
    split: str = option("0.6,0.2,0.2", "Shares for training, validation, test.")
    seed: int = option(0, "Seed of the split.")

    def source_name(self) -> str:
        return "waters of a test"

    def chunks(self, log: DatasetLog) -> Iterator[MoleculeChunk]:
        positions = np.array([[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0.1]], "f4")
        for start in range(0, self.count, 4):
            numbers = np.arange(start, min(start + 4, self.count))
            waters = [
                Molecule(
                    positions + (np.inf if self.broken and k == 7 else 0),
                    np.array([8, 1, 1], "u1"),
                    properties={"energy": k / 2},
                    units={"energy": "eV"},
                    smiles="O",
                    group=k // 2,
                )
                for k in numbers.tolist()
            ]
            yield MoleculeChunk(numbers + 1, Molecules.from_list(waters))
            log.progress(int(numbers[-1]) + 1, self.count)


def test_a_dataset_of_ones_own(tmp_path, monkeypatch):
    """One class and a row in the registry are a command, with every column and the split."""
    monkeypatch.setitem(datasets.DATASETS, "waters", Waters)
    monkeypatch.chdir(tmp_path)
    runner, app = CliRunner(), cli_package.application()
    assert "--broken" in runner.invoke(app, ["preprocess", "waters", "--help"]).output
    assert "waters" in runner.invoke(app, ["preprocess", "--help"]).output
    done = runner.invoke(app, ["preprocess", "waters", "--count", "20", "--seed", "3"])
    assert done.exit_code == 0, done.output
    assert "20 molecules written to waters.h5" in done.output
    assert "train 12, valid 4, test 4; 3 atoms of H, O" in done.output
    with MoleculeFile(tmp_path / "waters.h5") as file:
        molecules = file.load()
        assert file.source == "waters of a test"
        assert (file.split[::2] == file.split[1::2]).all()
    assert molecules.properties["energy"].values.tolist() == [k / 2 for k in range(20)]
    assert molecules.units == {"energy": "eV"}
    refused = runner.invoke(app, ["preprocess", "waters", "--broken"])
    assert refused.exit_code == 2
    assert "record 8: the coordinates are not finite" in " ".join(refused.output.split())
    steps = []
    result = preprocess("waters", progress=lambda done, total: steps.append((done, total)))
    assert (result.count, steps) == (10, [(4, 10), (8, 10), (10, 10)])
    with pytest.raises(InputError, match="unknown option of waters 'cout'; did you mean 'count'"):
        preprocess("waters", cout=3)
    with pytest.raises(InputError, match="has its options already"):
        preprocess(Waters(), count=3)
    with pytest.raises(InputError, match="holds no molecule"):
        preprocess(Waters(count=0))
    with pytest.raises(InputError, match="unknown dataset 'watres'; did you mean 'waters'"):
        preprocess("watres")
    with pytest.raises(InputError, match="needs the option files"):
        preprocess("files")
    with pytest.raises(InputError, match="add up to 1"):
        preprocess("waters", split="0.5,0.1,0.1")


def test_options_belong_to_their_dataset(cli_here, tmp_path):
    (tmp_path / "a.xyz").write_text(WATER.format(""))
    assert "no such option" in cli_here("preprocess", "a.xyz", "--source", "x", code=2).stderr
    assert "no such option" in cli_here("preprocess", "qm9", "--elements", "C", code=2).stderr
    assert "1 molecule written" in cli_here("preprocess", "--seed", "3", "a.xyz").stderr
