"""Mol blocks that are read many at a time, against RDKit's reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from molgen_energy.chemistry.molfiles import MoleculeReader, sdf
from molgen_energy.chemistry.molfiles.plain_blocks import read_plain_blocks
from molgen_energy.chemistry.molfiles.sdf import format_record, parse_mol_block
from molgen_energy.data.hdf5 import MoleculeFile
from molgen_energy.data.molecules import AROMATIC, Molecule
from molgen_energy.resources import bundled_sample

COLUMNS = ("positions", "atomic_numbers", "formal_charges", "bond_index", "bond_order")
REST = " 0  0  0  0  0  0  0  0  0  0  0  0"
# A charge, aromatic and stereo bonds, an element of two letters, a parity, lines of two lengths.
CHARGED = f"""
     Test    3D

  5  4  0  0  1  0  0  0  0  0999 V2000
    0.0000   -0.1000 -123.4567 N  {REST}
    1.2345  999.9999    0.0001 Cl {REST}
   -0.0000    2.0000    3.0000 C   0  0  1  0  0  0  0  0  0  0  0  0
    4.0000    5.0000    6.0000 C
    7.0000    8.0000    9.0000 H   0  0
  1  2  1  1
  3  2  2  3  0  0  0
  3  4  4  0
  4  5  1  6  0
M  CHG  2   1   1   2  -1
M  END
"""


def assert_same(found: Molecule | None, expected: Molecule | str) -> None:
    assert found is not None
    assert isinstance(expected, Molecule), expected
    for name in COLUMNS:
        value, other = getattr(found, name), getattr(expected, name)
        assert (value.dtype, value.shape) == (other.dtype, other.shape), name
        assert value.tobytes() == other.tobytes(), name


def test_blocks_of_many_molecules():
    """Signs of zeros and the order of atoms in a bond count too."""
    with MoleculeFile(bundled_sample()) as file:
        molecules = file.read(np.arange(0, 2000, 40))
    texts = [format_record(m, f"{k}", {"energy": 1.5}) for k, m in enumerate(molecules)]
    texts = [text.removesuffix("$$$$\n") for text in texts]
    for found, text in zip(read_plain_blocks(texts), texts, strict=True):
        assert_same(found, parse_mol_block(text))


def test_charges_stereo_and_aromatic_bonds():
    (found,) = read_plain_blocks([CHARGED])
    assert_same(found, parse_mol_block(CHARGED))
    assert found is not None and found.formal_charges is not None and found.bond_order is not None
    assert found.formal_charges.tolist() == [1, -1, 0, 0, 0]
    assert found.bond_order.tolist() == [1, 2, AROMATIC, 1]


def test_coordinates_are_the_nearest_numbers():
    """As Python reads them, and RDKit."""
    rng = np.random.default_rng(0)
    values = rng.uniform(-1, 1, (300, 3)) * 10.0 ** rng.integers(-4, 4, (300, 1))
    atoms = "".join("".join(f"{x:10.4f}" for x in row) + f" C  {REST}\n" for row in values)
    text = f"\n\n\n300  0  0  0  0  0  0  0  0  0999 V2000\n{atoms}M  END\n"
    (found,) = read_plain_blocks([text])
    assert found is not None
    assert found.positions.tolist() == [[float(np.float32(f"{x:.4f}")) for x in r] for r in values]
    assert_same(found, parse_mol_block(text))


def test_what_is_changed_is_read_as_rdkit_reads_it_or_left_to_it():
    rng = np.random.default_rng(1)
    signs = list("  \n-+.0123456789eCNXDHRGMxé\t*")
    changed = []
    for _ in range(800):
        text, place = CHARGED, int(rng.integers(len(CHARGED)))
        sign = str(rng.choice(signs))
        changed += [
            text[:place] + sign + text[place + 1 :],
            text[:place] + sign + text[place:],
            text[:place] + text[place + 1 :],
        ]
    found = read_plain_blocks(changed)
    for molecule, text in zip(found, changed, strict=True):
        if molecule is not None:
            assert_same(molecule, parse_mol_block(text))
    plain = sum(molecule is not None for molecule in found)
    assert 200 < plain < len(changed)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        CHARGED.rstrip("\n"),
        CHARGED.replace("  5  4", "  6  4"),
        CHARGED.replace("  5  4", "  0  0"),
        CHARGED.replace("  5  4", "999999"),
        CHARGED.replace("  3  4  4", "  4  5  4"),  # a bond twice
        CHARGED.replace("  1  2  1  1", "  1  1  1  1"),
        CHARGED.replace("  1  2  1  1", "  1  6  1  1"),
        CHARGED.replace("  1  2  1  1", "  1  2  5  1"),
        CHARGED.replace("M  CHG  2   1", "M  CHG  2   6"),
        CHARGED.replace("M  CHG  2   1", "M  CHG  3   1"),
        CHARGED.replace("M  END", "M  ISO  1   1  15\nM  END"),
        CHARGED.replace(" N  ", " D  "),
        CHARGED.replace(" H   0", " H   1"),  # an isotope
        CHARGED.replace("V2000", "V3000"),
    ],
)
def test_other_blocks_are_left_to_rdkit(text):
    assert read_plain_blocks([CHARGED, text, CHARGED])[1] is None


def test_a_charge_with_a_plus_sign_is_refused():
    """RDKit reads 0."""
    text = CHARGED.replace("M  CHG  2   1   1   2  -1", "M  CHG  2   1  +1   2  -1")
    assert read_plain_blocks([text]) == [None]
    reason = parse_mol_block(text)
    assert isinstance(reason, str) and "line 14: expected pairs of an atom and a charge" in reason


@pytest.mark.parametrize("lines", [0, 40, 20_000])
def test_records_do_not_depend_on_how_many_are_read_together(tmp_path: Path, monkeypatch, lines):
    texts = [CHARGED, CHARGED.replace("N  ", "Q  "), "\n", CHARGED.replace("    3D", "é"), CHARGED]
    path = tmp_path / "a.sdf"
    path.write_text("$$$$\n".join([*texts, "no mol block\n"]))
    monkeypatch.setattr(sdf, "_LINES_AT_ONCE", lines)
    reader = MoleculeReader(path, skip_bad=True)
    found = [(reader.number, len(molecule)) for molecule in reader]
    assert found == [(1, 5), (4, 5), (5, 5)]
    assert [(bad.number, bad.line) for bad in reader.skipped] == [(2, 17), (3, 33), (6, 67)]
