"""Text that is damaged or made to deceive: refused with one line, in bounded time and memory."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import resource
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom

from molgen_energy.chemistry.fields import FieldSelection, parse_integer
from molgen_energy.chemistry.molfiles import MoleculeReader, lines, molecule_files
from molgen_energy.chemistry.molfiles.lines import Lines, open_unpacked
from molgen_energy.chemistry.molfiles.sdf import parse_mol_block
from molgen_energy.data.molecules import Molecule
from molgen_energy.datasets.files import MoleculeFiles
from molgen_energy.datasets.qm9 import PROPERTIES, read_dsgdb9nsd
from molgen_energy.datasets.smiles import SmilesFiles, smiles_rows
from molgen_energy.elements import atomic_number
from molgen_energy.errors import InputError

WATER = "3\n{}\nO 0 0 0.1\nH 0.96 0 0\nH -0.24 0.93 0\n"
ARABIC = "\u0663"  # the digit 3, which float() reads
MIB = 1 << 20


def zwitterion() -> str:
    """A mol block with charges and elements of two letters, and numbers of two digits."""
    molecule = Chem.AddHs(Chem.MolFromSmiles("[NH3+]CC(Cl)(Br)C(=O)[O-]"))
    rdDistGeom.EmbedMolecule(molecule, randomSeed=1)
    return Chem.MolToMolBlock(molecule, kekulize=False)


def same(ours: Molecule | str, theirs: Molecule | str) -> bool:
    assert isinstance(theirs, Molecule)
    return isinstance(ours, Molecule) and all(
        np.array_equal(getattr(ours, name), getattr(theirs, name))
        for name in ("atomic_numbers", "positions", "formal_charges", "bond_index", "bond_order")
    )


def message(path: Path, **options: bool) -> str:
    """The one line with which reading a file ends."""
    with pytest.raises(InputError) as caught:
        list(MoleculeReader(path, **options))
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text
    assert len(text) < 600
    return text


def test_no_line_of_a_mol_block_is_read_shifted():
    """Every insertion of a space, and every deletion of a character."""
    block = zwitterion()
    meant = parse_mol_block(block)
    rows = block.split("\n")
    refused = 0
    for k in range(3, len(rows) - 2):
        row = rows[k]
        shifted = {row[:p] + " " + row[p:] for p in range(len(row))}
        shifted |= {row[:p] + row[p + 1 :] for p in range(len(row))}
        for changed in shifted - {row}:
            found = parse_mol_block("\n".join([*rows[:k], changed, *rows[k + 1 :]]))
            assert isinstance(found, str) or same(found, meant), changed
            refused += isinstance(found, str)
    assert refused > 1000


def test_columns_of_other_programs_are_read():
    """The same molecule as it is written by hand, with tabs, and with the element at the right."""
    block = zwitterion()
    meant = parse_mol_block(block)
    rows = block.split("\n")
    count = int(rows[3][:3])
    atoms = rows[4 : 4 + count]
    others = {
        "tabs": ["\t".join(row.split()) for row in atoms],
        "single spaces": [" ".join(row.split()) for row in atoms],
        "no numbers": [row[:34].rstrip() for row in atoms],
        "the element at the right": [
            f"{row[:31]}{row[31:34].strip():>3}{row[34:]}" for row in atoms
        ],
        "wide": [f"{row[:10]}00000{row[10:]}" for row in atoms],
        "one wide": [f"{atoms[0][:10]}0000{atoms[0][10:]}", *atoms[1:]],
        "indented": [f"  {row}" for row in atoms],
        "empty numbers": [f"{row[:34]}  {row[36:42]}" for row in atoms],
        "CRLF": [f"{row}\r" for row in atoms],
    }
    for name, lines_of_atoms in others.items():
        found = parse_mol_block("\n".join([*rows[:4], *lines_of_atoms, *rows[4 + count :]]))
        assert same(found, meant), name


def v3000(**parts: str) -> str:
    values = {"counts": "2 1 0 0 0", "atom": "1 N 0.1 0.2 0.3 0", "bond": "1 1 1 2"} | parts
    return (
        "\n     Test\n\n  0  0  0     0  0            999 V3000\nM  V30 BEGIN CTAB\n"
        f"M  V30 COUNTS {values['counts']}\nM  V30 BEGIN ATOM\nM  V30 {values['atom']}\n"
        "M  V30 2 C 1 2 3 0\nM  V30 END ATOM\nM  V30 BEGIN BOND\n"
        f"M  V30 {values['bond']}\nM  V30 END BOND\nM  V30 END CTAB\nM  END\n"
    )


@pytest.mark.parametrize(
    ("part", "text", "reason"),
    [
        ("atom", "1 N x 0.2 0.3 0", "line 8: the coordinate 'x' is no finite number"),
        ("atom", "1 N 1_0 0.2 0.3 0", "line 8: the coordinate '1_0' is"),
        ("atom", f"1 N {ARABIC} 0.2 0.3 0", f"line 8: the coordinate '{ARABIC}' is"),
        ("atom", "1 N 0x1 0.2 0.3 0", "'0x1' is no finite number"),
        ("atom", "1 N 1e999 0.2 0.3 0", "'1e999' is no finite number"),
        ("atom", "1x N 0.1 0.2 0.3 0", "'1x' is no number of an atom"),
        ("atom", "1 N 0.1 0.2 0.3 0 CHG=300", "the charge '300' is none"),
        ("bond", "1 1x 1 2", "line 12: number, order and two atoms"),
        ("bond", "1 1 1 2_0", "line 12: number, order and two atoms"),
        (
            "counts",
            "1000000000 1 0 0 0",
            "line 6: it names 1,000,000,000 atoms or bonds in 14 lines",
        ),
        ("counts", "2_0 1 0 0 0", "line 6: '2_0 1' are no numbers"),
    ],
)
def test_words_of_v3000_that_rdkit_reads_as_others(part, text, reason):
    assert reason in str(parse_mol_block(v3000(**{part: text})))


def test_v3000_of_other_programs_is_read():
    meant = parse_mol_block(v3000())
    for text in (
        "1 N 0.1 0.2 -\nM  V30 0.3 0",
        "1 N 1E-1 +.2 3.d-1 0 CFG=2",
        "1  N 0.1  0.2 0.3 0",
    ):
        assert same(parse_mol_block(v3000(atom=text)), meant), text
    charged = parse_mol_block(v3000(atom="1 N 0.1 0.2 0.3 0 CHG=-2"))
    assert isinstance(charged, Molecule)
    assert charged.formal_charges.tolist() == [-2, 0]


@pytest.mark.parametrize("fields", ["", "> <gap>\n1.5\n\n", "> <gap>\n1.5\n"])
def test_a_missing_end_of_a_record_is_noticed(tmp_path, fields):
    blocks = [f"{zwitterion()}{fields}$$$$\n"] * 6
    blocks[2] = blocks[2].replace("$$$$\n", "")
    (tmp_path / "a.sdf").write_text("".join(blocks))
    first = 1 + 2 * blocks[0].count("\n")
    second = first + blocks[2].count("\n")
    assert f"record 3 (line {first}): a second mol block begins at line {second} without $$$$" in (
        message(tmp_path / "a.sdf")
    )
    reader = MoleculeReader(tmp_path / "a.sdf", skip_bad=True)
    assert (len(list(reader)), reader.skipped_count) == (4, 1)


def test_a_mol_block_as_the_value_of_a_field_is_none_of_the_record(tmp_path):
    text = (
        f"{zwitterion()}> <first>\nname\n  2  1  0  0  0  0  0  0  0  0999 V2000\nM  END\n\n$$$$\n"
    )
    (tmp_path / "a.sdf").write_text(text)
    assert len(list(MoleculeReader(tmp_path / "a.sdf"))) == 1


BAD_FRAMES = {
    "a count with a line": ("1_0\n\nH 0 0 0\n", "expected a number of atoms"),
    "a count of another script": (f"{ARABIC}\n\nH 0 0 0\n", "expected a number of atoms"),
    "a coordinate with a line": ("1\n\nH 1_0 0 0\n", "'1_0' is no finite number"),
    "a coordinate of another script": (f"1\n\nH {ARABIC} 0 0\n", f"'{ARABIC}' is no finite number"),
    "an element of another script": (f"1\n\n{ARABIC} 0 0 0\n", "is no chemical element"),
    "an element that capitalises to S": ("1\n\n\u017f 0 0 0\n", "is no chemical element"),
    "an element of many digits": (f"1\n\n{'9' * 5000} 0 0 0\n", "is no chemical element"),
    "an exponent": ("1\n\nH 1e999 0 0\n", "not finite|no finite number"),
    "more than float32": ("1\n\nH 1e39 0 0\n", "not finite"),
    "NUL in a column": ("1\n\nH 0 0 0 \0\n", "NUL bytes"),
    "NUL in the comment": ("1\na='\0'\nH 0 0 0\n", "NUL bytes"),
    "a billion atoms": (
        "1000000000\n\n" + "H 0 0 0\n" * 1000,
        "1,000,000,000 atoms, of which at most",
    ),
    "many atoms": ("900000\n\nH 0 0 0\n", "ends before atom 2|expected element"),
    "many columns": (
        f"1\nProperties=species:S:1:pos:R:3:x:R:{'9' * 9}\nH 0 0 0\n",
        "is no name, type",
    ),
    "long Properties": (f"1\nProperties={'x:R:1:' * 999}pos:R:3\nH 0 0 0\n", "more than 4,000"),
    "many fields": (f"1\n{' '.join(f'k{k}=1' for k in range(10_001))}\nH 0 0 0\n", "data fields"),
}


@pytest.mark.parametrize("what", BAD_FRAMES)
def test_bad_frames_are_named_and_skipped(tmp_path, what):
    text, reason = BAD_FRAMES[what]
    (tmp_path / "a.xyz").write_bytes((WATER.format("") * 200 + text).encode())
    with pytest.raises(InputError, match=rf"a\.xyz: record 201 \(line 1001\): .*({reason})"):
        list(MoleculeReader(tmp_path / "a.xyz"))
    reader = MoleculeReader(tmp_path / "a.xyz", skip_bad=True)
    assert (len(list(reader)), reader.skipped_count) == (200, 1)


def test_nul_bytes_in_an_sdf_are_a_bad_record(tmp_path):
    block = zwitterion()
    (tmp_path / "a.sdf").write_text(f"{block}$$$$\n" * 9 + f"{block}> <name>\na\0b\n\n$$$$\n")
    assert "record 10 (line" in message(tmp_path / "a.sdf")
    assert "NUL bytes" in message(tmp_path / "a.sdf")


def test_numbers_of_fields_and_groups():
    for text in ("1_0", ARABIC, "1e999", "\uff11"):
        assert not FieldSelection.detect([{"gap": text}]).properties
        columns = FieldSelection.of({"gap": ""}, "group").columns({"gap": text, "group": text})
        assert np.isnan(columns["properties"]["gap"])
        assert columns["group"] > 1000  # the hash of a text
    with pytest.raises(InputError, match=r"2,001 data fields hold numbers, .*--properties"):
        FieldSelection.detect([{f"k{k}": "1" for k in range(2001)}])
    for text in ("1_0", ARABIC, "", "1.0", "9" * 19):
        with pytest.raises(ValueError, match="is no integer"):
            parse_integer(text)
        with pytest.raises(InputError, match="no chemical element"):
            atomic_number(text)


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


def limits(monkeypatch: pytest.MonkeyPatch, scale: int = 64) -> None:
    """The limits, so many times smaller: the tests take as much less time."""
    for name in ("MOST_IN_LINE", "MOST_IN_RECORD", "MOST_LINES", "_FREE"):
        monkeypatch.setattr(lines, name, getattr(lines, name) // scale)


BOMBS = {
    "newlines after a frame": (WATER.format("") + "\n" * 99_000, "more than 23,437 lines"),
    "newlines in a record": ("$$$$\n" + "\n" * 30_000, "an empty record|more than 23,437 lines"),
    "a line": ("x" * 70_000, "a line has more than 65,536 characters"),
    "a comment": ("1\n" + "a" * 70_000, "a line has more than 65,536 characters"),
    "an atom": ("1\n\nH 0 0 0 " + "1 " * 70_000, "a line has more than 65,536 characters"),
    "lines of a frame": ("900000\n\n" + "H 0 0 0\n" * 30_000, "more than 23,437 lines"),
    "text of a frame": (
        "90000\n\n" + f"H 0 0 0 {'x' * 60_000}\n" * 30,
        r"lines or 1 MiB of text; the file is not",
    ),
    "a value of a field": (zwitterion() + "> <a>\n" + "x\n" * 30_000, "more than 23,437 lines"),
}


@pytest.mark.parametrize("what", BOMBS)
@pytest.mark.parametrize("packing", ["plain", "xz"])
def test_lines_and_records_have_limits(tmp_path, monkeypatch, what, packing):
    limits(monkeypatch)
    text, reason = BOMBS[what]
    suffix = ".sdf" if "$$$$" in text or "V2000" in text else ".xyz"
    (tmp_path / f"a{suffix}").write_bytes(PACK.get(packing, bytes)(text.encode()))
    with pytest.raises(InputError, match=rf"a{suffix}: .*({reason})"):
        list(MoleculeReader(tmp_path / f"a{suffix}"))
    with contextlib.suppress(InputError):  # where there is no other record
        reader = MoleculeReader(tmp_path / f"a{suffix}", skip_bad=True)
        assert len(list(reader)) == 1
        assert reader.skipped_count == 1


def test_empty_lines_of_a_list_of_smiles_have_a_limit(tmp_path, monkeypatch):
    limits(monkeypatch)
    path = tmp_path / "a.smi"
    for between, fits in ((20_000, True), (40_000, False)):
        path.write_text("C\n" + ("\n" * between + "O\n") * 2)
        with contextlib.nullcontext() if fits else pytest.raises(InputError, match="23,437 lines"):
            list(smiles_rows(path))


def test_records_below_the_limits_are_read_however_many_they_are(tmp_path, monkeypatch):
    limits(monkeypatch)
    count = 6000
    (tmp_path / "a.xyz").write_text(WATER.format("") * count)
    assert len(list(MoleculeReader(tmp_path / "a.xyz"))) == count
    (tmp_path / "a.csv").write_text("smiles,gap\n" + "O,1.5\n" * 30_000)
    rows = smiles_rows(tmp_path / "a.csv")
    assert sum(1 for _ in rows) == 30_000


@pytest.mark.parametrize("packing", ["bz2", "xz"])
def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch, packing):
    """Some hundred bytes that would become 1 MB of good molecules."""
    monkeypatch.setattr(lines, "_FREE", MIB // 32)
    path = tmp_path / f"a.xyz.{packing}"
    path.write_bytes(PACK[packing](WATER.format("").encode() * (MIB // 40)))
    assert 200 * path.stat().st_size < MIB // 2
    assert "unpacks to more than" in message(path)
    reader = MoleculeReader(path, skip_bad=True)
    assert 100 < len(list(reader)) < MIB // 80
    assert "if it is right, unpack it first" in reader.skipped[0].reason


def test_xz_that_needs_much_memory_is_refused(tmp_path):
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 28}]
    path = tmp_path / "a.xyz.xz"
    path.write_bytes(lzma.compress(WATER.format("").encode(), filters=filters))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "takes more than 128 MiB of memory" in message(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_xz_is_unpacked_as_the_library_does(tmp_path):
    text = "".join(f"{k}\n" for k in range(50_000)).encode()
    parts = lzma.compress(text[:100_001]), lzma.compress(text[100_001:])
    (tmp_path / "a").write_bytes(b"".join(parts))
    (tmp_path / "b").write_bytes(bytes(16).join(parts))  # as `xz` pads streams
    for name in "ab":
        with open_unpacked(tmp_path / name) as file:
            assert file.read() == lzma.open(tmp_path / "a").read() == text
    reader = Lines(tmp_path / "a")
    assert [reader.next() for _ in range(3)] == ["0\n", "1\n", "2\n"]
    reader.close()


REPEATED = {
    "opening braces": "a={ " * 200_000,
    "quotes": "'" * 200_000 + " a=1",
    "a word": "a= " + "b" * 500_000,
    "equals": "=" * 500_000,
    "escapes": 'a="' + '\\"' * 200_000,
}


@pytest.mark.parametrize("what", REPEATED)
def test_long_comments_take_linear_time(tmp_path, what):
    """Each took minutes to hours with a pattern that tries every beginning."""
    (tmp_path / "a.xyz").write_text(WATER.format(REPEATED[what]))
    assert len(list(MoleculeReader(tmp_path / "a.xyz"))) == 1


@pytest.mark.parametrize(
    "text", ["#" + " " * 60 + "\n", "> <" + "<" * 100_000 + "\n", "C" * 100_000 + "\n"]
)
def test_first_lines_take_linear_time_to_be_told_apart(tmp_path, text):
    (tmp_path / "a.dat").write_text(text * 10)
    with pytest.raises(InputError, match=r"a\.dat (is no SDF or XYZ file|holds SMILES)"):
        MoleculeReader(tmp_path / "a.dat")


def test_damaged_frames_take_linear_time(tmp_path):
    """Each of 9,000 lines names a frame that would reach far ahead."""
    (tmp_path / "a.xyz").write_text(WATER.format("") + "7000\n" * 9000)
    reader = MoleculeReader(tmp_path / "a.xyz", skip_bad=True)
    assert len(list(reader)) == 1


def test_pipes_devices_and_loops_among_the_files(tmp_path):
    (tmp_path / "a.xyz").write_text(WATER.format(""))
    os.mkfifo(tmp_path / "b.xyz")
    os.mkfifo(tmp_path / "notes.txt")
    (tmp_path / "c.xyz").symlink_to("d.xyz")
    (tmp_path / "d.xyz").symlink_to("c.xyz")
    (tmp_path / "e.xyz").symlink_to("/dev/zero")
    (tmp_path / "f").symlink_to(".")
    assert [path.name for path in molecule_files(tmp_path).files] == [f"{c}.xyz" for c in "abcde"]
    reader = MoleculeReader(tmp_path, skip_bad=True)
    assert (len(list(reader)), reader.skipped_count) == (1, 4)
    for name in ("b.xyz", "c.xyz", "e.xyz"):
        with pytest.raises(InputError, match=r"a device or a pipe|is a link to"):
            MoleculeReader(tmp_path / name)
        with pytest.raises(InputError, match=r"a device or a pipe|does not exist"):
            read_dsgdb9nsd(tmp_path / name)
    with pytest.raises(InputError, match="a device or a pipe"):
        read_dsgdb9nsd(tmp_path)
    with pytest.raises(InputError, match="a device or a pipe"):
        SmilesFiles(files=(tmp_path / "b.xyz",)).check()


def test_names_that_are_not_utf8(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xe9.xyz"))
    path.write_text(WATER.format("gap=1.5") * 3)
    dataset = MoleculeFiles(files=(path,), split="1,0,0")
    result = dataset.make(tmp_path / "a.h5")
    assert result.count == 3
    dataset.source_name().encode()  # valid Unicode, as HDF5 needs
    assert molecule_files(tmp_path).files == [path]


ORIGINAL = (
    "{count}\ngdb {number} "
    + " ".join(["1.5"] * len(PROPERTIES))
    + "\nH 0 0 {z} 0.1\nH 0 0 0.7 0.1\n1.5\n{smiles}\tx\nInChI=1\n"
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"count": "1_0"}, "'1_0' is no integer"),
        ({"count": ARABIC}, "is no integer"),
        ({"count": "1000000000"}, "1,000,000,000 atoms in 7 lines"),
        ({"count": "0"}, "0 atoms in 7 lines"),
        ({"count": "-2"}, "-2 atoms in 7 lines"),
        ({"z": "1_0"}, "'1_0' is no finite number"),
        ({"z": "1e39"}, "not finite"),
        ({"smiles": "C\0"}, "NUL bytes"),
        ({"smiles": "C" * (1 << 20)}, "more than 1,048,576 bytes"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_files_of_qm9(tmp_path, change, reason, packed):
    values = {"count": "2", "number": "1", "z": "0", "smiles": "C"}
    texts = [ORIGINAL.format(**values), ORIGINAL.format(**values | {"number": "2"} | change)]
    source = tmp_path / "qm9"
    if packed:
        with tarfile.open(source, "w:xz") as archive:
            for number, text in enumerate(texts, start=1):
                member = tarfile.TarInfo(f"dsgdb9nsd_00000{number}.xyz")
                member.size = len(text.encode())
                archive.addfile(member, io.BytesIO(text.encode()))
    else:
        source.mkdir()
        for number, text in enumerate(texts, start=1):
            (source / f"dsgdb9nsd_00000{number}.xyz").write_text(text)
    with pytest.raises(InputError, match=rf"qm9: dsgdb9nsd_000002\.xyz is broken .*{reason}"):
        read_dsgdb9nsd(source)


@pytest.mark.parametrize("kind", ["a header of 4 GB", "many names", "zeros"])
def test_archives_that_unpack_to_too_much(tmp_path, monkeypatch, kind):
    limits(monkeypatch)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w"):
        member = tarfile.TarInfo("x.xyz" if kind == "zeros" else "x")
        member.size = 1 << 32
        member.type = {"a header of 4 GB": b"x", "many names": b"L"}.get(kind, b"0")
        content.write(member.tobuf() * (2000 if kind == "many names" else 1))
        content.write(bytes(8 * MIB))
    (tmp_path / "a.tar.bz2").write_bytes(bz2.compress(content.getvalue()))
    with pytest.raises(InputError, match=r"a\.tar\.bz2"):
        read_dsgdb9nsd(tmp_path / "a.tar.bz2")


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.smi", "O\n" + "C" * 3000, "line 2: the SMILES has 3,000 characters, at most 2,000"),
        ("a.smi", "O\nC\0C\n", "line 2: it holds NUL bytes"),
        ("a.csv", "smiles,gap\nO,1\nC\0,2\n", "line 3: it holds NUL bytes"),
        ("a.csv", 'smiles,gap\nO,1\n"C' + "x\n" * 99_999, "field larger than field limit"),
        ("a.csv", ",".join(f"c{k}" for k in range(10_001)), "more than 10,000 columns"),
        ("a.csv", "x," * 999, "has no column 'smiles'"),
        ("a.smi", "C" * (5 * MIB), "a line has more than 4,194,304 characters"),
    ],
)
def test_lists_of_smiles(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text)
    dataset = SmilesFiles(files=(tmp_path / name,), relax="none", workers=0)
    with pytest.raises(InputError, match=reason) as caught:
        dataset.make(tmp_path / "a.h5")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
