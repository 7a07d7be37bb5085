"""Columns and keys of extended XYZ against ASE, and the files of QM9."""

from __future__ import annotations

import io
import math
from pathlib import Path

import ase.io
import numpy as np
import pytest

from molgen_energy.chemistry.molfiles import MoleculeReader
from molgen_energy.datasets.qm9 import PROPERTIES, read_dsgdb9nsd
from molgen_energy.errors import InputError

ETHANOL = (
    ("C", -0.854405, 0.223518, 0.241798),
    ("C", 0.387146, -0.358540, -0.401459),
    ("O", 1.531580, 0.384308, -0.007311),
    ("H", -1.7254, 0.004, 0.9),
)
# Text of a column for each atom (k from 0), by its declaration.
COLUMNS = {
    "species:S:1": lambda k, atom: atom[0],
    "pos:R:3": lambda k, atom: f"{atom[1]:.6f} {atom[2]:.6f} {atom[3]:.6f}",
    "Z:I:1": lambda k, atom: {"C": "6", "O": "8", "H": "1"}[atom[0]],
    "id:I:1": lambda k, atom: str(k + 1),
    "tags:I:1": lambda k, atom: str(k % 2),
    "forces:R:3": lambda k, atom: f"{0.1 * k:.3f} -0.2 1.5e-03",
    "velo:R:3": lambda k, atom: "9.5 8.5 7.5",
    "masses:R:1": lambda k, atom: "12.011",
    "initial_charges:R:1": lambda k, atom: f"{0.05 * k:.4f}",
    "move_mask:L:1": lambda k, atom: "TF"[k % 2],
    "label:S:1": lambda k, atom: f"H{k}_a",
}
ORDERS = (
    "species pos",
    "pos species",
    "id species pos",
    "species id pos",
    "species initial_charges pos",
    "Z pos",
    "pos Z forces",
    "forces species pos",
    "species Z pos forces",
    "move_mask tags species velo pos",
    "label species pos",
    "masses id move_mask pos species initial_charges",
    "species tags pos forces id velo",
)


def frame(order: str, comment: str = "{}") -> str:
    """A frame of ethanol's first atoms with the named columns."""
    names = [next(c for c in COLUMNS if c.split(":")[0] == name) for name in order.split()]
    rows = [" ".join(COLUMNS[n](k, atom) for n in names) for k, atom in enumerate(ETHANOL)]
    return "\n".join([str(len(rows)), comment.format(f"Properties={':'.join(names)}"), *rows, ""])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("comment", ["{}", 'Lattice="9 0 0 0 9 0 0 0 9" {} pbc="F F F" E=-3.5'])
def test_columns_are_those_that_ase_reads(tmp_path, order, comment):
    text = frame(order, comment)
    theirs = ase.io.read(io.StringIO(text * 2), ":", format="extxyz")
    (tmp_path / "a.xyz").write_text(text * 2)
    reader = MoleculeReader(tmp_path / "a.xyz")
    ours = list(reader)
    assert len(ours) == len(theirs) == 2
    for molecule, atoms in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(molecule.atomic_numbers, atoms.numbers)
        np.testing.assert_allclose(molecule.positions, atoms.positions, atol=1e-5)
    cell = [note for note in reader.notes if "Lattice" in note and "(2 records)" in note]
    assert len(cell) == len(reader.notes) == ("Lattice" in comment)


@pytest.mark.parametrize(
    "quoted", ['Properties="{}"', "Properties='{}'", "Properties = {}", "properties={}"]
)
def test_properties_in_quotes_or_with_spaces(tmp_path, quoted):
    declared = "id:I:1:species:S:1:pos:R:3"
    text = frame("id species pos").replace(f"Properties={declared}", quoted.format(declared))
    (tmp_path / "a.extxyz").write_text(text)
    (molecule,) = MoleculeReader(tmp_path / "a.extxyz")
    np.testing.assert_allclose(molecule.positions, [atom[1:] for atom in ETHANOL], atol=1e-6)


def test_frames_of_one_file_may_have_different_columns(tmp_path):
    plain = frame("species pos", "no keys")
    (tmp_path / "a.xyz").write_text(frame("pos Z forces") + plain + frame("id species pos"))
    for molecule in MoleculeReader(tmp_path / "a.xyz"):
        np.testing.assert_allclose(molecule.positions, [atom[1:] for atom in ETHANOL], atol=1e-6)
        assert molecule.atomic_numbers.tolist() == [6, 6, 8, 1]


@pytest.mark.parametrize(
    ("declared", "reason"),
    [
        ("id:I:1:pos:R:3", "lacks species or Z"),
        ("species:S:1:id:I:3", "lacks pos"),
        ("species:S:1:pos:R:2:id:I:1", "pos has 2 columns, expected 3"),
        ("species:S:1:pos:R", "is not name:type:count"),
        ("species:S:1:pos:Q:3", "'pos:Q:3' is no name, type S, R, I or L, count"),
        ("species:S:1:pos:R:-3", "'pos:R:-3' is no name"),
        ("nonsense", "is not name:type:count"),
        ("species:S:1:pos:R:3:id:I:1", "atom 1 of 4: it has 4 columns, Properties names 5"),
        ("species:S:1:id:I:1:pos:R:3", "it has 4 columns, Properties names 5"),
        ("pos:R:3:species:S:1", "atom 1 of 4: '-0.854405|atom 1 of 4: '0.241798' is no chemical"),
    ],
)
def test_columns_that_do_not_fit_are_a_bad_record(tmp_path, declared, reason):
    good = frame("species pos")
    bad = good.replace("Properties=species:S:1:pos:R:3", f"Properties={declared}")
    (tmp_path / "a.xyz").write_text(good + bad + good)
    with pytest.raises(InputError, match=rf"record 2 \(line 7\): .*({reason})"):
        list(MoleculeReader(tmp_path / "a.xyz"))
    reader = MoleculeReader(tmp_path / "a.xyz", skip_bad=True)
    assert len(list(reader)) == 2
    assert [bad.number for bad in reader.skipped] == [2]


NOT_PLAIN = {
    "ids in front": ("1 C 0 0 0\n2 O 0 0 1.2\n3 O 0 0 -1.2\n", "columns are element, x, y, z"),
    "ids after the element": ("C 1 0 0 0\nO 2 0 0 1.2\nO 3 0 0 -1.2\n", "counts the atoms"),
    "charges of GAMESS": ("C 6.0 0 0 0\nO 8.0 0 0 1.2\nO 8.0 0 0 -1.2\n", "nuclear charges"),
    "element at the end": ("0 0 0 C\n0 0 1.2 O\n0 0 -1.2 O\n", "no chemical element"),
}


@pytest.mark.parametrize("what", NOT_PLAIN)
def test_other_columns_without_properties_are_refused(tmp_path, what):
    atoms, reason = NOT_PLAIN[what]
    (tmp_path / "a.xyz").write_text(f"3\ncarbon dioxide\n{atoms}")
    with pytest.raises(InputError, match=f"record 1 .*{reason}"):
        list(MoleculeReader(tmp_path / "a.xyz"))


def test_numbers_of_other_programs(tmp_path):
    numbers = {"7.29479528D-03": 7.29479528e-3, "-1.5d+01": -15.0, "-6.4*^-2": -0.064, "2E-1": 0.2}
    rows = "".join(f"C {text} 0 0.{k}\n" for k, text in enumerate(numbers))
    (tmp_path / "a.xyz").write_text(f"4\nenergy=-4.05D+01 dipole=1.5*^-3 cid=1_000\n{rows}")
    reader = MoleculeReader(tmp_path / "a.xyz")
    reader.selection = reader.detect_fields()
    (molecule,) = reader
    np.testing.assert_allclose(molecule.positions[:, 0], list(numbers.values()), rtol=1e-6)
    assert molecule.properties == {"energy": -40.5, "dipole": 0.0015}
    (tmp_path / "a.xyz").write_text("1\n\nC 1_0 0 0\n")
    with pytest.raises(InputError, match="'1_0' is no finite number"):
        list(MoleculeReader(tmp_path / "a.xyz"))


def qm9_file(number: int, smiles: str, atoms: list[str], frequencies: int) -> str:
    """A file as the data set has it; its numbers are made up but differ from each other."""
    values = "\t".join(f"{number + 0.01 * k:.4f}" for k in range(len(PROPERTIES) - 1))
    rows = "".join(f"{atom}\t-0.{k}5\n" for k, atom in enumerate(atoms))
    tail = "\t".join(f"{1000.5 + k}" for k in range(frequencies))
    return (
        f"{len(atoms)}\ngdb {number}\t{values}\t-6.4*^-2\t\n{rows}{tail}\n"
        f"{smiles}\t{smiles}\t\nInChI=1S/{number}\tInChI=1S/{number}\n"
    )


QM9_FILES = [
    qm9_file(3, "O", ["O\t 0.0\t 0.0\t 0.1", "H\t 0.7\t 0.5\t 0.0", "H\t-0.7\t 8.1*^-6\t 0.0"], 3),
    qm9_file(7, "[H][H]", ["H\t 0.0\t 0.0\t 0.1", "H\t 0.0\t 0.0\t 0.8"], 1),
    qm9_file(10, "C#N", ["C\t 0.0\t 0.0\t 0.1", "N\t 0\t 0\t1.2", "H\t 0\t 0\t-1.0"], 4),
]


@pytest.mark.parametrize("together", [True, False])
def test_files_of_qm9_hold_properties_and_smiles(tmp_path, together):
    """As the data set's own reader gives them."""
    folder = tmp_path / "raw"
    folder.mkdir()
    for number, text in zip((3, 7, 10), QM9_FILES, strict=True):
        (folder / f"dsgdb9nsd_{number}.xyz").write_text(text)
    expected = read_dsgdb9nsd(folder)
    path = folder
    if together:
        path = tmp_path / "all.xyz"
        path.write_text("".join(QM9_FILES))
    reader = MoleculeReader(path)
    reader.selection = reader.detect_fields()
    (chunk,) = reader.chunks(10)
    ours, theirs = chunk.molecules.to_arrays(), expected.to_arrays()
    assert ours.keys() == theirs.keys()
    assert chunk.molecules.units == expected.units
    assert chunk.records.tolist() == [1, 2, 3]
    for name, values in theirs.items():
        np.testing.assert_array_equal(ours[name], values, name)
    assert math.isclose(chunk.molecules.properties["Cv"].values[0], -0.064)


@pytest.mark.parametrize("left", [1, 2, 3])
def test_cut_off_ends_of_qm9_are_read_as_far_as_they_go(tmp_path, left):
    cut = QM9_FILES[0].splitlines(keepends=True)[: -left or None]
    (tmp_path / "a.xyz").write_text("".join(cut) + QM9_FILES[1])
    reader = MoleculeReader(tmp_path / "a.xyz", selection=None)
    assert [len(molecule) for molecule in reader] == [3, 2]


def test_a_bad_frame_of_qm9_takes_its_end_with_it(tmp_path):
    bad = Path(tmp_path / "a.xyz")
    bad.write_text(QM9_FILES[0] + QM9_FILES[2].replace("N\t 0", "N\t zero") + QM9_FILES[1])
    reader = MoleculeReader(bad, skip_bad=True)
    assert [(reader.number, len(molecule)) for molecule in reader] == [(1, 3), (3, 2)]
    assert [record.number for record in reader.skipped] == [2]


def test_frames_of_orca(tmp_path):
    """ORCA's .allxyz has a line `>` between frames."""
    frame = "3\n\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n"
    (tmp_path / "a.allxyz").write_text(">\n".join([frame] * 3))
    assert len(list(MoleculeReader(tmp_path / "a.allxyz"))) == 3
