"""Kinds of files by their content, packed files, folders and patterns."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem

from molgen_energy.api.preprocess import preprocess
from molgen_energy.chemistry.molfiles import MoleculeReader, base_name, molecule_files
from molgen_energy.data.hdf5 import MoleculeFile, MoleculeWriter
from molgen_energy.errors import InputError

WATER = "3\n{}\nO 0 0 {}\nH 0.96 0 0.1\nH -0.24 0.93 0\n"
BAD = "1\n\nQq 0 0 0\n"


def water(number: int, keys: str = "") -> str:
    """Water whose oxygen is at z = number."""
    return WATER.format(keys, number)


def sdf(number: int) -> str:
    return Chem.MolToMolBlock(Chem.MolFromXYZBlock(water(number))) + "$$$$\n"


def order(path: Path, **options: bool) -> list[int]:
    return [round(float(m.positions[0, 2])) for m in MoleculeReader(path, **options)]


PACKED = {
    "plain": lambda data: data,
    "gzip": gzip.compress,
    "gzip in two parts": lambda data: gzip.compress(data[:40]) + gzip.compress(data[40:]),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.mark.parametrize("name", ["a.xyz", "a.xyz.gz", "a.txt", "a", "a.EXTXYZ", "a.sdf", "a.dat"])
@pytest.mark.parametrize("packing", PACKED)
def test_content_tells_kind_and_packing(tmp_path, name, packing):
    """Whatever the name says."""
    for number, text in ((3, water(3) + water(4)), (5, sdf(5) + sdf(6))):
        (tmp_path / name).write_bytes(PACKED[packing](text.encode()))
        assert order(tmp_path / name) == [number, number + 1]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_texts_of_other_systems(tmp_path, encoding, end):
    text = water(2, "name='é'") + water(3)
    (tmp_path / "a.xyz").write_bytes(text.replace("\n", end).encode(encoding))
    assert order(tmp_path / "a.xyz") == [2, 3]


def test_a_mol_block_may_have_a_number_as_its_name(tmp_path):
    (tmp_path / "a.txt").write_text("2244" + sdf(7))
    assert order(tmp_path / "a.txt") == [7]


OTHERS = {
    "a.pdf": (b"%PDF-1.4\n", "is a PDF document"),
    "a.sdf": (b"CCO ethanol\nc1ccccc1 benzene\n", "holds SMILES, which have no coordinates"),
    "a.smi": (b"smiles\tname\nCCO\tx\n", "holds SMILES"),
    "a.zip": (b"PK\x03\x04rest", "zip archive; unpack it first"),
    "b.xyz": (b"\x00\x01\x02\x03" * 99, "is a binary file"),
    "a.html": (b"\n<!DOCTYPE html><html>", "web page or XML; download the file itself"),
    "a.mol2": (b"# made by X\n@<TRIPOS>MOLECULE\nx\n", "is a MOL2 file"),
    "a.nw": (b'title "ethanol"\ngeometry\nend\n', "is no SDF or XYZ file"),  # in NWChem's form
    "a.pdb": (b"HEADER    PROTEIN\nATOM      1  N\n", "is a PDB file"),
    "c.xyz": (b"data_1ABC\n_cell.length_a 1\n", "is a CIF file"),
    "a.h5": (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
    "d.sdf": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "a.txt": (b"some notes\non a project\n", "is no SDF or XYZ file"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named(tmp_path, name):
    content, message = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        MoleculeReader(tmp_path / name, skip_bad=True)
    assert "\n" not in str(caught.value)


def folder_of(tmp_path: Path, count: int = 12) -> Path:
    """A folder of EDM's samples, and other things."""
    folder = tmp_path / "samples"
    (folder / "sub").mkdir(parents=True)
    for number in range(count):
        (folder / f"molecule_{number}.txt").write_text(water(number, f"gap={number}.5"))
    for name in ("sub/deep.xyz", ".hidden.xyz", "a.png"):
        (folder / name).write_text(water(99))
    (folder / "README.txt").write_text("Samples of a model.\n")
    return folder


def test_a_folder_is_one_set_in_natural_order(tmp_path):
    folder = folder_of(tmp_path)
    assert order(folder) == list(range(12))
    assert order(folder / "molecule_*.txt") == list(range(12))
    assert order(folder / "molecule_1?.txt") == [10, 11]
    found = molecule_files(folder)
    assert found.is_set
    assert len(found.files) == 12
    assert len(found.notes) == 1
    assert "4 folders, hidden files or files of other kinds are left out" in found.notes[0]
    reader = MoleculeReader(folder)
    chunks = list(reader.chunks(5))
    assert np.concatenate([chunk.records for chunk in chunks]).tolist() == list(range(1, 13))
    assert reader.notes == found.notes
    assert molecule_files(folder / "a.png") == ([folder / "a.png"], False, [])


def test_records_of_a_set_are_named_in_their_file(tmp_path):
    folder = folder_of(tmp_path, 4)
    (folder / "molecule_2.txt").write_text(water(2) + BAD + water(3))
    (folder / "molecule_1.txt").rename(folder / "molecule_1.xyz")
    (folder / "molecule_1.xyz").write_text("")
    with pytest.raises(
        InputError, match=r"molecule_1\.xyz: record 1 \(line 1\): the file is empty"
    ):
        order(folder)
    reader = MoleculeReader(folder, skip_bad=True)
    numbers = [reader.number for _ in reader]
    assert numbers == [1, 3, 5, 6]
    assert reader.number == 6
    places = [(bad.path.name, bad.number, bad.line) for bad in reader.skipped]
    assert places == [("molecule_1.xyz", 1, 1), ("molecule_2.txt", 2, 6)]
    assert str(reader.skipped[1]).startswith("molecule_2.txt: record 2 (line 6): atom 1 of 1")


def test_a_file_of_a_set_that_cannot_be_read_is_one_bad_record(tmp_path):
    folder = folder_of(tmp_path, 2)
    (folder / "b.xyz").write_bytes(b"%PDF-1.4\n")
    (folder / "c.xyz").symlink_to("nowhere")
    (folder / "d.xyz.gz").write_bytes(gzip.compress(water(8).encode() * 999, mtime=0)[:-30])
    with pytest.raises(InputError, match=r"b\.xyz is a PDF"):
        order(folder)
    reader = MoleculeReader(folder, skip_bad=True)
    assert {round(float(m.positions[0, 2])) for m in reader} == {0, 1, 8}
    assert reader.skipped_count == 3
    assert "is a link to nowhere" in reader.skipped[1].reason
    assert "cut off" in reader.skipped[2].reason


@pytest.mark.parametrize("packing", ["gzip", "bzip2", "xz"])
def test_packed_files_of_which_no_line_is_left(tmp_path, packing):
    (tmp_path / "b.xyz").write_bytes(PACKED[packing](water(8).encode())[:24])
    for skip_bad in (False, True):
        with pytest.raises(InputError, match=r"b\.xyz is cut off or damaged at its beginning"):
            MoleculeReader(tmp_path / "b.xyz", skip_bad=skip_bad)
    (tmp_path / "a.xyz").write_text(water(1))
    (tmp_path / "c.txt").write_bytes((tmp_path / "b.xyz").read_bytes())
    assert order(tmp_path, skip_bad=True) == [1]


def test_sdf_and_xyz_in_one_folder_are_noticed(tmp_path):
    (tmp_path / "a.xyz").write_text(water(1))
    (tmp_path / "b.sdf").write_text(sdf(2))
    reader = MoleculeReader(tmp_path)
    assert len(list(reader)) == 2
    assert "both SDF and XYZ" in reader.notes[0]


def test_files_with_bonds_and_without_cannot_be_one_data_set(tmp_path):
    """Bonds are not dropped without a word."""
    molecule = Chem.AddHs(Chem.MolFromSmiles("O"))
    molecule.AddConformer(Chem.Conformer(3))
    (tmp_path / "a.sdf").write_text(Chem.MolToMolBlock(molecule) + "$$$$\n")
    (tmp_path / "b.xyz").write_text(water(2))
    assert [len(chunk) for chunk in MoleculeReader(tmp_path).chunks(9)] == [1, 1]
    with pytest.raises(InputError, match="bonds"):
        preprocess(tmp_path, tmp_path / "a.h5", split="1,0,0")


def test_many_small_files_are_written_together(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    files = sorted(folder.glob("mol*"))
    written: list[int] = []
    append = MoleculeWriter.append

    def counted(writer, molecules):
        written.append(len(molecules))
        append(writer, molecules)

    monkeypatch.setattr(MoleculeWriter, "append", counted)
    preprocess(files, tmp_path / "a.h5", split="1,0,0")
    assert written == [12]
    with MoleculeFile(tmp_path / "a.h5") as file:
        gaps = file.load().properties["gap"]
    assert gaps.values.tolist() == [int(file.stem[9:]) + 0.5 for file in files]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "the folder .*empty holds no molecule file"),
        ("no*.xyz", r"no file matches .*no\*\.xyz"),
        ("emp*", "emp.* matches no molecule file"),
        ("absent.xyz", "does not exist"),
        ("link.xyz", "is a link to absent, which does not exist"),
        ("pipe.xyz", "is a device or a pipe"),
        ("x" * 300 + ".xyz", "File name too long"),
        ("a.xyz/b.xyz", "does not exist|cannot read"),
    ],
)
def test_names_without_molecules(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link.xyz").symlink_to("absent")
    (tmp_path / "a.xyz").write_text(water(1))
    os.mkfifo(tmp_path / "pipe.xyz")
    with pytest.raises(InputError, match=message) as caught:
        MoleculeReader(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_without_permission_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.xyz").write_text(water(1))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"cannot read .*a\.xyz: Permission denied"):
        MoleculeReader(tmp_path / "a.xyz")


def test_a_name_with_the_signs_of_a_pattern_is_a_file_if_it_exists(tmp_path):
    (tmp_path / "a[1].xyz").write_text(water(1))
    assert order(tmp_path / "a[1].xyz") == [1]
    assert base_name(tmp_path / "a[1].xyz") == "a[1]"


def test_names_of_outputs(tmp_path, monkeypatch):
    names = {"a.xyz": "a", "b.SDF.gz": "b", "v1.2.xyz.bz2": "v1.2", "c": "c", ".xyz": "xyz"}
    names |= {".gz": "molecules", "data": "data", "no/such_*.xyz": "no"}
    (tmp_path / "data").mkdir()
    for name, base in names.items():
        assert base_name(tmp_path / name) == base
    monkeypatch.chdir(tmp_path / "data")
    assert base_name(Path()) == base_name(Path("mol_*.xyz")) == "data"
    assert base_name(Path("/")) == "molecules"


def test_preprocess_takes_folders_and_patterns(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    monkeypatch.chdir(folder)
    for source in (".", "molecule_*.txt"):
        result = preprocess(source, split="1,0,0")
        assert (result.count, str(result.path)) == (12, "samples.h5")
        assert any("left out" in text for text in result.warnings) == (source == ".")
        with MoleculeFile(Path("samples.h5")) as file:
            gaps = file.load().properties["gap"].values.tolist()
        assert gaps == [number + 0.5 for number in range(12)]
        Path("samples.h5").unlink()


@pytest.mark.parametrize("arguments", [("",), ("/",)])
def test_bad_names_end_in_one_line(cli_here, arguments):
    done = cli_here("preprocess", *arguments, code=2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_units_of_a_set_must_agree(tmp_path):
    for name, unit in (("a", "eV"), ("b", "hartree")):
        keys = f"""gap=1 property_units='{{"gap": "{unit}"}}'"""
        (tmp_path / f"{name}.xyz").write_text(water(1, keys))
    with pytest.raises(InputError, match="property gap has two units"):
        MoleculeReader(tmp_path).detect_fields()
