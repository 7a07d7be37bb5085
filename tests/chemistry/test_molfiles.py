"""Reading and writing SDF and XYZ, good files and bad."""

from __future__ import annotations

import gzip
from pathlib import Path

import ase.io
import numpy as np
import pytest
from rdkit import Chem

from molgen_energy.chemistry.bonds import perceive
from molgen_energy.chemistry.molfiles import MoleculeReader, MoleculeTextWriter
from molgen_energy.chemistry.rdkit import build
from molgen_energy.data.molecules import Molecule, Molecules
from molgen_energy.errors import InputError

WATER = "3\nwater\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n"


def write(path: Path, molecules: Molecules) -> Path:
    with MoleculeTextWriter(path, {"seed": "0"}) as writer:
        writer.append(molecules)
    return path


@pytest.mark.parametrize("name", ["a.sdf", "a.xyz"])
def test_write_and_read_back(tmp_path, molecules, name):
    some = molecules.select(np.arange(0, 2000, 40))
    back = Molecules.from_list(list(MoleculeReader(write(tmp_path / name, some))))
    assert (back.offsets == some.offsets).all()
    assert (back.atomic_numbers == some.atomic_numbers).all()
    np.testing.assert_allclose(back.positions, some.positions, atol=6e-5)


def test_sdf_is_what_rdkit_reads(tmp_path, molecules):
    some = molecules.select(np.arange(0, 2000, 40))
    path = write(tmp_path / "a.sdf", some)
    read = list(Chem.SDMolSupplier(str(path), removeHs=False, sanitize=False))
    assert len(read) == len(some)
    for k, (theirs, ours) in enumerate(zip(read, perceive(some), strict=True)):
        assert [a.GetAtomicNum() for a in theirs.GetAtoms()] == ours.atomic_numbers.tolist()
        assert theirs.GetProp("molecule") == str(k)
        assert theirs.GetConformer().Is3D()
        bonds = zip(ours.bond_index.tolist(), ours.bond_order.tolist(), strict=True)
        expected = {(i, j, float(order)) for (i, j), order in bonds}
        found = {(b.GetBeginAtomIdx(), b.GetEndAtomIdx(), b.GetBondTypeAsDouble())
                 for b in theirs.GetBonds()}  # fmt: skip
        assert found == expected
        valid = theirs.GetProp("status") == "valid"
        assert valid == (Chem.SanitizeMol(theirs, catchErrors=True) == 0)


def test_xyz_is_what_ase_reads(tmp_path, molecules):
    some = molecules.select(np.arange(0, 2000, 200))
    path = write(tmp_path / "a.xyz", some)
    for theirs, ours in zip(ase.io.read(path, ":", format="xyz"), some, strict=True):
        assert (theirs.numbers == ours.atomic_numbers).all()
        np.testing.assert_allclose(theirs.positions, ours.positions, atol=1e-6)


def test_unperceivable_molecules_are_written_too(tmp_path):
    nan = np.full((2, 3), np.nan, np.float32)
    crowd = np.zeros((60, 3), np.float32)  # a valence beyond what RDKit can count
    far = np.array([[0, 0, 0], [90, 0, 0]], np.float32)
    odd = Molecules.from_list(
        [
            Molecule(nan, np.array([6, 1], np.uint8)),
            Molecule(crowd, np.full(60, 6, np.uint8)),
            Molecule(far, np.array([8, 1], np.uint8)),
        ]
    )
    read = list(Chem.SDMolSupplier(str(write(tmp_path / "a.sdf", odd)), sanitize=False))
    assert len(read) == 3
    status = [molecule.GetProp("status") for molecule in read]
    assert status[0] == "coordinates are not finite"
    assert status[1] == "an atom has more than 12 bonds"
    assert read[1].GetNumBonds() == 0
    assert status[2] == "valid"
    assert read[2].GetProp("fragments") == "2"
    assert len(list(MoleculeReader(write(tmp_path / "a.xyz", odd)))) == 3


def test_bonds_charges_and_aromatic_orders_are_read(tmp_path):
    molecule = Chem.AddHs(Chem.MolFromSmiles("c1ccccc1[N+](=O)[O-]"))
    from rdkit.Chem import AllChem

    AllChem.EmbedMolecule(molecule, randomSeed=0)
    block = Chem.MolToMolBlock(molecule, kekulize=False)
    (tmp_path / "a.sdf").write_text(f"{block}$$$$\n")
    (read,) = MoleculeReader(tmp_path / "a.sdf")
    assert sorted(read.bond_order.tolist()).count(12) == 6
    assert sorted(read.formal_charges.tolist())[0] == -1
    assert len(read.bond_index) == molecule.GetNumBonds()


def test_v3000_and_gzip(tmp_path, molecules):
    molecule = perceive(molecules.select(np.array([3])))[0]
    built = build(molecule, positions=True)
    with gzip.open(tmp_path / "a.sdf.gz", "wt") as file:
        file.write(Chem.MolToV3KMolBlock(built) + "$$$$\n")
    (read,) = MoleculeReader(tmp_path / "a.sdf.gz")
    np.testing.assert_allclose(read.positions, molecule.positions, atol=1e-4)


def test_lower_case_numbers_deuterium_and_extra_columns(tmp_path):
    (tmp_path / "a.xyz").write_text("3\n\nc 0 0 0 0.1\n17 1 1 1\nD 0 0 1\n\n" + WATER)
    first, second = MoleculeReader(tmp_path / "a.xyz")
    assert first.atomic_numbers.tolist() == [6, 17, 1]
    assert len(second) == 3


BAD_XYZ = {
    "wrong count": ("4\nwater\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n", "atom 4 of 4"),
    "no element": ("1\n\nQq 0 0 0\n", "no chemical element"),
    "nan": ("1\n\nH 0 nan 0\n", "coordinates of atom 1 are not finite"),
    "text": ("1\n\nH 0 zero 0\n", "zero"),
    "short line": ("1\n\nH 0 0\n", "expected element, x, y, z"),
    "no number": ("hello\n\nH 0 0 0\n", "expected a number of atoms"),
    "count too small": ("2\nwater\nO 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\n", "more atoms follow"),
    "zero atoms": ("0\n\n", "0 atoms"),
    "negative": ("-2\n\n", "-2 atoms"),
}


@pytest.mark.parametrize("what", BAD_XYZ)
def test_bad_xyz_is_named_and_skipped(tmp_path, what):
    text, reason = BAD_XYZ[what]
    path = tmp_path / "a.xyz"
    path.write_text(WATER + text + WATER)
    with pytest.raises(InputError, match=rf"a\.xyz: record 2 \(line 6\): .*{reason}"):
        list(MoleculeReader(path))
    reader = MoleculeReader(path, skip_bad=True)
    assert len(list(reader)) == 2
    assert [(bad.number, bad.line) for bad in reader.skipped] == [(2, 6)]


def test_xyz_that_ends_early(tmp_path):
    (tmp_path / "a.xyz").write_text(WATER + "3\nwater\nO 0 0 0\n")
    with pytest.raises(InputError, match=r"record 2 .*ends before atom 2 of 3"):
        list(MoleculeReader(tmp_path / "a.xyz"))


def sdf_records(tmp_path, molecules, count=3) -> list[str]:
    path = write(tmp_path / "good.sdf", molecules.select(np.arange(count)))
    return [record + "$$$$\n" for record in path.read_text().split("$$$$\n")[:-1]]


BAD_SDF = {
    "cut off": lambda record: record[: len(record) // 3] + "\n$$$$\n",
    "garbage": lambda record: "hello\n$$$$\n",
    "no atoms": lambda record: "\n\n\n  0  0  0  0  0  0  0  0  0  0999 V2000\nM  END\n$$$$\n",
    "a query atom": lambda record: record.replace(" C  ", " *  ", 1).replace(" N  ", " *  ", 1),
    "nan": lambda record: _replace_first_number(record, "       nan"),
    "empty": lambda record: "$$$$\n",
}


def _replace_first_number(record: str, number: str) -> str:
    lines = record.splitlines(keepends=True)
    lines[4] = number + lines[4][10:]
    return "".join(lines)


@pytest.mark.parametrize("what", BAD_SDF)
def test_bad_sdf_is_named_and_skipped(tmp_path, molecules, what):
    first, second, third = sdf_records(tmp_path, molecules)
    path = tmp_path / "a.sdf"
    path.write_text(first + BAD_SDF[what](second) + third)
    line = first.count("\n") + 1
    with pytest.raises(InputError, match=rf"a\.sdf: record 2 \(line {line}\): "):
        list(MoleculeReader(path))
    reader = MoleculeReader(path, skip_bad=True)
    assert len(list(reader)) == 2
    assert reader.skipped_count == 1


def test_sdf_without_the_last_dollars(tmp_path, molecules):
    first, second, _ = sdf_records(tmp_path, molecules)
    (tmp_path / "a.sdf").write_text(first + second.replace("$$$$\n", ""))
    assert len(list(MoleculeReader(tmp_path / "a.sdf"))) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.sdf", b"", "holds no molecule"),
        ("a.xyz", b"\n\n", "holds no molecule"),
        ("a.pdb", b"x", "no SDF or XYZ"),
        ("a.xyz.gz", gzip.compress(WATER.encode() * 50, mtime=0)[:-20], "cut off"),
        ("a.xyz.gz", b"plain text", "expected a number of atoms"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(MoleculeReader(tmp_path / name))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        MoleculeReader(tmp_path / "a.sdf")
    with pytest.raises(InputError, match="folder"):
        MoleculeReader(tmp_path)


def test_all_records_bad(tmp_path):
    (tmp_path / "a.xyz").write_text("1\n\nQq 0 0 0\n" * 2)
    with pytest.raises(InputError, match="no usable molecule"):
        list(MoleculeReader(tmp_path / "a.xyz", skip_bad=True))


def test_ions_need_no_bonds(tmp_path):
    """A salt without bonds beside molecules with bonds leaves the bonds of the file given."""
    mols = []
    for smiles in ("[Na+].[Cl-]", "O"):
        molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
        molecule.AddConformer(Chem.Conformer(molecule.GetNumAtoms()))
        mols.append(Chem.MolToMolBlock(molecule))
    (tmp_path / "a.sdf").write_text("".join(f"{block}$$$$\n" for block in mols))
    assert MoleculeReader(tmp_path / "a.sdf").given_bonds.every
    (tmp_path / "b.sdf").write_text(f"{mols[1]}$$$$\n{mols[0].replace('M  CHG', 'M  RAD')}$$$$\n")
    assert MoleculeReader(tmp_path / "b.sdf").given_bonds.without == 2
    # An empty record has a number too, as when the molecules are read.
    (tmp_path / "b.sdf").write_text(
        f"{mols[1]}$$$$\n$$$$\n{mols[0].replace('M  CHG', 'M  RAD')}$$$$\n"
    )
    assert MoleculeReader(tmp_path / "b.sdf").given_bonds.without == 3
