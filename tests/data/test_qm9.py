"""QM9 from its original files, and the parts of qm9pack's reader that need no 230 MB."""

from __future__ import annotations

import importlib.util
import tarfile

import numpy as np
import pytest

from molgen_energy.api.preprocess import preprocess
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.datasets import qm9
from molgen_energy.errors import InputError

METHANE = """5
gdb 1\t157.7118\t157.70997\t157.70699\t0.\t13.21\t-0.3877\t0.1171\t0.5048\t35.3641\t0.044749\t\
-40.47893\t-40.476062\t-40.475117\t-40.498597\t6.469
C\t-0.0126981359\t 1.0858041578\t 0.0080009958\t-0.535689
H\t 0.002150416\t-6.0313176*^-6\t 0.0019761204\t 0.133921
H\t 1.0117308433\t 1.4637511618\t 0.0002765748\t 0.133922
H\t-0.540815069\t 1.4475266138\t-0.8766437152\t 0.133923
H\t-0.5238136345\t 1.4379326443\t 0.9063972942\t 0.133923
1341.307\t1341.3284\t1341.365\t1562.6731\t1562.7453\t3038.3205\t3151.6034\t3151.6788\t3151.7078
C\tC\t
InChI=1S/CH4/h1H4\tInChI=1S/CH4/h1H4
"""


@pytest.fixture(params=["folder", "archive"])
def original(request, tmp_path):
    """Methane under three numbers: 2, 1 and the uncharacterised 58."""
    folder = tmp_path / "files"
    folder.mkdir()
    for number in (2, 1, 58):
        (folder / f"dsgdb9nsd_{number:06d}.xyz").write_text(METHANE)
    (folder / "readme.txt").write_text("not a molecule")
    if request.param == "folder":
        return folder
    path = tmp_path / "dsgdb9nsd.xyz.tar.bz2"
    with tarfile.open(path, "w:bz2") as archive:
        archive.add(folder, arcname=".")
    return path


def test_original_files(original):
    read = qm9.read_dsgdb9nsd(original)
    assert read.properties["index"].values.tolist() == [1, 2]
    assert read[0].atomic_numbers.tolist() == [6, 1, 1, 1, 1]
    assert read[0].positions[1, 1] == np.float32(-6.0313176e-6)
    assert read.smiles.tolist() == ["C", "C"]
    assert read.properties["U0"].values[0] == -40.47893
    assert read.properties["Cv"].unit == "cal/(mol K)"


def test_a_part_is_split_at_random(original, tmp_path):
    """The two characterised molecules, with a note; `split` needs no note."""
    result = preprocess("qm9", tmp_path / "a.h5", source=original)
    assert (result.count, result.counts["train"]) == (2, 2)
    assert "holds 2 of the 130,831" in result.warnings[0]
    assert "EDM's split needs all" in result.warnings[0]
    chosen = preprocess("qm9", tmp_path / "a.h5", source=original, split="0.5,0.5,0")
    assert chosen.counts == {"train": 1, "valid": 1, "test": 0}
    assert not any("EDM" in text for text in chosen.warnings)
    with pytest.raises(InputError, match="add up to 1"):
        preprocess("qm9", tmp_path / "a.h5", source=original, split="0.5,0,0")


def test_bonds_of_the_smiles(tmp_path):
    """Four bonds of methane; a file with another SMILES is named."""
    (tmp_path / "dsgdb9nsd_000001.xyz").write_text(METHANE)
    result = preprocess("qm9", tmp_path / "a.h5", source=tmp_path, bonds=True)
    assert "bonds and charges of the SMILES" in result.summary
    with MoleculeFile(tmp_path / "a.h5") as file:
        (methane,) = file.load()
    assert sorted(methane.bond_index.tolist()) == [[0, 1], [0, 2], [0, 3], [0, 4]]
    assert methane.formal_charges.tolist() == [0] * 5
    (tmp_path / "dsgdb9nsd_000001.xyz").write_text(METHANE.replace("C\tC\t", "N\tN\t"))
    with pytest.raises(InputError, match=r"molecule 1: .*'N'; correct it, or leave out --bonds"):
        preprocess("qm9", tmp_path / "a.h5", source=tmp_path, bonds=True)


def test_names_may_differ(tmp_path):
    """The number is that of the second line; hidden and foreign files do not count."""
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "methane.XYZ").write_text(METHANE.replace("gdb 1", "gdb 7"))
    (tmp_path / "part" / "dsgdb9nsd_000003.xyz").write_text(METHANE)
    (tmp_path / "._dsgdb9nsd_000003.xyz").write_text("resource fork")
    (tmp_path / "water.xyz").write_text("1\nwater\nO 0 0 0\n")
    read = qm9.read_dsgdb9nsd(tmp_path)
    assert read.properties["index"].values.tolist() == [3, 7]
    (tmp_path / "copy.xyz").write_text(METHANE.replace("gdb 1", "gdb 3"))
    with pytest.raises(InputError, match=r"has the number 3 too"):
        qm9.read_dsgdb9nsd(tmp_path)
    with pytest.raises(InputError, match=r"is one XYZ file.*preprocess .*water\.xyz"):
        qm9.read_dsgdb9nsd(tmp_path / "water.xyz")


@pytest.mark.parametrize(
    "broken", [METHANE[:200], METHANE.replace("C\t-0.01", "Zz\t-0.01"), "five\n", ""]
)
def test_broken_file_is_named(tmp_path, broken):
    (tmp_path / "dsgdb9nsd_000001.xyz").write_text(broken)
    with pytest.raises(InputError, match=r"dsgdb9nsd_000001\.xyz is broken"):
        qm9.read_dsgdb9nsd(tmp_path)


def test_no_source(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="does not exist"):
        qm9.read_dsgdb9nsd(tmp_path / "nothing")
    with pytest.raises(InputError, match="no dsgdb9nsd"):
        qm9.read_dsgdb9nsd(tmp_path)
    (tmp_path / "a.tar").write_text("no archive")
    with pytest.raises(InputError, match="not a complete tar archive"):
        qm9.read_dsgdb9nsd(tmp_path / "a.tar")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"molgen-energy\[qm9\].*--source"):
        qm9.read_qm9(None)


def test_uncharacterised_list():
    numbers = qm9.uncharacterised()
    assert len(numbers) == 3054 == qm9.MOLECULES_WITH_UNCHARACTERISED - qm9.MOLECULES
    assert {21725, 58}.issubset(numbers)
    assert 1 not in numbers


def test_split_is_edms():
    """The definition, and its first and last members."""
    split = qm9.split_of_edm()
    assert np.bincount(split).tolist() == [100_000, 17_748, 13_083]
    np.random.seed(0)  # noqa: NPY002
    order = np.random.permutation(130_831)  # noqa: NPY002
    assert set(np.flatnonzero(split == 2)) == set(order[117_748:])


def test_table_of_qm9pack(tmp_path, monkeypatch):
    header = ["XYZ_file", "Index", "SMILES", "Elements", "XYZ_Ang"]
    header += [column for _, _, column in qm9.PROPERTIES]
    values = ",".join(["1.5"] * 14 + ["2.*^-3"])
    rows = [
        ",".join(header),
        f'"b.xyz",7,"O","[\'O\',\'H\',\'F\']","[[0.,1.2*^-6,0.],[0.,0.,1.],[1.,0.,0.]]",{values}',
        f'"a.xyz",3,"[NH4+]","[\'N\']","[[0.1,0.2,0.3]]",{values}',
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "qm9_part1.csv").write_text("\n".join(rows) + "\n")

    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: Spec)
    read = qm9.read_qm9pack()
    assert read.properties["index"].values.tolist() == [3, 7]
    assert read[1].atomic_numbers.tolist() == [8, 1, 9]
    assert read[1].positions[0, 1] == np.float32(1.2e-6)
    assert read.properties["Cv"].values.tolist() == [0.002, 0.002]
    (tmp_path / "data" / "qm9_part1.csv").write_text(rows[0] + "\n" + rows[1].replace("7,", "x,"))
    with pytest.raises(InputError, match="row 2 is broken"):
        qm9.read_qm9pack()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("qm9pack") is None, reason="qm9pack is not installed")
def test_all_of_qm9():
    """EDM's published histogram of sizes, and the bundled sample as a part of the whole."""
    molecules = qm9.read_qm9(None)
    train = np.bincount(molecules.sizes[qm9.split_of_edm() == 0])
    expected = {19: 13832, 18: 13364, 17: 13025, 20: 9482, 21: 9970, 22: 3393, 29: 25, 3: 1}
    assert {size: int(train[size]) for size in expected} == expected
